"""Reads the token shards that `training.text_pipeline` writes: documents as ids, with the tokenizer that made them.

Such a folder has an `info.json` of modality "tokens", and one split, "train". Its documents are of one column,
`input_ids`, without bos and eos; `training.packing` puts those around them.
"""

from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from .dataset_source import describe_source, sample_info


def is_token_data(dataset: str) -> bool:
    info = describe_source(Path(dataset).expanduser()).get("info", {})
    return info.get("modality") == "tokens"


def load_token_dataset(
    folder: str, split: str, tokenizer: str, fingerprint: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """One row a document, in one column `input_ids`, in the order of the shards.

    Args:
        tokenizer, fingerprint: name and fingerprint (`language_models.tokenizer_fingerprint`) of the one in use.

    Raises ValueError, in one sentence: another tokenizer, another split than "train", missing or broken shards.
    """
    info = sample_info(Path(folder).expanduser())
    made_with = info["tokenizer"]
    if made_with["fingerprint"] != fingerprint:
        raise ValueError(
            f"{folder} holds tokens of the tokenizer {made_with['name']} ({made_with['fingerprint']}), and {tokenizer} "
            f"is another one ({fingerprint}): give --tokenizer {made_with['name']}, or mix the texts anew."
        )
    if split != "train":
        raise ValueError(f"{folder} holds tokens and only the split 'train', not {split!r}: leave --dataset_split out.")
    files = sorted(Path(folder).expanduser().glob(f"train-*-of-{info['shards']:05d}.parquet"))
    if len(files) != info["shards"]:
        raise ValueError(
            f"{folder} has {len(files)} of {info['shards']} shards: run `python -m training.prepare_text` to its end."
        )
    documents = sum(pq.read_metadata(file).num_rows for file in files)
    if documents != info["documents"]:
        raise ValueError(
            f"The shards in {folder} hold {documents} documents, and its info.json says {info['documents']}: mix anew."
        )
    names = list(map(str, files))
    return datasets.load_dataset(
        "parquet", data_files={"train": names}, split="train", streaming=streaming, columns=["input_ids"]
    )


def describe_tokens(folder: str, streaming: bool) -> dict[str, Any]:
    """What a run records of them, from their `info.json`: the fingerprint is of all tokens and their order."""
    info = sample_info(Path(folder).expanduser())
    counts = {name: {key: entry[key] for key in ("tokens", "documents")} for name, entry in info["sources"].items()}
    description = {
        "dataset": folder,
        "split": "train",
        "fingerprint": info["fingerprint"],
        "documents": info["documents"],
        "tokens": info["tokens"],
        "sources": counts,
        "info": {key: info[key] for key in ("name", "modality", "license", "language", "attribution") if key in info},
    }
    return description | ({"streaming": True} if streaming else {})
