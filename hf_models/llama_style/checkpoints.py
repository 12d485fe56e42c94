"""Checkpoints of the LLaMA-style decoder, in our layout, in transformers' native Llama and as GGUF.

The first two are a folder with `config.json` and safetensors, and name their parameters alike: a conversion rewrites
the config. GGUF is one file (`gguf_file`). What is checked here, before any weight is read, is that the file holds
exactly the model that its config describes; transformers would fill what is missing with random numbers and go on.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from ..exported_program import TokenGraph, save_exported_program
from ..stored_weights import (
    KIND_FIELDS,
    StoredParameter,
    check_parameters,
    common_dtype,
    parameters_of_folder,
    read_config_fields,
)
from .configuration_llama_style import LlamaStyleConfig
from .modeling_llama_style import LlamaStyleForCausalLM

LAYOUT_OF_MODEL_TYPE = {"llama_style": "hf_models", "llama": "transformers"}
ARCHITECTURES = {"hf_models": "LlamaStyleForCausalLM", "transformers": "LlamaForCausalLM"}
LAYOUTS = (*ARCHITECTURES, "gguf")
EXPORTS = ("torch_export",)  # written only


def load_checkpoint(path: str | Path, layout: str = "auto") -> LlamaStyleForCausalLM:
    """Opens a causal language model, the weights bit for bit and in the files' dtype.

    Args:
        path: a local folder with `config.json` and `model.safetensors`, or shards and their index; or a `.gguf` file,
            of which 8-bit weights become float32.
        layout: "hf_models" (ours), "transformers" (native Llama), "gguf", or "auto": what the suffix or `config.json`
            says.

    Raises FileNotFoundError or ValueError, in one sentence: no config or safetensors there, another kind of model, a
    quantised one, an unreadable file, missing or unexpected parameters (by name), shapes that differ from the config's.
    """
    path = Path(path)
    if path.suffix == ".gguf" and layout in ("auto", "gguf") and not path.is_dir():
        return gguf_module("gguf_reading").read_gguf(path)
    config = _read_config(path, layout)
    stored = parameters_of_folder(path)
    _check_parameters(path, config, stored)
    dtype = common_dtype(path, {name: entry.dtype for name, entry in stored.items()})
    return LlamaStyleForCausalLM.from_pretrained(path, config=config, dtype=dtype)


def save_checkpoint(
    model: LlamaStyleForCausalLM,
    path: str | Path,
    layout: str,
    outtype: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Writes `model` to the folder `path`, in its own dtype, with its generation config; as GGUF, to the file `path`.

    Args:
        layout: "hf_models" writes what `save_pretrained` does, our code beside the weights; "transformers" writes a
            native Llama folder, which needs no code of ours; "gguf" writes a file for llama.cpp; "torch_export" a
            `.pt2` file with the graph alone: no config, and `load_checkpoint` does not open it.
        outtype: of GGUF, what the matrices become: "f32", "f16" or "q8_0"; see `gguf_file.write_gguf`.
        metadata: of GGUF, the tokenizer and what else to say, from `gguf_file.folder_metadata`.

    Raises ValueError for an unknown layout, for a model without a language-model head or with quantised weights, for
    a sliding window, which native Llama and llama.cpp's do not have, and for a graph that cannot be traced or computes
    something else than the model.
    """
    # By name: a model opened as remote code is of a class of its own.
    if type(model).__name__ != ARCHITECTURES["hf_models"]:
        raise ValueError(
            f"Only a LlamaStyleForCausalLM can be saved, and this is a {type(model).__name__}; merge adapters first."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError("The model is quantised: open it in full precision and save that.")
    if layout == "hf_models":
        model.save_pretrained(path)
    elif layout == "transformers":
        _as_native(model).save_pretrained(path)
    elif layout == "gguf":
        gguf_module("gguf_file").write_gguf(model, path, outtype, metadata)
    elif layout == "torch_export":
        training = model.training
        try:
            save_exported_program(TokenGraph(model), Path(path))
        finally:
            model.train(training)
    else:
        raise ValueError(f"No layout {layout!r}: choose one of {', '.join((*LAYOUTS, *EXPORTS))}.")


def gguf_module(name: str) -> ModuleType:
    """Our module `name`; raises ImportError, in one sentence, where the gguf package that it needs is not installed."""
    try:
        return import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ImportError("GGUF files need the gguf package: pip install 'hf_models[export]'.") from error


def _as_native(model: LlamaStyleForCausalLM) -> LlamaForCausalLM:
    """transformers' own model around the very same tensors."""
    if model.config.sliding_window is not None:
        raise ValueError(
            f"sliding_window is {model.config.sliding_window}, and native Llama has none: it would look further back. "
            "Set config.sliding_window to None if the model never saw longer texts."
        )
    fields = {name: value for name, value in model.config.to_dict().items() if name not in KIND_FIELDS}
    del fields["sliding_window"]
    with torch.device("meta"):
        native = LlamaForCausalLM(LlamaConfig(**fields))
    native.load_state_dict(model.state_dict(), assign=True)
    native.tie_weights()
    native.generation_config = model.generation_config
    return native


def _read_config(path: Path, layout: str) -> LlamaStyleConfig:
    file = path / "config.json"
    fields = read_config_fields(file)
    found = LAYOUT_OF_MODEL_TYPE.get(fields.get("model_type"))
    if found is None or layout not in ("auto", found):
        known = ", ".join(f"{layout} ({model_type})" for model_type, layout in LAYOUT_OF_MODEL_TYPE.items())
        raise ValueError(
            f"{file} has model_type {fields.get('model_type')!r}, asked for as layout {layout!r}; known are {known}."
        )
    for architecture in fields.get("architectures") or []:
        if architecture != ARCHITECTURES[found]:
            raise ValueError(f"{path} holds a {architecture}; only a {ARCHITECTURES[found]} can be opened here.")
    if fields.get("quantization_config") is not None:
        raise ValueError(f"{path} holds quantised weights; open the model in full precision and save that first.")

    try:
        if found == "hf_models":
            return LlamaStyleConfig.from_pretrained(path)
        # By way of transformers' own class, which knows how older versions of it wrote the rope fields.
        native = LlamaConfig.from_pretrained(path).to_dict()
        return LlamaStyleConfig(**{name: value for name, value in native.items() if name not in KIND_FIELDS})
    except (StrictDataclassError, KeyError) as error:
        raise ValueError(f"{file} is no valid config. {' '.join(str(error).split())}") from error


def _check_parameters(path: Path, config: LlamaStyleConfig, stored: dict[str, StoredParameter]) -> None:
    """Raises unless `stored` is exactly what `config` describes."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaStyleForCausalLM(config).state_dict().items()}
    # transformers before 4.32 stored each layer's rotary frequencies; they follow from the config.
    stored = {name: entry for name, entry in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        _check_tied_head(path, stored)
        if "model.embed_tokens.weight" in stored:
            stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    check_parameters(path, "the model of its config", shapes, {name: entry.shape for name, entry in stored.items()})


def _check_tied_head(path: Path, stored: dict[str, StoredParameter]) -> None:
    """A tied model may store its one matrix twice; two different ones are no tied model."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in stored for name in names):
        return
    matrices = []
    for name in names:
        with safe_open(stored[name].file, framework="pt") as tensors:
            matrices.append(tensors.get_tensor(name))
    if not torch.equal(*matrices):
        raise ValueError(
            f"{path} says tie_word_embeddings but stores a head that differs from the embeddings; "
            "set tie_word_embeddings to false in its config.json to keep both."
        )
