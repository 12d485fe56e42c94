"""4-bit weights: how well and how small they hold a model, what is refused, and training an adapter on them."""

import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from tiny_chat_model import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from trl import SFTConfig, SFTTrainer

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.llama_style.sizes import SIZES
from training import quantization
from training.adapters import AdapterArguments, add_adapter
from training.quantization import (
    QuantizationArguments,
    check_quantizable,
    keep_adapter_dtype,
    prepare_quantized,
    quantization_config,
    replace_linear_layers,
    settle_optimizer,
)

NF4 = QuantizationArguments(load_in_4bit=True)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
# What a process without this package makes of a folder of 4-bit weights.
STRANGER = """
import sys
sys.modules["hf_models"] = None  # importing it is an ImportError
import torch
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.train()  # without dropout, the same function, by the kernel that reads the weights as they are stored
with torch.no_grad():
    torch.save(model(torch.load(folder + "/input_ids.pt")).logits, folder + "/logits.pt")
"""


@pytest.fixture
def base(tmp_path):
    """A folder with a small model in full precision."""
    LlamaStyleForCausalLM(LlamaStyleConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(folder, arguments=NF4):
    # Of a folder that is in 4 bits already, its own config says so: transformers takes None for "in none".
    given = {"quantization_config": quantization_config(arguments)} if arguments.load_in_4bit else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **given)
    prepare_quantized(model)
    return model


def linear_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def stored_bytes(weight):
    """Bytes of a quantised weight and its scales; the code books of a layer, 1.1 KiB, are no part of a formula."""
    state = weight.quant_state
    return weight.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


def formula_bytes(elements, double=True):
    """QLoRA, section 3: 4 bits a weight, and a scale for each 64: of 32 bits, or of 8 with 32 bits for each 256."""
    return elements * (1 / 2 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64))


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.0925), ("fp4", 0.1226)])
def test_error_of_gaussian_weights(kind, error):
    weight = torch.randn(512, 1024)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    restored = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert (restored - weight).norm() / weight.norm() == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("double", [True, False])
def test_bytes_of_quantised_weights_follow_the_formula(tmp_path, double):
    # Wide enough that every weight has whole blocks of 256 scales.
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    LlamaStyleForCausalLM(LlamaStyleConfig(**shape)).save_pretrained(tmp_path)
    layers = linear_layers(opened(tmp_path, QuantizationArguments(True, bnb_4bit_use_double_quant=double)))
    assert len(layers) == 7
    for layer in layers.values():
        elements = layer.in_features * layer.out_features
        assert stored_bytes(layer.weight) == formula_bytes(elements, double)


def test_a_model_of_125m_takes_under_0_3_of_float16():
    with torch.device("meta"):
        model = LlamaStyleForCausalLM(LlamaStyleConfig(**SIZES["125m"].config))
    elements = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    layers = replace_linear_layers(model, quantization_config(NF4)).values()
    assert sum(layer.in_features * layer.out_features for layer in layers) == elements
    assert formula_bytes(elements) <= 0.30 * 2 * elements


def test_head_and_embeddings_keep_full_precision(base):
    model = opened(base)
    quantised = {name for name, p in model.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert quantised == {f"{name}.weight" for name in linear_layers(model)}
    assert all(name.split(".")[-2].endswith("_proj") for name in quantised)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for name, p in model.named_parameters() if name not in quantised} == {torch.float32}


def test_saved_and_opened_again_even_after_an_evaluation(base, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    model = opened(base).eval()
    input_ids = torch.randint(320, (2, 20))
    with torch.no_grad():
        logits = model(input_ids).logits
        model.generate(input_ids[:1], max_new_tokens=3)
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    with torch.no_grad():
        again = opened(folder, QuantizationArguments())
        assert torch.equal(again(input_ids).logits, logits)
    torch.save(input_ids, folder / "input_ids.pt")
    process = subprocess.run([sys.executable, "-I", "-c", STRANGER, folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert torch.equal(torch.load(folder / "logits.pt"), logits)


def gradients(model, input_ids):
    model.train()
    loss = model(input_ids=input_ids, labels=input_ids).loss
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_after_an_evaluation_equal_those_before(base):
    model = add_adapter(opened(base), AdapterArguments(use_peft=True), task_type="CAUSAL_LM", base=str(base))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    input_ids = torch.randint(320, (2, 20))
    before = gradients(model, input_ids)
    model.eval()
    with torch.no_grad():
        model(input_ids=input_ids)
        model.generate(input_ids=input_ids[:1], max_new_tokens=3)
    after = gradients(model, input_ids)
    assert all(gradient.norm() > 0 for gradient in before.values())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_changes_the_adapter_only(base, tmp_path):
    tokenizer = tiny_tokenizer()
    model = add_adapter(opened(base), AdapterArguments(use_peft=True), task_type="CAUSAL_LM", base=str(base))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = torch.randint(280, (8, 16)).tolist()
    rows = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = SFTConfig(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=1,
        optim="adamw_bnb_8bit",
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    with keep_adapter_dtype(model):
        trainer = SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(torch.equal(p, before[name]) for name, p in trained.items())
    trainer.train()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 100}, "hidden_size is 100"),
        ({"intermediate_size": 150}, "intermediate_size is 150"),
        (
            {"hidden_size": 128, "num_attention_heads": 2, "head_dim": 72},
            "num_attention_heads (2) x head_dim (72) is 144",
        ),
    ],
)
@pytest.mark.parametrize("config_class", [LlamaStyleConfig, LlamaConfig])
def test_uneven_layers_are_refused_by_field(config_class, changes, named):
    config = config_class(**SHAPE | {"num_key_value_heads": 1} | changes)
    with pytest.raises(ValueError, match="64") as error:
        check_quantizable(config, NF4)
    size = next(int(word) for word in reversed(named.split()) if word.isdigit())
    assert str(error.value).startswith(named)
    assert f"{size // 64 * 64} or {size // 64 * 64 + 64}" in str(error.value)
    check_quantizable(config, QuantizationArguments())


def test_every_size_of_ours_can_be_quantised():
    for size in SIZES.values():
        check_quantizable(LlamaStyleConfig(**size.config | {"num_hidden_layers": 1}), NF4)


def training_on(device, optim="adamw_torch_fused"):
    return SimpleNamespace(device=torch.device(device), optim=optim)


def test_the_optimizer_is_paged_where_the_device_pages():
    on_gpu, on_cpu = training_on("cuda"), training_on("cpu")
    assert "paged_adamw_8bit" in settle_optimizer(on_gpu, NF4, {})
    assert "not paged" in settle_optimizer(on_cpu, NF4, {})
    assert (on_gpu.optim, on_cpu.optim) == ("paged_adamw_8bit", "adamw_bnb_8bit")


def test_a_given_optimizer_is_kept():
    kept = training_on("cpu", "sgd")
    assert settle_optimizer(kept, NF4, {"optim": "sgd"}) is None
    assert kept.optim == "sgd"
    paged = training_on("cpu", "paged_adamw_32bit")
    assert "not paged here" in settle_optimizer(paged, NF4, {"optim": "paged_adamw_32bit"})
    assert settle_optimizer(training_on("cuda", "paged_adamw_32bit"), NF4, {"optim": "paged_adamw_32bit"}) is None
    full = training_on("cpu")
    assert settle_optimizer(full, QuantizationArguments(), {}) is None
    assert full.optim == "adamw_torch_fused"


def test_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setattr(quantization, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        quantization_config(NF4)
    with pytest.raises(ImportError, match="--optim adamw_bnb_8bit"):
        settle_optimizer(training_on("cpu", "adamw_bnb_8bit"), QuantizationArguments(), {"optim": "adamw_bnb_8bit"})
    assert quantization_config(QuantizationArguments()) is None


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="nf4 or fp4"):
        QuantizationArguments(bnb_4bit_quant_type="int4")
