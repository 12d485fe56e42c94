"""Tokenises documents, one task a file, into files of plain token ids that a mixture is drawn from.

A document's ids are those that `training.packing` computes: nothing is put before or after them, and text that spells
a special token is text. The workers need `tokenizers` alone; the driver has written the tokenizer for them (see
`mixture_inputs`). Of a task stay three files: the ids one after another, the documents' lengths, and a summary.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from .stage import FolderStage
from .tally import partial_path, power_of_two_bin, replace_file

# Encoded at once. A document is never cut: its tokens would change at the cut.
BATCH_CHARACTERS = 2**18


@dataclass(frozen=True)
class SourceFile:
    """What one task tokenises.

    Attributes:
        source: name of the source that it belongs to.
        path: a file, or the Hub id of a data set.
        kind: "parquet" is read directly, anything else as `training.text_data` reads it.
        optional: written by an earlier phase, which leaves no file where it leaves no document.
    """

    source: str
    path: str
    kind: str = "parquet"
    optional: bool = False

    def texts(self) -> Iterator[str | None]:
        if self.optional and not Path(self.path).exists():
            return
        if self.kind == "parquet":
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(batch_size=100, columns=["text"]):
                    yield from batch.column(0).to_pylist()
        else:
            from training.text_data import iterate_texts, load_text_dataset  # slow to import, and seldom needed

            yield from iterate_texts(load_text_dataset(self.path, "train", streaming=True))


@dataclass(frozen=True)
class TokenSummary:
    """Counts of one task's documents, of which empty ones are left out; `bytes` are of UTF-8, before tokenising."""

    source: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class TokenFile:
    """What task `rank` left in `folder`."""

    folder: Path
    rank: int

    @property
    def ids_path(self) -> Path:
        return self.folder / f"{self.rank:05d}.ids"

    @property
    def lengths_path(self) -> Path:
        return self.folder / f"{self.rank:05d}.lengths.npy"

    @property
    def summary_path(self) -> Path:
        return self.folder / f"{self.rank:05d}.json"

    @cached_property
    def summary(self) -> TokenSummary:
        return TokenSummary(**json.loads(self.summary_path.read_text(encoding="utf-8")))

    def lengths(self) -> np.ndarray:
        """`(documents,)`, uint32, mapped: it takes no memory but what is looked at."""
        return np.load(self.lengths_path, mmap_mode="r")

    def ids(self) -> np.ndarray:
        """`(tokens,)`, mapped; of no use for a file without tokens, which cannot be mapped."""
        return np.asarray(np.memmap(self.ids_path, dtype=self.summary.dtype, mode="r"))


class TokeniseDocuments(FolderStage):
    """Task RANK tokenises `files[RANK]` into `folder`. Takes 4 bytes of memory a document, and one batch.

    Args:
        tokenizer_file: a `tokenizer.json`.
    """

    name = "tokenise"

    def __init__(self, files: list[SourceFile], tokenizer_file: Path, folder: Path):
        super().__init__()
        self.files, self.tokenizer_file, self.folder = files, tokenizer_file, folder

    def work(self, rank: int, world_size: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one core
        tokenizer, dtype = open_tokenizer(self.tokenizer_file)
        source, target = self.files[rank], TokenFile(Path(self.folder), rank)
        target.folder.mkdir(parents=True, exist_ok=True)
        digest, lengths = hashlib.sha256(), [np.empty(0, np.uint32)]
        partial = partial_path(target.ids_path)
        with partial.open("wb") as ids_file:
            for batch in self._batches(source.texts()):
                encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]
                encoded = [ids for ids in encoded if ids]
                lengths.append(np.fromiter(map(len, encoded), np.uint32, len(encoded)))
                content = b"".join(np.array(ids, dtype).tobytes() for ids in encoded)
                digest.update(content)
                ids_file.write(content)
                self._count(source.source, len(batch), lengths[-1])
        os.replace(partial, target.ids_path)
        self._finish(source, target, np.concatenate(lengths), digest, dtype)

    def _finish(self, source: SourceFile, target: TokenFile, lengths: np.ndarray, digest, dtype: np.dtype) -> None:
        partial = partial_path(target.lengths_path)
        with partial.open("wb") as lengths_file:
            np.save(lengths_file, lengths)
        os.replace(partial, target.lengths_path)
        digest.update(lengths.tobytes())
        summary = TokenSummary(
            source=source.source,
            documents=len(lengths),
            tokens=int(lengths.sum(dtype=np.int64)),
            bytes=self.tally.bytes_in,
            dtype=dtype.name,
            sha256=digest.hexdigest(),
        )
        replace_file(target.summary_path, json.dumps(asdict(summary)).encode())

    def _batches(self, texts: Iterable[str | None]) -> Iterator[list[str]]:
        """Counts what comes in."""
        batch, characters = [], 0
        for text in texts:
            self.tally.documents_in += 1
            self.tally.bytes_in += len(text.encode()) if text else 0
            batch.append(text or "")
            characters += len(batch[-1])
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _count(self, source: str, documents: int, lengths: np.ndarray) -> None:
        tally = self.tally
        tally.documents_out += len(lengths)
        tally.bytes_out = tally.bytes_in
        if empty := documents - len(lengths):
            tally.dropped["empty"] += empty
        tally.counts[f"tokens: {source}"] += int(lengths.sum(dtype=np.int64))
        tally.histograms["tokens of a document"].update(Counter(map(power_of_two_bin, lengths.tolist())))


def open_tokenizer(file: Path) -> tuple[Tokenizer, np.dtype]:
    """The tokenizer, set to take special tokens in a text for text, and the smallest type that holds its ids."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as transformers' split_special_tokens sets it
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    return tokenizer, np.dtype(np.uint16 if largest < 2**16 else np.uint32)
