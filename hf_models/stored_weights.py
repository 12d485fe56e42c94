"""What a weights file or a model folder holds, learnt before any weight is read: from safetensors' headers, or mapped.

For the loaders of both families: they compare it with the model that is to be built, and refuse what does not fit by
name; transformers would fill what is missing with random numbers and go on.
"""

import argparse
import codecs
import json
import pickle
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

# What names a config's own kind rather than the model that it describes.
KIND_FIELDS = ("architectures", "auto_map", "model_type", "transformers_version")
# What stands at the head of a download that went wrong, and what it then is.
_NO_WEIGHTS = {b"<": "a web page", b"{": "a JSON message", b"version https://git-lfs": "a Git LFS pointer"}

logger = logging.get_logger(__name__)


class StoredParameter(NamedTuple):
    """Where a parameter lies in a safetensors file, and in what form."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path


def read_config_fields(file: Path) -> dict:
    """The object that `config.json` holds; raises FileNotFoundError or ValueError in one sentence."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a local folder that holds a saved model.")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds a {type(fields).__name__} where an object of config fields is expected.")
    return fields


def parameters_of_folder(path: Path) -> dict[str, StoredParameter]:
    """Every parameter in `model.safetensors`, or in the shards that its index names; reads headers only."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no index of shards: {error}.") from error
        files = [path / name for name in sorted(names)]
    elif any(path.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"{path} holds its weights as pytorch_model.bin, a pickle, which can run code and is not opened here. "
            "Open it with transformers where you trust it, and save_pretrained it again as safetensors."
        )
    else:
        raise FileNotFoundError(f"{path} holds no model.safetensors and no model.safetensors.index.json.")

    stored = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{index} names {file.name}, which is not there: the download is incomplete.")
        stored |= parameters_of_file(file)
    return stored


def parameters_of_file(file: Path) -> dict[str, StoredParameter]:
    """Every parameter in one safetensors file; reads its header only."""
    refuse_failed_download(file)
    stored = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                # One element is enough to learn the dtype as torch names it.
                part = tensors.get_slice(name)
                stored[name] = StoredParameter(tuple(part.get_shape()), part[:0].dtype, file)
    except SafetensorError as error:
        raise ValueError(f"{file} is cut short or is no safetensors file ({error}); fetch it again.") from error
    return stored


def tensors_of_torch_file(file: Path) -> dict[str, Tensor]:
    """The state dict that `torch.save` wrote, bare or as "model", mapped rather than read where the format allows it.

    Nothing that the pickle names is run: `weights_only` admits tensors and plain containers, and we the namespace in
    which the official scripts keep their arguments.
    """
    refuse_failed_download(file)
    with file.open("rb") as stream:
        start = stream.read(2)
    try:
        if not start.startswith((b"PK", pickle.PROTO)):
            raise ValueError("neither a zip archive nor a pickle")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=start == b"PK")
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise ValueError(
                f"{file} holds more than weights, and opening it could run code: load it where you trust it, and save "
                'its state dict alone with torch.save({"model": state_dict}, ...).'
            ) from error
        raise ValueError(f"{file} is cut short or is no file of torch.save's; fetch it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is cut short or is no file of torch.save's; fetch it again.") from error

    state = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), dict) else content
    is_state = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not is_state or not state:
        held = f"an object with {some(map(str, content))}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{file} holds {held} where a state dict, bare or as 'model', is expected.")
    if state is not content and "model_ema" in content:
        logger.warning(f"{file} holds averaged weights (model_ema) too; what is opened is 'model'.")
    return state


def refuse_failed_download(file: Path) -> None:
    """Raises ValueError where `file` is a web page, or such, under the name of a weights file."""
    with file.open("rb") as stream:
        head = stream.read(32)
    if b"\0" in head:  # no text: a safetensors file may begin with any byte of its header's length
        return
    for start, what in _NO_WEIGHTS.items():
        if head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(start):
            raise ValueError(f"{file} is {what}, not weights: fetch the file itself.")


def check_parameters(
    path: Path, model: str, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ValueError, naming the first ones, unless `stored` has exactly the names and shapes of `expected`.

    `model` says in words what was expected: "the model of its config".
    """
    missing, unexpected = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unexpected:
        found = [f"lacks {some(missing)}"] if missing else []
        found += [f"holds {some(unexpected)}, which {model} does not have"] if unexpected else []
        raise ValueError(f"{path} {' and '.join(found)}.")
    differing = [
        f"{name} {tuple(stored[name])} instead of {tuple(expected[name])}"
        for name in expected
        if tuple(stored[name]) != tuple(expected[name])
    ]
    if differing:
        raise ValueError(f"{path} differs from {model} in shape: {some(differing)}.")


def common_dtype(path: Path, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype that holds parameters of these `dtypes`, by name, all exactly.

    Raises ValueError, naming the first ones, for integers and 8-bit floats: they mean little without their scales.
    """
    quantised = [
        f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.is_floating_point or dtype.itemsize < 2
    ]
    if quantised:
        raise ValueError(
            f"{path} holds quantised weights, {some(quantised)}; open the model in full precision and save that first."
        )
    return reduce(torch.promote_types, dtypes.values())


def some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
