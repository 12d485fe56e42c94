"""GGUF files of architecture `llama`, for llama.cpp and what is built on it; needs the gguf package.

The layout is llama.cpp's (github.com/ggml-org/ggml, docs/gguf.md). Particular about it:
- the rotation there takes neighbouring features, ours (transformers') the halves of a head, so that the rows of the
  query and key projections are stored in another order;
- a tied head is left out, and vectors (norms, biases) are float32 whatever the matrices are;
- what rotary scaling it cannot say by a key, LLaMA 3's, is a tensor of frequency factors, `rope_freqs.weight`.
Tensors are written and read one at a time.
"""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from ..stored_weights import some
from .configuration_llama_style import LlamaStyleConfig
from .gguf_tokenizer import tokenizer_metadata
from .modeling_llama_style import LlamaStyleForCausalLM, LlamaStyleRotaryEmbedding

OUTTYPES = {
    "f32": (Kind.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Kind.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Kind.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# Our own key, which llama.cpp ignores: with it the rotary scaling comes back as it was.
ROPE_KEY = "hf_models.rope_parameters"
ROPE_FREQS = "rope_freqs.weight"
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

logger = logging.get_logger(__name__)


def folder_metadata(folder: Path) -> dict[str, Any]:
    """What a model folder says beside the weights, as GGUF keys: its tokenizer, its name and the licence of its card.

    Raises ValueError, in one sentence, for a tokenizer that cannot be read, or that llama.cpp would not reproduce.
    """
    metadata = {"general.name": folder.resolve().name}
    card = folder / "README.md"
    if card.is_file():
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        metadata |= {"general.license": licence} if isinstance(licence, str) else {}
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}.") from error
        return metadata | tokenizer_metadata(tokenizer)
    if found := [name for name in ("tokenizer.model", "vocab.json") if (folder / name).is_file()]:
        raise ValueError(
            f"{folder} holds its tokenizer as {found[0]} only: open it with AutoTokenizer and save_pretrained it "
            "there, which writes the tokenizer.json that is read here."
        )
    logger.warning(f"{folder} holds no tokenizer: the file will take and give token ids only.")
    return metadata


def refuse_other_suffixes(path: Path) -> None:
    if path.suffix != ".gguf":
        raise ValueError(f"The layout 'gguf' is one file: name it {path.name}.gguf rather than {path.name}.")


def write_gguf(
    model: LlamaStyleForCausalLM, path: str | Path, outtype: str | None = None, metadata: dict[str, Any] | None = None
) -> None:
    """Writes `model` to the file `path`, whole or not at all.

    Args:
        outtype: what the matrices become: "f32", "f16" or "q8_0" (blocks of 32 in a row that share a scale; matrices
            with other rows are f16). Default: f32 if the weights are float32, else f16.
        metadata: further keys, as `folder_metadata` or `tokenizer_metadata` makes them. Without a tokenizer, llama.cpp
            takes token ids only.

    Raises ValueError, before anything is written, for what llama.cpp's llama does not compute (a sliding window,
    another activation than SiLU, some rotary scaling) and for a tokenizer with more tokens than the model; and, while
    writing, for numbers that half precision cannot hold.
    """
    path = Path(path)
    refuse_other_suffixes(path)
    if outtype is None:
        outtype = "f32" if model.dtype == torch.float32 else "f16"
    kind, file_type = OUTTYPES[outtype]
    config = model.config
    _refuse_what_llama_cpp_has_not(config)
    fields = {
        "general.type": "model",
        "general.file_type": int(file_type),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **_config_metadata(config),
        **_tokens_for(model, metadata or {}),
    }
    tensors = {their_name(name): tensor for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    if (factors := rope_factors(config)) is not None:
        tensors[ROPE_FREQS] = factors
    kinds = {name: _kind_of(tensor, kind) for name, tensor in tensors.items()}
    if kind is Kind.Q8_0 and (odd := [n for n, t in tensors.items() if t.dim() > 1 and kinds[n] is not kind]):
        logger.warning(f"Not quantised but f16, as their rows are no multiple of 32 long: {some(odd)}.")

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        _write(whole, fields, tensors, kinds, config)
        os.replace(whole, path)


def _write(
    path: Path, fields: dict[str, Any], tensors: dict[str, Tensor], kinds: dict[str, Kind], config: LlamaStyleConfig
) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = tensor.numel() // block * size
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), nbytes, raw_dtype=kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            tensor = permuted(name, tensor.detach().cpu(), config)
            array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
            writer.write_tensor_data(_stored(name, array, kinds[name]))
    finally:
        writer.close()


def _kind_of(tensor: Tensor, kind: Kind) -> Kind:
    if tensor.dim() == 1:
        return Kind.F32  # llama.cpp adds and multiplies with nothing else
    return Kind.F16 if kind is Kind.Q8_0 and tensor.shape[-1] % 32 else kind


def _stored(name: str, array: np.ndarray, kind: Kind) -> np.ndarray:
    if kind is Kind.F16:
        with np.errstate(over="ignore"):
            half = array.astype(np.float16, copy=False)
        if np.isinf(half).any() and not np.isinf(array).any():
            raise ValueError(f"{name} holds numbers beyond 65504, the largest of half precision: write f32 instead.")
        return half
    return gguf.quants.quantize(array.astype(np.float32, copy=False), kind)


def _refuse_what_llama_cpp_has_not(config: LlamaStyleConfig) -> None:
    if config.sliding_window is not None:
        raise ValueError(
            f"sliding_window is {config.sliding_window}, and llama.cpp's llama has none: it would look further back. "
            "Set config.sliding_window to None if the model never saw longer texts."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"hidden_act is {config.hidden_act!r}, and llama.cpp's llama computes 'silu' only.")
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    if rope_type not in ("default", "linear", "yarn", "llama3"):
        raise ValueError(
            f"rope_type is {rope_type!r}, which llama.cpp's llama has not; it knows default, linear, yarn and llama3."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("rope_parameters has a partial_rotary_factor, and llama.cpp's llama rotates whole heads.")
    if rope_type == "yarn" and (
        (rope.get("beta_fast") or 32) != 32 or (rope.get("beta_slow") or 1) != 1 or not rope.get("truncate", True)
    ):
        raise ValueError(
            "rope_parameters has a beta_fast, beta_slow or truncate of its own, and llama.cpp's llama takes YaRN's "
            "defaults: 32, 1 and true."
        )


def _config_metadata(config: LlamaStyleConfig) -> dict[str, Any]:
    rope = config.rope_parameters
    metadata = {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "default":
        return metadata
    metadata[ROPE_KEY] = json.dumps(rope)
    if rope["rope_type"] == "llama3":  # said by a tensor
        return metadata
    _, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    factor = rope["factor"] or config.max_position_embeddings / rope["original_max_position_embeddings"]
    metadata["llama.rope.scaling.type"] = rope["rope_type"]
    metadata["llama.rope.scaling.factor"] = float(factor)
    if rope["rope_type"] == "yarn":
        metadata["llama.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        metadata["llama.rope.scaling.attn_factor"] = attention_factor / yarn_attention_factor(factor)
    return metadata


def yarn_attention_factor(factor: float) -> float:
    """What llama.cpp scales attention by on its own account (arXiv 2309.00071, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_factors(config: LlamaStyleConfig) -> Tensor | None:
    """What the default frequencies `(head_dim/2,)` are divided by, where a tensor has to say it."""
    if config.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return LlamaStyleRotaryEmbedding.compute_default_rope_parameters(config)[0] / scaled


def _tokens_for(model: LlamaStyleForCausalLM, metadata: dict[str, Any]) -> dict[str, Any]:
    """`metadata` with as many tokens as the model has, and with every token at which it stops."""
    size = model.config.vocab_size
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return metadata | {"tokenizer.ggml.model": "none"}
    if len(tokens) > size:
        raise ValueError(
            f"The tokenizer has {len(tokens)} tokens and the model {size}: resize its embeddings, or take its own "
            "tokenizer."
        )
    metadata = dict(metadata)
    missing = range(len(tokens), size)
    metadata["tokenizer.ggml.tokens"] = tokens + [f"[PAD{index}]" for index in missing]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [
        int(gguf.TokenType.UNUSED) for _ in missing
    ]
    if "tokenizer.ggml.scores" in metadata:
        metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"] + [0.0 for _ in missing]

    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    slots = [f"tokenizer.ggml.{name}_token_id" for name in ("eot", "eom")]
    known = {metadata.get(slot) for slot in ("tokenizer.ggml.eos_token_id", *slots)}
    free = [slot for slot in slots if slot not in metadata]
    further = [index for index in stops if index not in known]
    if len(further) > len(free):
        logger.warning(
            f"GGUF has no place for all tokens that end a text: llama.cpp goes on after {further[len(free) :]}."
        )
    return metadata | dict(zip(free, further, strict=False))


def their_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{kind}"


def permuted(name: str, tensor: Tensor, config: LlamaStyleConfig, back: bool = False) -> Tensor:
    """Query and key projections with the rows of a head in llama.cpp's order, or `back` in ours; others as they are.

    Row `i` of the first and of the second half of a head are rotated together: there, they are rows `2i` and `2i + 1`.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = (config.head_dim // 2, 2) if back else (2, config.head_dim // 2)
    return tensor.reshape(heads, *halves, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()
