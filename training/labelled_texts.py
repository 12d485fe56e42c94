"""Texts with a label each, from the data sets that all commands read, or from a folder with one file a label."""

from functools import partial
from pathlib import Path

import datasets

from .dataset_source import load_from_hub, local_path
from .text_data import SUFFIXES, check_text_file, load_local_files, load_text_dataset


def load_labelled_texts(
    dataset: str, split: str, text_column: str, label_column: str, config: str | None = None
) -> datasets.Dataset:
    """One row a document, in the columns "text" and "label", both strings.

    A folder of .txt files is read as one file a label, `en.txt`, `fr.txt`, each with a document a paragraph; anything
    else has a column for either.

    Raises:
        FileNotFoundError: nothing of that name, here or (unless HF_HUB_OFFLINE is set) on the Hub.
        ValueError: data that cannot be used: empty, not UTF-8, no such split or column, no strings in it.
    """
    local = local_path(dataset, "text", SUFFIXES)
    if local is None:
        rows = load_from_hub(dataset, split, config, streaming=False, modality="text")
    elif local.is_dir() and (files := sorted(local.glob("*.txt"))):
        return datasets.concatenate_datasets([_one_label(file, split) for file in files])
    else:
        check_file = partial(check_text_file, text_column=text_column)
        rows = load_local_files(local, split, config, check_file, kinds=("parquet", "json"))
    return _two_columns(rows, f"{dataset} ({split})", text_column, label_column)


def _one_label(file: Path, split: str) -> datasets.Dataset:
    texts = load_text_dataset(str(file), split)
    return texts.add_column("label", [file.stem] * len(texts))


def _two_columns(rows: datasets.Dataset, name: str, text_column: str, label_column: str) -> datasets.Dataset:
    for field, column in (("text_column", text_column), ("label_column", label_column)):
        if column not in rows.column_names:
            raise ValueError(
                f"{name} has no column {column!r}, only {', '.join(rows.column_names)}: set --{field} to one of those."
            )
        if missing := rows.data.column(column).null_count:
            raise ValueError(f"The column {column!r} of {name} has no value in {missing} rows: remove those.")
    rows = rows.select_columns([text_column, label_column]).rename_columns(
        {old: new for old, new in ((text_column, "text"), (label_column, "label")) if old != new}
    )
    for column, kind in rows.features.items():
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"What {name} has as {column} is {kind} where strings are expected: name another column.")
    return rows
