"""Rewrites a model folder in another layout.

    python -m hf_models.convert SRC DST --to transformers    # ours -> native: opens without trust_remote_code
    python -m hf_models.convert SRC DST --to hf_models       # native -> ours: with the code beside the weights

SRC's kind is read from its `config.json`. Tokenizer and generation files come along unchanged. DST appears whole or not
at all.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from .llama_style.checkpoints import ARCHITECTURES, load_checkpoint, save_checkpoint

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

    Raises FileExistsError where `destination` holds something, and what `load_checkpoint` and `save_checkpoint` raise.
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and is not an empty folder: name another one.")
    model = load_checkpoint(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{destination.name}.", dir=destination.parent) as scratch:
        whole = Path(scratch) / "whole"  # with the permissions of a folder of the user's, which `scratch` has not
        save_checkpoint(model, whole, layout)
        for name in COMPANIONS:
            if (source / name).is_dir():
                shutil.copytree(source / name, whole / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, whole / name)
        os.replace(whole, destination)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_models.convert", description="Rewrites a model folder in another layout."
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write: new, or empty")
    parser.add_argument("--to", required=True, choices=ARCHITECTURES, help="layout to write")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.destination, arguments.to)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
