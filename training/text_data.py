"""The one way in which text is read: a sample, local files or the Hub, checked, and reduced to one column "text".

`--dataset` is, in this order: the name of a folder of `training/sample_data`, a local file or folder, a Hub id. What
is wrong with local data is said before any work is spent on it: text files are read through once for bytes that are
not UTF-8, JSON lines are parsed once (a small part of the time that tokenising them takes), and parquet files are
judged by their footers. Data from the Hub, and what a JSON array holds, is judged by its columns after loading.
"""

import codecs
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from .dataset_source import asked_splits, describe_source, load_from_hub, local_path, refuse_sliced_stream

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SUFFIXES = {*KINDS, ".gz"}
CHUNK = 1 << 20  # bytes


@dataclass
class TextDataArguments:
    dataset: str = field(
        default="wikipedia_leads",
        metadata={
            "help": "Text to read: a sample's name, a local file or folder (parquet, jsonl, json, txt; also .gz), or a "
            "Hub id. In a .txt file, every paragraph between blank lines is a document."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several, such as a language."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; slices: train[:95%%]."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents."})
    streaming: bool = field(
        default=False, metadata={"help": "Read while training instead of preparing everything on disk first."}
    )


def load_text_dataset(
    dataset: str, split: str, text_column: str = "text", config: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """One row a document, in one column "text".

    A row of parquet or JSON is a document. A .txt file holds one document per paragraph, separated by blank lines (as
    CC-100 and BERT's corpora do); texts that need their blank lines, such as books, go into a jsonl file, one a line.
    A folder is split by file names (`train*.parquet`, `test*.parquet`); without such names, and for a single file,
    everything is the split "train". Of a folder with files of several kinds, the most frequent kind is read.
    `split` may be a slice, such as "train[:95%]", unless streaming.

    Raises:
        FileNotFoundError: nothing of that name, here or (unless HF_HUB_OFFLINE is set) on the Hub.
        ValueError: data that cannot be used: empty, binary, not UTF-8, no such split or column, no strings in it.
    """
    local = local_path(dataset, "text", SUFFIXES)
    if streaming:
        refuse_sliced_stream(split)
    if local is None:
        texts = load_from_hub(dataset, split, config, streaming, "text")
    else:
        check_file = partial(check_text_file, text_column=text_column)
        texts = load_local_files(local, split, config, check_file, streaming=streaming)
    return _text_column_only(texts, f"{dataset} ({split})", text_column)


def iterate_texts(texts: datasets.Dataset | datasets.IterableDataset, max_bytes: int | None = None) -> Iterator[str]:
    """The documents as strings, up to and including the one that reaches `max_bytes` of UTF-8."""
    read = 0
    for batch in texts.iter(batch_size=1000):
        for text in batch["text"]:
            yield text
            read += len(text.encode())
            if max_bytes is not None and read >= max_bytes:
                return


def describe_texts(texts: datasets.Dataset | datasets.IterableDataset, dataset: str, split: str) -> dict[str, Any]:
    """What a run records of its data. `bytes` are of UTF-8; the fingerprint is a hash of all documents, in order.

    A stream has neither size nor end: its fingerprint is that of its first 100 documents. A sample brings its `info`:
    name, licence, origin, languages.
    """
    streaming = isinstance(texts, datasets.IterableDataset)
    digest, documents, size = hashlib.sha256(), 0, 0
    for text in iterate_texts(texts.take(100) if streaming else texts):
        document = text.encode()
        digest.update(len(document).to_bytes(8, "little") + document)
        documents += 1
        size += len(document)
    description = {"dataset": dataset, "split": split, "fingerprint": digest.hexdigest()[:16]}
    description |= describe_source(local_path(dataset, "text", SUFFIXES))
    return description | ({"streaming": True} if streaming else {"documents": documents, "bytes": size})


def load_local_files(
    path: Path,
    split: str,
    config: str | None,
    check_file: Callable[[Path, str], None],
    kinds: tuple[str, ...] = ("parquet", "json", "text"),
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of a file, or of a folder's files of one kind, with all of their columns.

    Args:
        check_file: raises ValueError for what is wrong with a file of this kind, before anything is read of the others.
        kinds: those that can be read, of the values of `KINDS`.
    """
    kind, found = find_local_files(path, split, check_file, config, kinds)
    data_files = {name: list(map(str, files)) for name, files in found.items()}
    options = {"sample_by": "paragraph", "encoding": "utf-8-sig"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=data_files, split=split, streaming=streaming, **options)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error.__cause__ or error}.") from error


def find_local_files(
    path: Path,
    split: str,
    check_file: Callable[[Path, str], None],
    config: str | None = None,
    kinds: tuple[str, ...] = ("parquet", "json", "text"),
) -> tuple[str, dict[str, list[Path]]]:
    """The kind of the files in the asked splits, and those files; arguments as for `load_local_files`."""
    by_split = files_by_split(path, config)
    asked = asked_splits(path, split, by_split)
    files = [file for name in asked for file in by_split[name]]
    found = {_kind(file) for file in files}
    if len(found) != 1 or not found <= set(kinds):
        suffixes = [suffix for suffix, kind in KINDS.items() if kind in kinds]
        raise ValueError(
            f"{path} is no text data of one kind ({', '.join(sorted({''.join(file.suffixes) for file in files}))}): "
            f"give {', '.join(suffixes[:-1])} or {suffixes[-1]} files."
        )
    kind = found.pop()
    for file in files:
        check_file(file, kind)
    return kind, {name: by_split[name] for name in asked}


def files_by_split(path: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of each split, by their names; a single file is the split "train"."""
    if path.is_file():
        return {"train": [path.absolute()]}
    try:
        builder = datasets.load_dataset_builder(str(path), config)
    except FileNotFoundError as error:  # datasets.exceptions.EmptyDatasetError, DataFilesNotFoundError
        raise FileNotFoundError(
            f"{path} holds no data files: put .parquet, .jsonl, .json or .txt files there."
        ) from error
    return {str(split): [Path(file) for file in files] for split, files in builder.config.data_files.items()}


def _kind(file: Path) -> str | None:
    return KINDS.get(file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix)


def open_bytes(file: Path):
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def check_text_file(file: Path, kind: str, text_column: str) -> None:
    """Raises ValueError, in one sentence, where a local file of this kind holds no texts in `text_column`."""
    if kind == "parquet":
        _check_parquet(file, text_column)
        return
    check_utf8(file)
    if kind == "json":
        _check_json_lines(file, text_column)


def parquet_footer(file: Path) -> pyarrow.parquet.FileMetaData:
    try:
        return pyarrow.parquet.read_metadata(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a parquet file ({error}): write it again or name another.") from error


def _check_parquet(file: Path, text_column: str) -> None:
    """Raises where a parquet file's footer shows no rows, no `text_column`, or one that is no column of strings."""
    footer = parquet_footer(file)
    schema = footer.schema.to_arrow_schema()
    if footer.num_rows == 0:
        raise ValueError(f"{file} has no rows: give data with at least one document.")
    if text_column not in schema.names:
        raise ValueError(
            f"{file} has no column {text_column!r}, only {', '.join(schema.names)}: set --text_column to one of those."
        )
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"The column {text_column!r} of {file} holds {kind} where strings are expected.")


def check_utf8(file: Path) -> None:
    """Raises where a text file is empty, binary or not UTF-8, naming the place. Reads it once, in chunks."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, lines, blank = 0, 1, True
    with open_bytes(file) as stream:
        while chunk := stream.read(CHUNK):
            if (position := chunk.find(0)) >= 0:
                raise ValueError(
                    f"{file} is binary: byte {offset + position} is NUL. Give text in UTF-8 "
                    f"(UTF-16 becomes UTF-8 with `iconv -f UTF-16 -t UTF-8`)."
                )
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                _refuse_encoding(file, offset - pending + error.start, lines + chunk.count(b"\n", 0, error.start))
            blank = blank and chunk.isspace()
            offset += len(chunk)
            lines += chunk.count(b"\n")
    if decoder.getstate()[0]:
        _refuse_encoding(file, offset - len(decoder.getstate()[0]), lines)
    if blank:
        found = "is empty (0 bytes)" if offset == 0 else f"holds nothing but white space ({offset} bytes)"
        raise ValueError(f"{file} {found}: give a file with text.")


def _refuse_encoding(file: Path, offset: int, line: int) -> None:
    raise ValueError(
        f"{file} is not UTF-8 at line {line}, byte {offset}: convert it, for example with "
        f"`iconv -f WINDOWS-1252 -t UTF-8 {file.name}`."
    )


def json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line but blank ones; nothing for a file that is one JSON array.

    Raises ValueError at the first line that is no JSON object.
    """
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            line = line.strip()
            if not line:
                continue
            if number == 1 and line.startswith(b"["):
                return  # One JSON array over all lines.
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}, line {number} is not JSON ({error.msg} at column {error.colno}): mend or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} is no JSON object: expected {{...}} on each line.")
            yield number, row


def _check_json_lines(file: Path, text_column: str) -> None:
    """Raises at the first line of a JSON-lines file that is no object with a string in `text_column`."""
    for number, row in json_lines(file):
        if text_column not in row:
            raise ValueError(
                f"{file}, line {number} has no field {text_column!r}, only {', '.join(row)}: set --text_column to one "
                "of those, or mend the line."
            )
        if not isinstance(row[text_column], str):
            raise ValueError(
                f"{file}, line {number} has {json.dumps(row[text_column])[:40]} in the field {text_column!r} where a "
                "string is expected: mend or remove the line."
            )


def _text_column_only(
    texts: datasets.Dataset | datasets.IterableDataset, name: str, text_column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """`texts` with its `text_column` as the only column "text", refused where that holds anything but strings."""
    first = next(iter(texts), None)
    if first is None:
        raise ValueError(f"{name} has no rows: give data with at least one document.")
    if text_column not in first:
        raise ValueError(f"{name} has no column {text_column!r}, only {', '.join(first)}: set --text_column to one.")
    streamed = isinstance(texts, datasets.IterableDataset)
    if not streamed:
        kind = texts.features[text_column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"The column {text_column!r} of {name} holds {kind} where strings are expected.")
        if missing := texts.data.column(text_column).null_count:
            raise ValueError(f"The column {text_column!r} of {name} has no value in {missing} rows: remove those.")
    elif not isinstance(first[text_column], str):
        found = type(first[text_column]).__name__
        raise ValueError(f"The column {text_column!r} of {name} holds a {found} where a string is expected.")
    texts = texts.select_columns([text_column])
    texts = texts if text_column == "text" else texts.rename_column(text_column, "text")
    # A stream does not know its columns until it is told.
    return texts.cast(datasets.Features({"text": datasets.Value("string")})) if streamed else texts
