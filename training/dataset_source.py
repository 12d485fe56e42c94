"""Where the name that `--dataset` gives leads: a sample, a local file or folder, or the Hub; in this order."""

import json
import re
from pathlib import Path
from typing import Any

import datasets

SAMPLE_DATA = Path(__file__).parent / "sample_data"


def local_path(dataset: str, modality: str | None, suffixes: set[str]) -> Path | None:
    """The file or folder that is meant, None for a Hub id.

    Args:
        modality: what the caller reads, "text", "image" or "chat", as the samples' `info.json` says it; None for all.
        suffixes: endings of files by which a missing file is told from a Hub id.

    Raises:
        FileNotFoundError: a path at which nothing is.
        ValueError: a sample of another modality.
    """
    samples = sample_names(modality)
    if dataset in samples:
        return SAMPLE_DATA / dataset
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if (SAMPLE_DATA / dataset / "info.json").exists():
        other = sample_info(SAMPLE_DATA / dataset)["modality"]
        raise ValueError(f"The sample {dataset!r} is of {other}, not {modality}: take {', '.join(samples)}.")
    if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", dataset) and not set(path.suffixes) & suffixes:
        return None
    raise FileNotFoundError(
        f"There is no file or folder {dataset!r}: give an existing path, a sample ({', '.join(samples)}) or a Hub id."
    )


def sample_names(modality: str | None) -> list[str]:
    folders = sorted(file.parent for file in SAMPLE_DATA.glob("*/info.json"))
    return [folder.name for folder in folders if modality in (None, sample_info(folder)["modality"])]


def sample_info(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "info.json").read_text(encoding="utf-8"))


def describe_source(local: Path | None) -> dict[str, Any]:
    """What a run records of a place that `local_path` gave: the `info` that lies in it, or that it was the Hub.

    Samples have an `info.json`, and so have the data that our commands make; a file of that name may be another's.
    """
    if local is None:
        return {"source": "hub"}
    try:
        info = sample_info(local)
    except (OSError, ValueError):
        return {}
    return {"info": info} if isinstance(info, dict) and {"name", "modality"} <= info.keys() else {}


def load_from_hub(
    dataset: str, split: str, config: str | None, streaming: bool, modality: str | None
) -> datasets.Dataset | datasets.IterableDataset:
    try:
        return datasets.load_dataset(dataset, config, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        hub = "the Hub is not asked because HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else str(error)
        raise FileNotFoundError(
            f"There is no sample or local file {dataset!r}, and as a Hub data set it cannot be read: {hub}. "
            f"Samples: {', '.join(sample_names(modality))}."
        ) from error


def asked_splits(path: Path, split: str, found: dict[str, Any]) -> list[str]:
    """The names in `split`, such as "train" and "test" in "train[:95%]+test"; ValueError for one not in `found`."""
    asked = [name.split("[")[0].strip() for name in split.split("+")]
    for name in asked:
        if name not in found:
            splits = ", ".join(map(repr, found))
            only = "is a single file and has only the split 'train'" if path.is_file() else f"has the splits {splits}"
            raise ValueError(
                f"{path} {only}, not {name!r}: name one of those, or slices of it, such as train[:95%] and train[95%:]."
            )
    return asked


def refuse_sliced_stream(split: str) -> None:
    if "[" in split:
        raise ValueError(f"The split {split!r} is a slice, which a stream cannot give: name a whole split.")
