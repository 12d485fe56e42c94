"""Rewrites a model in another layout.

    python -m hf_models.convert SRC DST --to transformers      # ours, timm, official -> native: no trust_remote_code
    python -m hf_models.convert SRC DST --to hf_models         # any -> ours: with the code beside the weights
    python -m hf_models.convert SRC DST.gguf --to gguf         # a language model for llama.cpp
    python -m hf_models.convert SRC DST --to timm              # a ConvNeXt for timm.create_model("local-dir:DST")
    python -m hf_models.convert SRC DST.pt --to official       # a ConvNeXt as the paper's repository reads it
    python -m hf_models.convert SRC DST.pth --to official_sparse   # an FCMAE as its pretraining code saves it
    python -m hf_models.convert SRC DST --to onnx              # a ConvNeXt for ONNX Runtime: there is no way back
    python -m hf_models.convert SRC DST.pt2 --to torch_export  # for torch.export.load: there is no way back

SRC's kind is read from its `config.json`, or from the names in it where it is a single file. Tokenizer, generation and
image preprocessing files come along; of the single files only GGUF holds a tokenizer, which is written into it but not
read back. DST appears whole or not at all.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from .convnextv2_fcmae import checkpoints as convnextv2_fcmae
from .convnextv2_fcmae.timm_folder import carry_preprocessing
from .llama_style import checkpoints as llama_style
from .stored_weights import read_config_fields

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
LAYOUTS = tuple(
    dict.fromkeys(layout for family in (llama_style, convnextv2_fcmae) for layout in (*family.LAYOUTS, *family.EXPORTS))
)
# Of files that hold a graph to run, from which no model is made again.
GRAPH_SUFFIXES = (".onnx", ".pt2")
OUTTYPES = ("f32", "f16", "q8_0")


def convert(source: Path, destination: Path, layout: str, outtype: str | None = None) -> None:
    """Writes the model `source`, a folder or a weights file, to `destination` in `layout`.

    `outtype` is what the matrices become in a GGUF file. Raises FileExistsError where `destination` holds something,
    and what `load_checkpoint` and `save_checkpoint` raise.
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists and is not an empty folder: name another one.")
    family = _family(source)
    if layout not in (known := (*family.LAYOUTS, *family.EXPORTS)):
        kind = "language model" if family is llama_style else "ConvNeXt"
        raise ValueError(f"{source} is a {kind}, which has no layout {layout!r}: choose one of {', '.join(known)}.")
    options = {}
    if layout == "gguf":
        options = {"outtype": outtype, "metadata": _gguf_metadata(source, destination)}
    model = family.load_checkpoint(source)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{destination.name}.", dir=destination.parent) as scratch:
        # Inside, it has the permissions of a file of the user's, which `scratch` has not.
        whole = Path(scratch) / destination.name
        family.save_checkpoint(model, whole, layout, **options)
        if source.suffix == ".gguf":
            print(f"note: the tokenizer in {source} stays there: copy the one of the original folder.", file=sys.stderr)
        if whole.is_dir():
            _carry_companions(source, whole)
            if family is convnextv2_fcmae and (note := carry_preprocessing(source, whole)):
                print(f"note: {note}", file=sys.stderr)
        if destination.is_dir() and whole.is_file():
            destination.rmdir()  # empty, and in the way of a file
        os.replace(whole, destination)


def _family(source: Path) -> ModuleType:
    """The `checkpoints` of the family that `source` is of."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: give a local model folder or a weights file.")
    held = [source] if source.is_file() else [*source.iterdir()]
    graphs = [file for file in held if file.suffix in GRAPH_SUFFIXES]
    if graphs and not any(file.suffix == ".safetensors" for file in held):
        raise ValueError(f"{graphs[0]} is a graph to run, and no model can be made of it: give what it was made from.")
    if source.is_file():
        return llama_style if source.suffix == ".gguf" else convnextv2_fcmae
    file = source / "config.json"
    fields = read_config_fields(file)
    for family in (llama_style, convnextv2_fcmae):
        if fields.get("model_type") in family.LAYOUT_OF_MODEL_TYPE:
            return family
    if "architecture" in fields:  # timm's
        return convnextv2_fcmae
    known = ", ".join((*llama_style.LAYOUT_OF_MODEL_TYPE, *convnextv2_fcmae.LAYOUT_OF_MODEL_TYPE))
    raise ValueError(
        f"{file} has model_type {fields.get('model_type')!r}; known are {known}, and timm's ConvNeXts by architecture."
    )


def _gguf_metadata(source: Path, destination: Path) -> dict[str, Any]:
    """The tokenizer and the like, refused where they cannot be written before any weight is read."""
    if source.is_file():
        raise ValueError(f"{source} is GGUF already: convert the folder that it was made of, which has the tokenizer.")
    gguf_file = llama_style.gguf_module("gguf_file")
    gguf_file.refuse_other_suffixes(destination)
    return gguf_file.folder_metadata(source)


def _carry_companions(source: Path, whole: Path) -> None:
    for name in COMPANIONS:
        if (source / name).is_dir():
            shutil.copytree(source / name, whole / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, whole / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_models.convert", description="Rewrites a model in another layout."
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="folder with config.json and safetensors, or one file")
    parser.add_argument("destination", metavar="DST", type=Path, help="folder to write (new, or empty), or file (new)")
    parser.add_argument(
        "--to", required=True, choices=LAYOUTS, help="layout to write; onnx and torch_export cannot be SRC again"
    )
    parser.add_argument(
        "--outtype", choices=OUTTYPES, help="of gguf: what the matrices become (default: f32 if they are, else f16)"
    )
    arguments = parser.parse_args()
    if arguments.outtype and arguments.to != "gguf":
        parser.error("--outtype is of --to gguf only: the other layouts keep the dtype")
    try:
        convert(arguments.source, arguments.destination, arguments.to, arguments.outtype)
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
