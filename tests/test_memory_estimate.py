"""Memory predicted from a config alone: its parts against formulas, its peak against a run in a fresh process."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig, Qwen2Config

from benchmarks.memory_table import METHODS, measure_afresh
from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.sizes import SIZES
from training.adapters import AdapterArguments
from training.memory_estimate import (
    ACCURACY,
    GIB,
    DryRunArguments,
    TrainingShape,
    estimate_memory,
    lighter_shapes,
    optimizer_bytes,
    print_dry_run,
)
from training.quantization import QuantizationArguments

CONFIG = LlamaStyleConfig(**SIZES["1m"].config)
SHAPE = TrainingShape(batch_size=2, length=32)
LORA = AdapterArguments(use_peft=True, lora_r=4)
NF4 = QuantizationArguments(load_in_4bit=True)


def linear_shapes(config):
    """(in, out) of every linear layer but the head."""
    with torch.device("meta"):
        model = LlamaStyleForCausalLM(config)
    return [(m.in_features, m.out_features) for m in model.model.modules() if isinstance(m, torch.nn.Linear)]


def buffer_bytes(config):
    """The rotary frequencies, two tables of them."""
    return 2 * 4 * config.head_dim // 2


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_weights_are_parameters_times_their_size(dtype, size):
    estimate = estimate_memory(CONFIG, replace(SHAPE, dtype=dtype))
    assert estimate.weights - buffer_bytes(CONFIG) == SIZES["1m"].parameters * size
    assert estimate.gradients == SIZES["1m"].parameters * size
    assert estimate.optimizer == 2 * SIZES["1m"].parameters * size
    assert estimate.adapters == 0


@pytest.mark.parametrize("quantization", [None, NF4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_takes_its_two_matrices_a_layer_in_float32(quantization, dtype):
    estimate = estimate_memory(CONFIG, replace(SHAPE, adapter=LORA, quantization=quantization, dtype=dtype))
    parameters = sum(4 * (inner + outer) for inner, outer in linear_shapes(CONFIG))
    assert estimate.adapters == estimate.gradients == 4 * parameters
    assert estimate.optimizer == 8 * parameters


@pytest.mark.parametrize("double", [True, False])
def test_quantised_weights_follow_the_formula(double):
    quantization = QuantizationArguments(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    estimate = estimate_memory(CONFIG, replace(SHAPE, adapter=LORA, quantization=quantization))
    full = estimate_memory(CONFIG, SHAPE)
    packed = 0
    for inner, outer in linear_shapes(CONFIG):
        scales = inner * outer // 64
        packed += inner * outer // 2 + 4 * 16  # and the 16 values that 4 bits stand for
        packed += scales + 4 * -(-scales // 256) + 4 * 256 + 4 if double else 4 * scales
    elements = sum(inner * outer for inner, outer in linear_shapes(CONFIG))
    assert full.weights - estimate.weights == 4 * elements - packed


def test_states_of_optimizers():
    parameters = [torch.empty(1000, 100, device="meta"), torch.empty(100, device="meta")]
    for parameter in parameters:
        parameter.requires_grad = True
    assert optimizer_bytes(parameters, "adamw_torch_fused") == 8 * 100_100
    assert optimizer_bytes(parameters, "paged_adamw_32bit") == 8 * 100_100
    # Two bytes and two scales for each 256; a tensor of under 4,096 elements keeps 32 bits.
    assert optimizer_bytes(parameters, "adamw_bnb_8bit") == 2 * (100_000 + 4 * 391) + 8 * 100
    assert optimizer_bytes(parameters, "sgd") == 0
    with pytest.raises(ValueError, match="adafactor"):
        optimizer_bytes(parameters, "adafactor")


def test_activations_grow_with_tokens_and_shrink_with_checkpoints():
    once = estimate_memory(CONFIG, replace(SHAPE, batch_size=4, length=128)).activations
    twice = estimate_memory(CONFIG, replace(SHAPE, batch_size=8, length=128)).activations
    pairs = estimate_memory(CONFIG, replace(SHAPE, batch_size=4, length=128, sequences_per_example=2)).activations
    checkpointed = estimate_memory(
        CONFIG, replace(SHAPE, batch_size=4, length=128, gradient_checkpointing=True)
    ).activations
    assert twice == pairs
    assert 1.9 * once < twice < 2.0 * once  # what does not grow: a tile's index of the vocabulary, the frequencies
    assert checkpointed < once


def test_what_is_held_throughout_is_counted():
    plain = estimate_memory(CONFIG, SHAPE)
    assert estimate_memory(CONFIG, replace(SHAPE, reference_copy=True)).total == plain.total + plain.weights
    accumulating = estimate_memory(CONFIG, replace(SHAPE, accumulates=True))
    assert accumulating.gradients_at_peak == accumulating.gradients == plain.gradients
    assert estimate_memory(CONFIG, replace(SHAPE, processes=2)).total == plain.total + plain.gradients
    assert plain.total == sum(plain) - plain.gradients


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=256),
        Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
        ),
        GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=256),
    ],
    ids=lambda config: config.model_type,
)
def test_models_of_transformers(config):
    for method in METHODS.values():
        estimate = estimate_memory(config, replace(SHAPE, **method))
        assert estimate.weights > 0
        assert estimate.activations > 0


@pytest.mark.parametrize("changes", [{}, {"adapter": LORA}, {"adapter": LORA, "quantization": NF4}])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_reward_model_and_a_gpu(changes, device_type):
    config = LlamaStyleConfig(**SIZES["1m"].config, num_labels=1, pad_token_id=0)
    shape = replace(SHAPE, sequences_per_example=2, device_type=device_type, bf16=True, **changes)
    reward = estimate_memory(config, shape, auto_class=AutoModelForSequenceClassification)
    language = estimate_memory(config, shape)
    assert reward.activations < language.activations  # no logits of the vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_is_within_15_percent_of_a_run(method, checkpointing):
    shape = TrainingShape(batch_size=4, length=256, gradient_checkpointing=checkpointing, **METHODS[method])
    predicted = estimate_memory(LlamaStyleConfig(**SIZES["15m"].config), shape)
    measured = measure_afresh("15m", shape)
    for part in ("weights", "adapters", "gradients"):
        assert getattr(predicted, part) == measured[part]
    assert predicted.optimizer == pytest.approx(measured["optimizer"], rel=0.01)  # a step counter a parameter
    assert predicted.total == pytest.approx(measured["total"], rel=ACCURACY)


def test_the_verdict_and_what_would_help(capsys):
    total = estimate_memory(CONFIG, SHAPE).total / GIB
    print_dry_run(CONFIG, SHAPE, device_memory_gib=2 * total)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("fits: ")
    assert printed[-2].split() == ["total", f"{total:.3f}"]
    print_dry_run(CONFIG, SHAPE, device_memory_gib=1.01 * total)
    assert "by less than the 15%" in capsys.readouterr().out.splitlines()[-1]

    shape = replace(SHAPE, batch_size=8)
    estimate = print_dry_run(CONFIG, shape, device_memory_gib=total)
    printed = capsys.readouterr().out
    assert f"does not fit: {estimate.total / GIB:.2f} of {total:.2f} GiB" in printed
    for option, lighter in lighter_shapes(shape).items():
        assert f"with {option}: {estimate_memory(CONFIG, lighter).total / GIB:.2f} GiB" in printed
    assert ", which fits" in printed


def test_7b_is_predicted_in_seconds_and_without_its_memory():
    code = """
import re, resource
from training.memory_estimate import *
from hf_models import LlamaStyleConfig
from hf_models.llama_style.sizes import SIZES
shape = TrainingShape(batch_size=4, length=2048, dtype=torch.bfloat16, gradient_checkpointing=True)
estimate = print_dry_run(LlamaStyleConfig(**SIZES["llama_7b"].config), shape, device_memory_gib=1000)
used = resource.getrusage(resource.RUSAGE_SELF)
# Not `ru_maxrss`, which begins with what the parent held. Of the time, the processor's: the clock counts others' too.
peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print(estimate.weights, peak, used.ru_utime)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    weights, kilobytes, seconds = process.stdout.splitlines()[-1].split()
    assert int(weights) - buffer_bytes(LlamaStyleConfig(**SIZES["llama_7b"].config)) == 6_738_415_616 * 2
    assert int(kilobytes) < 2_000_000
    assert float(seconds) < 30


def test_a_device_has_some_memory():
    with pytest.raises(ValueError, match="more than 0"):
        DryRunArguments(device_memory_gib=0.0)
