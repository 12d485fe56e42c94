"""Opens the language models that fine-tuning begins with and that chat and evaluation use: ours and transformers'.

What comes out is the model's own class, so that a transformers checkpoint stays one. A folder that lacks weights is
refused: transformers would fill them with random numbers and go on.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

import hf_models  # noqa: F401 (registers our families with the Auto classes)
from hf_models.stored_weights import parameters_of_folder, some

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class LanguageModelArguments:
    model: str = field(
        default="runs/quickstart/language_model",
        metadata={"help": "The model to begin with: a run folder, a transformers folder or a Hub id."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": f"Of the weights in memory: {', '.join(DTYPES)}. By default float32 where they are trained, and as "
            "they are stored where only an adapter is."
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, flash_attention_2 (GPUs), flex_attention, or eager."}
    )

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}: take one of {', '.join(DTYPES)}.")


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The tokenizer {name!r} cannot be opened: give a folder (`python -m training.train_tokenizer` makes one) "
            f"or a Hub id. {error}"
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text becomes."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def load_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of the model at `path`; raises ValueError in one sentence, also where an adapter lies there."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"{path} holds an adapter of {base}, not a model: merge it first with "
            f"`python -m training.merge_adapter --adapter {path} --output_dir FOLDER` and give that folder."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The model {path!r} cannot be opened: give a run folder, a transformers folder or a Hub id. {error}"
        ) from error


def load_language_model(
    path: str,
    *,
    auto_class: type = AutoModelForCausalLM,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str = "sdpa",
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """The model at `path`, in evaluation mode. A head that a sequence classifier's base lacks is new.

    Args:
        dtype: of the weights in memory, "auto" for that of the files.
        quantization_config: a `BitsAndBytesConfig`, for weights of 4 bits.
        kwargs: for `from_pretrained`: config fields such as `num_labels`, `device_map`.

    Raises ValueError, in one sentence: nothing at `path`, an adapter, unreadable or missing weights.
    """
    config = load_config(path, trust_remote_code)
    if auto_class is AutoModelForCausalLM and str(config.architectures).endswith("ForSequenceClassification']"):
        raise ValueError(f"{path} holds a reward model or classifier, which writes no text: give a language model.")
    if quantization_config is not None:  # None given would undo the quantisation of a folder that holds 4 bits
        kwargs["quantization_config"] = quantization_config
    try:
        model, report = auto_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {path} cannot be opened: {error}") from error
    missing = set(report["missing_keys"])
    if auto_class is AutoModelForSequenceClassification:
        missing = {name for name in missing if name.startswith(f"{model.base_model_prefix}.")}
    if missing:
        raise ValueError(
            f"The weights of {path} lack {some(sorted(missing))}: fetch or save it again, or correct its config."
        )
    return model


def stored_fingerprint(path: str) -> str:
    """A hash of every tensor that the model at `path` stores: name, shape, dtype and bytes.

    It does not depend on the dtype or the quantisation in which the model is opened, nor on how it is sharded.
    """
    folder = Path(path)
    if not folder.is_dir():  # a Hub id
        found = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        folder = Path(found or cached_file(path, "model.safetensors.index.json")).parent
    stored = parameters_of_folder(folder)
    digest = hashlib.sha256()
    opened = {file: safe_open(file, framework="pt") for file in {entry.file for entry in stored.values()}}
    for name, entry in sorted(stored.items()):
        digest.update(f"{name} {entry.shape} {entry.dtype}".encode())
        tensor = opened[entry.file].get_tensor(name)
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which a reply ends: the end of turn, as the chat template writes it, and the end of text."""
    ends = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        question = [{"role": "user", "content": "?"}]
        options = {"tokenize": False}
        before = tokenizer.apply_chat_template(question, add_generation_prompt=True, **options)
        whole = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "reply"}], **options)
        if whole.startswith(before):
            after = tokenizer(whole[len(before) :].split("reply", 1)[1], add_special_tokens=False)["input_ids"]
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            ends |= set([token for token in after if token in special][:1])
    return sorted(ends)


def chat_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the chat template writes and plain text does not."""
    turns = [{"role": role, "content": "text"} for role in ("system", "user", "assistant")]
    try:
        chat = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:  # no place for a system prompt
        chat = tokenizer.apply_chat_template(turns[1:], tokenize=False)
    marks = set(tokenizer(chat, add_special_tokens=False)["input_ids"]) & set(tokenizer.all_special_ids)
    return sorted(marks - {tokenizer.bos_token_id, tokenizer.eos_token_id})


def flops_per_token(model: torch.nn.Module) -> float:
    """Two for each weight that a token is multiplied with, forward and back, and two more where it is trained
    (arXiv 2001.08361, section 2.1); attention is not counted."""
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    looked_up = 0 if head is not None and head.weight is embeddings else embeddings.numel()
    weights = model.num_parameters() - looked_up
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p is not embeddings)
    trained += embeddings.numel() if embeddings.requires_grad and not looked_up else 0
    return 4.0 * weights + 2.0 * trained
