"""4-bit weights by bitsandbytes (QLoRA, arXiv 2305.14314): NF4 or FP4, double quantisation, products in bfloat16.

Every linear layer but the head is quantised when the model is loaded; embeddings, norms and head keep their dtype, and
only adapters can be trained on it. Notable here is `prepare_quantized`: on a CPU with bfloat16 instructions
bitsandbytes repacks the weights in place at the first evaluation, after which no gradient passes through them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import is_bitsandbytes_available

from .run_setup import RunFolderArguments

BLOCK_SIZE = 64  # weights that share one scale; bitsandbytes' default
PAGING_DEVICES = ("cuda", "xpu")
# bitsandbytes' among the optimizers of TrainingArguments.
BITSANDBYTES_OPTIMIZERS = ("paged_", "adamw_bnb", "adamw_8bit", "lion_8bit", "ademamix", "rmsprop_bnb")


@dataclass
class QuantizationArguments:
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the weights in 4 bits (bitsandbytes) and train an adapter on them: QLoRA."},
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 (4-bit NormalFloat) or fp4."})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "Quantise the scales too: 0.37 bits less a weight."}
    )

    def __post_init__(self):
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"--bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}: take nf4 or fp4.")


def quantization_config(arguments: QuantizationArguments) -> BitsAndBytesConfig | None:
    """What `from_pretrained` takes; None without `--load_in_4bit`. Raises ImportError where bitsandbytes is missing."""
    if not arguments.load_in_4bit:
        return None
    _require_bitsandbytes("--load_in_4bit")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=arguments.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_quantizable(
    config: PreTrainedConfig, arguments: QuantizationArguments, trust_remote_code: bool = False
) -> None:
    """Raises ValueError where a layer to be quantised reads a number of features that blocks of 64 do not divide.

    A block would reach over two rows of the weight, which bitsandbytes' kernels for inference on a CPU cannot read.
    Nothing is loaded: the layers are those of a model without storage.
    """
    if not arguments.load_in_4bit:
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layers = replace_linear_layers(model, quantization_config(arguments))
    uneven = {name: layer.in_features for name, layer in layers.items() if layer.in_features % BLOCK_SIZE}
    if not uneven:
        return
    name, size = next(iter(uneven.items()))
    below = size // BLOCK_SIZE * BLOCK_SIZE
    nearest = " or ".join(str(multiple) for multiple in (below, below + BLOCK_SIZE) if multiple)
    raise ValueError(
        f"{_config_field(config, size)} is {size}, and blocks of {BLOCK_SIZE}, in which 4-bit weights come, do not "
        f"divide it ({name}, and {len(uneven) - 1} more layers): take a model where it is {nearest}, or leave "
        "--load_in_4bit off and train the adapter on full-precision weights."
    )


def replace_linear_layers(model: nn.Module, config: BitsAndBytesConfig) -> dict[str, nn.Module]:
    """Puts a Linear4bit, without weights, in the place of each layer that loading would quantise; returns them."""
    import bitsandbytes

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}


def prepare_quantized(model: nn.Module) -> None:
    """Makes a 4-bit model fit for training, evaluation in between, and saving. Call it after loading.

    On a CPU with AVX512-BF16, a Linear4bit that is called in eval mode repacks its weight for a faster kernel. That
    kernel has no backward pass, so layers before it get no gradient ever after, and the way back rounds the scales:
    the weights that are saved are no longer those that were loaded. (bitsandbytes 0.50.2)

    PEFT's `prepare_model_for_kbit_training` is not needed besides: it freezes what PEFT freezes, asks for checkpointing
    as TRL does, and turns embeddings and head into float32, for norms that compute in float32 anyway.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextlib.contextmanager
def keep_adapter_dtype(model: nn.Module) -> Iterator[None]:
    """Around the making of a TRL trainer, which turns the adapter of a 4-bit model into bfloat16.

    That halves a memory that is small, and loses updates smaller than 1/256 of a weight, and the exactness that an
    initialisation from the base's own weights (PiSSA) needs.
    """
    kept = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def settle_optimizer(
    training: RunFolderArguments, arguments: QuantizationArguments, given: dict[str, Any]
) -> str | None:
    """Chooses the optimizer of a 4-bit run where none was `given`, and says what paging comes to on this device.

    Paged states lie in memory that the GPU's driver moves to the host when the GPU runs out of its own; on a CPU there
    is none, and bitsandbytes' paged optimizers are its plain ones.

    Returns the note to print and to record, None where there is nothing to say. Raises ImportError where the optimizer
    is one of bitsandbytes' and that is missing.
    """
    pages = training.device.type in PAGING_DEVICES
    if arguments.load_in_4bit and "optim" not in given:
        training.optim = "paged_adamw_8bit" if pages else "adamw_bnb_8bit"
    optimizer = str(getattr(training.optim, "value", training.optim))
    if optimizer.startswith(BITSANDBYTES_OPTIMIZERS):
        _require_bitsandbytes(f"--optim {optimizer}")
    if arguments.load_in_4bit and "optim" not in given:
        states = "paged" if pages else f"not paged, which a device of type {training.device.type} cannot do"
        return f"The optimizer is {optimizer}, AdamW with states of 8 bits, {states}; --optim chooses another."
    if optimizer.startswith("paged_") and not pages:
        return f"--optim {optimizer} is not paged here: a device of type {training.device.type} has no paged memory."
    return None


def _require_bitsandbytes(option: str) -> None:
    if not is_bitsandbytes_available():
        raise ImportError(f"{option} needs bitsandbytes: `pip install bitsandbytes`, or this package's extra `train`.")


def _config_field(config: PreTrainedConfig, size: int) -> str:
    """What in the config says `size`: a field, or the heads times their size."""
    fields = [
        name
        for name, value in config.get_text_config().to_dict().items()
        if type(value) is int and value == size and name.endswith(("size", "dim", "embd", "inner", "model"))
    ]
    if "hidden_size" in fields:
        return "hidden_size"
    heads, head_dim = (getattr(config, name, None) for name in ("num_attention_heads", "head_dim"))
    if heads and head_dim and heads * head_dim == size:
        return f"num_attention_heads ({heads}) x head_dim ({head_dim})"
    return fields[0] if fields else "a layer's in_features"
