"""Reading a GGUF file of architecture `llama` as one of our models; `gguf_file` writes them and says what is in them.

Before any weight is read, the file is compared with the model that its keys describe, as everywhere in `checkpoints`.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers.utils import logging

from ..stored_weights import check_parameters, refuse_failed_download, some
from .configuration_llama_style import LlamaStyleConfig
from .gguf_file import ROPE_FREQS, ROPE_KEY, permuted, rope_factors, their_name, yarn_attention_factor
from .modeling_llama_style import LlamaStyleForCausalLM, LlamaStyleRotaryEmbedding

_READABLE = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0)
# Of LLaMA 3.1 to 3.3, which a foreign file tells by its factors alone.
_LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

logger = logging.get_logger(__name__)


def read_gguf(path: str | Path) -> LlamaStyleForCausalLM:
    """Opens a GGUF file of architecture `llama` as one of our models; its tokenizer is left.

    Weights of types F32, F16 and BF16 come back bit for bit, in the narrowest dtype that holds them all; Q8_0 is
    computed back to float32, with a note.

    Raises FileNotFoundError or ValueError, in one sentence: no such file, one that is cut short, another architecture
    or quantisation, missing or unexpected tensors, shapes that differ from what the file says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a .gguf file.")
    refuse_failed_download(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if "tokenizer." not in key}
        specials = {
            name: reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()
            for name in ("bos", "eos", "padding", "eot", "eom")
            if f"tokenizer.ggml.{name}_token_id" in reader.fields
        }
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path} is cut short or is no GGUF file ({error}); fetch it again.") from error
    _refuse_other_models(path, fields)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = stored.pop(ROPE_FREQS, None)
    kinds = {name: tensor.tensor_type for name, tensor in stored.items()}
    if other := [f"{name} ({kind.name})" for name, kind in kinds.items() if kind not in _READABLE]:
        raise ValueError(
            f"{path} holds quantised weights, {some(other)}; take the file of type F16, BF16, F32 or Q8_0."
        )

    shapes = {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in stored.items()}
    config = _read_config(path, fields, specials, shapes, None if factors is None else torch.tensor(factors.data))
    with torch.device("meta"):
        model = LlamaStyleForCausalLM(config)
    names = {their_name(name): name for name in model.state_dict()}
    if config.tie_word_embeddings:
        del names["output.weight"]
    expected = {theirs: tuple(model.state_dict()[ours].shape) for theirs, ours in names.items()}
    check_parameters(path, "the model that it describes", expected, shapes)

    if Kind.Q8_0 in kinds.values():
        logger.warning(f"{path} holds weights of 8 bits (Q8_0): computed back to float32, they stay rounded.")
    state = {ours: permuted(theirs, _read_tensor(stored[theirs]), config, back=True) for theirs, ours in names.items()}
    dtype = _narrowest_dtype(state)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # Not among the parameters: made anew where it has numbers.
    model.model.rotary_emb = LlamaStyleRotaryEmbedding(config)
    model.config.dtype = dtype
    return model.eval()


def _read_tensor(tensor: gguf.ReaderTensor) -> Tensor:
    """A copy: the file may be overwritten while the model lives."""
    shape = tuple(map(int, reversed(tensor.shape)))
    if tensor.tensor_type is Kind.BF16:
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).reshape(shape)
    if tensor.tensor_type is Kind.Q8_0:
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, Kind.Q8_0)).reshape(shape)
    return torch.from_numpy(np.array(tensor.data)).reshape(shape)


def _narrowest_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """That of the matrices if the vectors, which are stored as float32, are numbers of it too."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.dim() > 1}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    exact = all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in state.values())
    return dtype if exact else torch.float32


def _refuse_other_models(path: Path, fields: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} is of architecture {architecture!r}; only 'llama' can be opened here.")
    if fields.get("llama.expert_count"):
        raise ValueError(f"{path} holds a mixture of {fields['llama.expert_count']} experts, which our model has not.")
    if fields.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {fields['split.count']} parts: join them with llama-gguf-split --merge.")


def _read_config(
    path: Path,
    fields: dict[str, Any],
    specials: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
    factors: Tensor | None,
) -> LlamaStyleConfig:
    def number(key: str, default: Any = None) -> Any:
        value = fields.get(f"llama.{key}", default)
        if value is None:
            raise ValueError(f"{path} does not say llama.{key}: it is no whole GGUF file of a llama.")
        # float32 as it was meant: 1e-06, not 9.999999974752427e-07.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} lacks token_embd.weight.")
    heads, hidden_size = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ValueError(f"{path} has llama.{key} {number(key)} and heads of {head_dim}; here they are the same.")
    stops = [specials[name] for name in ("eos", "eot", "eom") if name in specials]
    rope = {"rope_type": "default", "rope_theta": number("rope.freq_base", 10000.0)}
    scaling = fields.get("llama.rope.scaling.type", "linear")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0))
    if ROPE_KEY in fields:
        rope = json.loads(fields[ROPE_KEY])
    elif factors is not None:
        rope |= {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA_3_ROPE}
    elif factor and scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": factor}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = number("rope.scaling.original_context_length")
            rope["attention_factor"] = number("rope.scaling.attn_factor", 1.0) * yarn_attention_factor(factor)
    elif scaling not in ("linear", "none"):
        raise ValueError(f"{path} scales its rotation by {scaling!r}; known here are linear, yarn and LLaMA 3's.")
    config = LlamaStyleConfig(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=hidden_size,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=number("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        bos_token_id=specials.get("bos"),
        eos_token_id=stops if len(stops) > 1 else stops[0] if stops else None,
        pad_token_id=specials.get("padding"),
    )
    expected = rope_factors(config)
    same = factors is expected if expected is None or factors is None else torch.allclose(factors, expected, rtol=1e-4)
    if not same:
        raise ValueError(
            f"{path} scales its rotation by a {ROPE_FREQS} that is not LLaMA 3's: no config of ours can say that."
        )
    return config
