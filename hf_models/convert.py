"""Rewrites a model folder in another layout.

    python -m hf_models.convert SRC DST --to transformers    # ours -> native: opens without trust_remote_code
    python -m hf_models.convert SRC DST --to hf_models       # native -> ours: with the code beside the weights

SRC's kind is read from its `config.json`. Tokenizer and generation files come along unchanged. DST appears whole or not
at all.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from .llama_style import checkpoints as llama_style

# The module that reads and writes a `model_type`, and the layouts that it writes.
CHECKPOINTS_OF_MODEL_TYPE = dict.fromkeys(llama_style.LAYOUT_OF_MODEL_TYPE, llama_style)
LAYOUTS = list(llama_style.ARCHITECTURES)

# What belongs to a model beside its config and weights, whoever saved it.
COMPANIONS = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)


def convert(source: Path, destination: Path, layout: str) -> None:
    """Writes the model folder `source` to `destination` in `layout`.

    Raises FileExistsError where `destination` holds something, ValueError for a kind of model that is not known here,
    and what the family's `load_checkpoint` and `save_checkpoint` raise.
    """
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and is not an empty folder: name another one.")
    config = source / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist: give a local folder that holds a saved model.")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{config} is not valid JSON: {error}.") from error
    if model_type not in CHECKPOINTS_OF_MODEL_TYPE:
        known = ", ".join(CHECKPOINTS_OF_MODEL_TYPE)
        raise ValueError(f"{config} has model_type {model_type!r}; what can be converted is {known}.")
    checkpoints = CHECKPOINTS_OF_MODEL_TYPE[model_type]

    model = checkpoints.load_checkpoint(source)
    partial = destination.with_name(destination.name + ".partial")
    try:
        checkpoints.save_checkpoint(model, partial, layout)
        for name in COMPANIONS:
            if (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.replace(destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_models.convert", description="Rewrites a model folder in another layout."
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write: new, or empty")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.destination, arguments.to)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
