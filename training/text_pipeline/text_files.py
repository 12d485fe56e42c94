"""Reads what holds text already: JSON lines, parquet, plain text, and data sets from the Hub.

A line may be of any length: one above the limit is skipped in pieces. What is wrong with a line or a row is counted,
with its offset in the content of the file (of a parquet file, the number of the row), and the next one is read.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from .stage import RAW
from .tally import Tally

CHUNK = 1 << 20  # bytes
ZSTD_CHUNK = 1 << 13  # so much of the content may be lost at the end of a truncated file
ROWS = 256  # of a parquet file, held in memory at a time
BOM = b"\xef\xbb\xbf"
TOO_LARGE = "record above max_record_bytes"
DATE_FIELDS = ("date", "timestamp", "crawl_date")
# Fields of a row that stay what they are; those of the others that a later stage writes are kept as `source_NAME`.
STRING_FIELDS = ("url", "date", "title", "language")
STAGE_FIELDS = {RAW, "charset", "file", "offset", "language_hint", "language_score", "perplexity", "bucket"} | {
    "reference_score"
}


class DamagedFile(Exception):
    """The content of a file ends at `offset`, before it should; what came before has been read."""

    def __init__(self, offset: int, reason: str):
        super().__init__(offset, reason)
        self.offset = offset
        self.reason = reason


def read_json_lines(path: Path, name: str, text_column: str, max_record_bytes: int, tally: Tally) -> Iterator[Document]:
    """One document a line; also a file that is one JSON array of objects, no larger than a record may be."""
    for offset, line in lines(path, max_record_bytes):
        if offset == 0 and line is not None:
            line = line.removeprefix(BOM)
            if line.lstrip().startswith(b"["):
                yield from read_json_array(path, name, text_column, max_record_bytes, tally)
                return
        if line is None:
            row = TOO_LARGE
        elif not line or line.isspace():
            continue
        else:
            row = parse_json(line)
        yield from row_document(row, name, offset, text_column, tally)


def read_json_array(path: Path, name: str, text_column: str, max_record_bytes: int, tally: Tally) -> Iterator[Document]:
    content = bytearray()
    for piece in pieces(path):
        content += piece
        if len(content) > max_record_bytes:
            tally.bad(name, 0, TOO_LARGE)
            return
    rows = parse_json(bytes(content).removeprefix(BOM))
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        yield from row_document(row, name, number, text_column, tally)


def read_text(path: Path, name: str, max_record_bytes: int, tally: Tally) -> Iterator[Document]:
    """One document a paragraph; a blank line ends it, as `training.text_data` has it."""
    for start, paragraph in paragraphs(path, max_record_bytes):
        if paragraph is None:
            problem = TOO_LARGE
        elif b"\0" in paragraph:
            problem = "NUL bytes"
        else:
            problem = None if is_utf8(paragraph) else "not UTF-8"
        if problem:
            tally.bad(name, start, problem)
        else:
            yield Document(text=paragraph.decode("utf-8"), id=f"{name}/{start}", metadata={"file": name})


def paragraphs(path: Path, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, paragraph), None for one above the limit: of that, nothing is kept in memory."""
    start, parts, size = 0, [], 0
    for offset, line in lines(path, max_bytes):
        if line is not None:
            line = (line.removeprefix(BOM) if offset == 0 else line).removesuffix(b"\r")
        if line is not None and (not line or line.isspace()):
            if size:
                yield start, (b"\n".join(parts) if size <= max_bytes else None)
            parts, size = [], 0
            continue
        start = start if size else offset
        size += max_bytes + 1 if line is None else len(line) + 1
        if size <= max_bytes:
            parts.append(line)
        else:
            parts.clear()
    if size:
        yield start, (b"\n".join(parts) if size <= max_bytes else None)


def read_parquet(path: Path, name: str, text_column: str, tally: Tally) -> Iterator[Document]:
    """One document a row. A row group that cannot be read is one bad record, at its first row."""
    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError):
        tally.bad(name, 0, "damaged parquet")
        return
    with table:
        first = 0
        for group in range(table.num_row_groups):
            number = first
            try:
                for batch in table.iter_batches(ROWS, row_groups=[group]):
                    for row in batch_rows(batch):
                        yield from row_document(row, name, number, text_column, tally)
                        number += 1
            except (pa.ArrowException, OSError):
                tally.bad(name, number, "damaged parquet")
            first += table.metadata.row_group(group).num_rows


def batch_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """The rows; in place of one with a string that is not UTF-8, which parquet does not check, that it is not."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return ["not UTF-8"]
        return [row for start in range(batch.num_rows) for row in batch_rows(batch.slice(start, 1))]


def row_document(row: Any, name: str, offset: int, text_column: str, tally: Tally) -> Iterator[Document]:
    """The document of a row; of a row that is none, or a string that says why there is none, nothing: it is counted."""
    problem = row if isinstance(row, str) else row_problem(row, text_column)
    if problem is not None:
        tally.bad(name, offset, problem)
        return
    text = row.pop(text_column)
    identifier = row.pop("id", None)
    if identifier is None or identifier == "":
        identifier = f"{name}/{offset}"
    yield Document(text=text, id=str(identifier), metadata=row_metadata(row) | {"file": name})


def row_problem(row: Any, text_column: str) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    if not isinstance(row.get(text_column), str):
        return f"no string in the field {text_column!r}"
    return "NUL bytes" if "\0" in row[text_column] else None


def row_metadata(row: dict[str, Any]) -> dict[str, Any]:
    """The other fields, as JSON can hold them."""
    metadata = {}
    date = next((field for field in DATE_FIELDS if row.get(field) is not None), None)
    if date is not None:
        row["date"] = row.pop(date)
    for field, value in orjson.loads(orjson.dumps(row, default=str, option=orjson.OPT_NON_STR_KEYS)).items():
        if field in STRING_FIELDS:
            if value is not None:
                metadata[field] = value if isinstance(value, str) else orjson.dumps(value).decode()
        else:
            metadata[f"source_{field}" if field in STAGE_FIELDS else field] = value
    return metadata


def parse_json(content: bytes) -> Any:
    """The value, or a string that says why there is none: no value of interest is a string."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError:
        return "NUL bytes" if b"\0" in content else "not JSON" if is_utf8(content) else "not UTF-8"
    return "not a JSON object" if isinstance(value, str) else value


def is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def lines(path: Path, max_line_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line without its end), None for a line above the limit: of that, only a chunk is in memory."""
    offset, parts, size = 0, [], 0
    for piece in pieces(path):
        *ends, rest = piece.split(b"\n")
        for end in ends:
            size += len(end)
            yield offset, (b"".join([*parts, end]) if size <= max_line_bytes else None)
            offset += size + 1
            parts, size = [], 0
        size += len(rest)
        if size <= max_line_bytes:
            parts.append(rest)
        else:
            parts = []
    if size:
        yield offset, (b"".join(parts) if size <= max_line_bytes else None)


def pieces(path: Path) -> Iterator[bytes]:
    """The unpacked content in order; raises DamagedFile where it cannot be unpacked further."""
    read = 0
    try:
        with open_packed(path) as stream:
            size = ZSTD_CHUNK if path.suffix == ".zst" else CHUNK
            while piece := stream.read1(size):
                read += len(piece)
                yield piece
    except EOFError as error:
        raise DamagedFile(read, "truncated compression") from error
    except (OSError, zlib.error) as error:
        truncated = "runcated" in str(error)  # pyarrow's only sign of it
        raise DamagedFile(read, "truncated compression" if truncated else "damaged compression") from error


def open_packed(path: Path) -> BinaryIO | pa.NativeFile:
    """gzip of the standard library keeps what comes before damage, zstd of pyarrow tells a truncated file."""
    if path.suffix == ".gz":
        return gzip.open(path)
    return pa.input_stream(path, compression="zstd") if path.suffix == ".zst" else path.open("rb")
