"""Documents on disk: between phases as JSON lines, packed with zstd; at the end as parquet.

A file appears when it is complete, and its bytes depend on its documents only.
"""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from datatrove.data import Document, DocumentsPipeline

from .stage import TalliedStep, document_bytes
from .tally import Tally, partial_path

ZSTD_LEVEL = 1  # what is written is read once
ROW_GROUP = 1000  # documents
# The columns of the final files; what else a document carries is in `metadata`, as JSON.
COLUMNS = {
    "id": pa.string(),
    "text": pa.string(),
    "url": pa.string(),
    "date": pa.string(),
    "title": pa.string(),
    "language": pa.string(),
    "language_score": pa.float32(),
    "perplexity": pa.float32(),
    "bucket": pa.string(),
    "reference_score": pa.float32(),
    "metadata": pa.string(),
}
SCHEMA = pa.schema(list(COLUMNS.items()))


def documents_file(folder: Path, rank: int) -> Path:
    return Path(folder) / f"{rank:05d}.jsonl.zst"


def read_documents(file: Path) -> Iterator[Document]:
    with zstandard.open(file, "rb") as stream, io.BufferedReader(stream) as lines:
        for line in lines:
            yield Document(**orjson.loads(line))


class DocumentReader(TalliedStep):
    """Yields the documents that task RANK of an earlier phase wrote into `folder`."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.tally = Tally(self.name)
        documents = read_documents(documents_file(self.folder, rank))
        while True:
            started = time.process_time()
            document = next(documents, None)
            self.tally.seconds += time.process_time() - started
            if document is None:
                break
            yield document
        self.save_tally(rank)


class DocumentWriter(TalliedStep):
    """Writes what passes through to `folder/RANK.jsonl.zst`, and yields it on."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self.tally = Tally(self.name)
        file = documents_file(self.folder, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(file)
        with partial.open("wb") as target, zstandard.ZstdCompressor(ZSTD_LEVEL).stream_writer(target) as packed:
            for document in data:
                started = time.process_time()
                packed.write(
                    orjson.dumps(
                        {"text": document.text, "id": document.id, "metadata": document.metadata},
                        option=orjson.OPT_APPEND_NEWLINE,
                    )
                )
                self.tally.seconds += time.process_time() - started
                yield document
        os.replace(partial, file)
        self.save_tally(rank)


class ParquetDocuments(TalliedStep):
    """The last step: writes `folder/RANK.parquet`; no file where no document is left."""

    name = "write"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = self.tally = Tally(self.name)
        file = Path(self.folder) / f"{rank:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(file)
        writer, rows = None, []

        def flush() -> None:
            nonlocal writer
            if rows:
                writer = writer or pq.ParquetWriter(partial, SCHEMA, compression="zstd")
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                rows.clear()

        for document in data:
            started = time.process_time()
            size = document_bytes(document)
            tally.enters(size)
            tally.leaves(document, size)
            if language := document.metadata.get("language"):
                tally.histograms["languages"][language] += 1
            rows.append(document_row(document))
            if len(rows) == ROW_GROUP:
                flush()
            tally.seconds += time.process_time() - started
            yield document
        started = time.process_time()
        flush()
        if writer is not None:
            writer.close()
            os.replace(partial, file)
        tally.seconds += time.process_time() - started
        self.save_tally(rank)


def document_row(document: Document) -> dict[str, Any]:
    rest = {name: value for name, value in document.metadata.items() if name not in COLUMNS}
    row = {name: document.metadata.get(name) for name in COLUMNS}
    return row | {
        "id": document.id,
        "text": document.text,
        "metadata": orjson.dumps(rest, option=orjson.OPT_SORT_KEYS).decode(),
    }
