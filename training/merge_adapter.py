"""Merges an adapter into its base: a model folder that opens anywhere, without PEFT.

    python -m training.merge_adapter --adapter runs/quickstart/chat_adapter --output_dir runs/quickstart/chat

The sum is computed in float32 on the base in full precision, also where the adapter was trained on 4-bit weights, and
stored in the base's dtype. How far the merged model's logits are from those of base and adapter is measured, and for an
adapter of a 4-bit base, how far they are from that base with it. The folder's `run.json` is the adapter's own and
has these figures in a section `merged`; the card is written from it.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from hub_cards.build_card import build_card

from .adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_run, base_of, is_adapter_folder, open_for_inference
from .base_model import read_run
from .command_line import parse_arguments, plain_errors
from .language_models import DTYPES, load_config
from .quantization import QuantizationArguments, quantization_config
from .recorded_outputs import recorded_outputs
from .run_record import FILE_NAME, portable

# Of the token sequences on which merged and unmerged models are compared.
SEQUENCES, LENGTH, SEED = 4, 64, 0


@dataclass
class MergeArguments:
    adapter: str = field(metadata={"help": "Folder of the adapter: a run's, or one of its checkpoints."})
    output_dir: str = field(metadata={"help": "Folder to write the merged model into."})
    base: str | None = field(
        default=None, metadata={"help": "Folder of the adapter's base, where it is not where the adapter says."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": f"Of the stored weights: {', '.join(DTYPES)}; by default the base's."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the base."})

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"--dtype is {self.dtype!r}: take one of {', '.join(DTYPES)}.")


def merge(arguments: MergeArguments) -> Path:
    """Writes `output_dir`, whole or not at all, and returns it; a folder that holds this very merge is left as it is.

    Raises ValueError, in one sentence: no adapter, no base or another one, or an output folder in use.
    """
    adapter, output_dir = Path(arguments.adapter), Path(arguments.output_dir)
    if not is_adapter_folder(adapter):
        raise ValueError(f"--adapter {adapter} holds no {CONFIG_FILE}: give the folder of a run with --use_peft true.")
    base = base_of(adapter, arguments.base, arguments.trust_remote_code)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else load_config(base).dtype or torch.float32
    identity = {
        "adapter": _portable(adapter),
        "adapter_fingerprint": _file_fingerprint(adapter / WEIGHTS_FILE),
        "base": _portable(base),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if _holds_merge(output_dir, identity):
        print(f"{output_dir} holds this merge: only its card is written anew.")
        return output_dir

    options = {"dtype": torch.float32, "base": base, "trust_remote_code": arguments.trust_remote_code}
    model, tokenizer = open_for_inference(adapter, **options)
    run = adapter_run(adapter)
    merged, differences = _merged(model, dtype)
    run["merged"] = identity | differences
    if run.get("arguments", {}).get("load_in_4bit"):
        run["merged"] |= _difference_to_quantized(adapter, merged, run["arguments"], options)
    run["model"] = run.get("model", {}) | {"config": merged.config.to_dict()}

    # Moved to its place when it is whole: a merge that was killed leaves nothing under the folder's name.
    staged = output_dir.with_name(f"{output_dir.name}_partial")
    shutil.rmtree(staged, ignore_errors=True)
    merged.to(dtype).save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    run["outputs"] = recorded_outputs(staged)
    (staged / FILE_NAME).write_text(json.dumps(run, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, output_dir)
    return output_dir


def _holds_merge(output_dir: Path, identity: dict[str, str]) -> bool:
    """Whether the folder holds this merge, finished; ValueError where it holds anything else."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    found = (read_run(str(output_dir)) or {}).get("merged", {})
    differing = [name for name, value in identity.items() if found.get(name) != value]
    if differing:
        what = f"a merge of another {differing[0]}" if found else "files of something else"
        raise ValueError(f"{output_dir} holds {what}: choose another --output_dir, or delete this one.")
    return True


def _merged(model: PeftModel, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, float]]:
    """The merged model in float32, rounded to `dtype`, and how far its logits are from those of base and adapter."""
    inputs = comparison_inputs(model)
    separate = _logits(model, inputs)
    merged = model.merge_and_unload()
    merged.config.use_cache = True  # training switches it off, and the merged model is there to generate
    differences = {
        "compared_tokens": inputs.numel(),
        "largest_logit": float(separate.abs().max()),
        "max_logit_difference": _largest_difference(_logits(merged, inputs), separate),
    }
    if dtype != torch.float32:
        for parameter in merged.parameters():  # and not what is computed anew at loading, such as rotary frequencies
            parameter.data = parameter.data.to(dtype).float()
        differences["max_logit_difference_as_stored"] = _largest_difference(_logits(merged, inputs), separate)
    return merged, differences


def _difference_to_quantized(
    adapter: Path, merged: PreTrainedModel, arguments: dict[str, Any], options: dict[str, Any]
) -> dict[str, float]:
    """How far the merged model's logits are from those of the 4-bit base, on which the adapter was trained, with it."""
    asked = {field.name: arguments[field.name] for field in fields(QuantizationArguments) if field.name in arguments}
    quantization = quantization_config(QuantizationArguments(**asked))
    quantized, _ = open_for_inference(adapter, quantization_config=quantization, **options)
    inputs = comparison_inputs(merged)
    difference = (_logits(merged, inputs) - _logits(quantized, inputs)).abs()
    return {
        "mean_logit_difference_to_quantized": float(difference.mean()),
        "max_logit_difference_to_quantized": float(difference.max()),
    }


def comparison_inputs(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Token ids `(sequences, length)`, drawn evenly from the model's vocabulary, always the same."""
    length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH))
    generator = torch.Generator().manual_seed(SEED)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)


@torch.no_grad()
def _logits(model: PreTrainedModel | PeftModel, inputs: torch.Tensor) -> torch.Tensor:
    inputs = inputs.to(model.device)
    return model.eval()(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.float().cpu()


def _largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def _portable(path: str | Path) -> str:
    return portable(str(path), "path")


def _file_fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def main() -> None:
    with plain_errors():
        arguments, _ = parse_arguments(MergeArguments, description=__doc__)
        folder = merge(arguments)
        run = read_run(str(folder))
        if "task" in run:  # what an adapter without a run was trained on, nobody recorded
            build_card(folder)
    difference, largest = run["merged"]["max_logit_difference"], run["merged"]["largest_logit"]
    print(f"{folder}: logits differ from base and adapter by at most {difference:.2g}, of up to {largest:.2g}")


if __name__ == "__main__":
    main()
