"""Drops documents that share an n-gram of words with an evaluation set, after GPT-3 (arXiv 2005.14165, appendix C).

Words are compared in lower case and without punctuation. Every string of an evaluation item (question, choices, answer)
is looked for by itself: by its n-grams, or, where it has fewer than n words, as a whole, down to the eight words that
were GPT-3's least n. Shorter strings cannot be told from chance; items that have no longer one are counted.

Differences to GPT-3: a document that overlaps is dropped, where GPT-3 cut 200 characters around the place (and dropped
what fell into more than ten pieces); and an n-gram that is frequent in the training text counts as well, since which
are frequent is known only after a pass over all of it. `found_items` tells the items and n-grams, so common phrases can
be seen there and taken out of the evaluation file. datatrove's filter of this kind needs lighteval for its index.

An n-gram is a hash of 64 bits, so an index takes 16 bytes an n-gram: of 10^12 n-grams of training text against 10^7 of
evaluation items, one is expected to be taken for another by chance every other time.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

from .stage import DocumentStage
from .tally import replace_file
from .words import PLACES, UNPUNCTUATED_WORDS, n_gram_hashes

SHORTEST = 8  # words: GPT-3's least n
SUFFIXES = (".jsonl", ".parquet", ".txt")

KNOWN_WORDS = 1_000_000  # hashes of so many words are remembered: some 150 MB


@dataclass
class DecontaminationArguments:
    decontaminate: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of evaluation items: .jsonl or .parquet (an item a row), or .txt (an item a line). "
            "Documents that share an n-gram with one are dropped."
        },
    )
    decontamination_column: str | None = field(
        default=None,
        metadata={"help": "The column of --decontaminate that is looked for; by default all that hold strings."},
    )
    decontamination_ngrams: int = field(
        default=13, metadata={"help": "Words that a shared n-gram has; 13 is GPT-3's (arXiv 2005.14165, appendix C)."}
    )

    def __post_init__(self):
        if not SHORTEST <= self.decontamination_ngrams <= len(PLACES):
            raise ValueError(
                f"--decontamination_ngrams is {self.decontamination_ngrams}: give {SHORTEST} (fewer words agree by "
                f"chance) to {len(PLACES)}."
            )
        for file in map(Path, self.decontaminate):
            if file.suffix not in SUFFIXES:
                raise ValueError(f"--decontaminate names {file}: give a file that ends in {', '.join(SUFFIXES)}.")


class Decontaminate(DocumentStage):
    """Drops what overlaps, and leaves where in its metadata: `contaminated_by` (file and item), `contaminated_ngram`.

    Reads the files once when it is made, so that a bad one is told before any work, and again in every task.

    Args:
        found_folder: where each task writes the items that it found, `RANK.jsonl`; read by `found_items`.

    Raises:
        ValueError: a file that cannot be read, or none of whose rows has a string (in the column asked for).
    """

    name = "decontamination"

    def __init__(self, arguments: DecontaminationArguments, found_folder: Path | None = None):
        super().__init__()
        self.arguments = arguments
        self.found_folder = found_folder
        self.file_names = _short_names([Path(file) for file in arguments.decontaminate])
        column = arguments.decontamination_column
        for file in arguments.decontaminate:
            if not Path(file).is_file():
                raise ValueError(f"--decontaminate names {file}, and there is no such file: give an existing one.")
            if not sum(map(bool, evaluation_items(Path(file), column))):
                where = f" in a column {column!r}" if column else ""
                raise ValueError(
                    f"{file} of --decontaminate has no text{where}: name a file, or a column by "
                    "--decontamination_column, that has."
                )

    def begin(self, rank: int, world_size: int) -> None:
        self.word_hashes = WordHashes()
        self.indexes, short = ngram_indexes(self.arguments, self.word_hashes)
        self.found: Counter[tuple[int, int, str]] = Counter()
        if rank == 0:
            for file, items in short.items():
                self.tally.counts[f"items too short to be found: {self.file_names[file]}"] = items

    def process(self, document: Document) -> str | None:
        words = normalised_words(document.text)
        hashes = self.word_hashes.of(words)
        # Of an item's n-grams, the first in the document stands for it.
        overlaps: dict[tuple[int, int], str] = {}
        for n, index in self.indexes.items():
            for place, item in index.find(n_gram_hashes(hashes, n)):
                overlaps.setdefault(item, " ".join(words[place : place + n]))
        if not overlaps:
            return None
        for (file, item), n_gram in overlaps.items():
            self.found[file, item, n_gram] += 1
        (file, item), n_gram = min(overlaps.items())
        document.metadata |= {
            "contaminated_by": f"{self.file_names[file]}:{item}",
            "contaminated_ngram": n_gram,
        }
        return f"contaminated: {self.file_names[file]}"

    def end(self, rank: int, world_size: int) -> None:
        if self.found_folder is None:
            return
        rows = [
            {"file": self.file_names[file], "item": item, "n_gram": n_gram, "documents": documents}
            for (file, item, n_gram), documents in sorted(self.found.items())
        ]
        content = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
        replace_file(Path(self.found_folder) / f"{rank:05d}.jsonl", content)


def found_items(found_folder: Path) -> list[dict[str, Any]]:
    """The evaluation items that all tasks found: `file`, `item` (row or line, from 0), `documents`, `n_grams`."""
    documents: Counter[tuple[str, int]] = Counter()
    found = defaultdict(set)
    for file in sorted(Path(found_folder).glob("*.jsonl")):
        for row in map(orjson.loads, file.read_bytes().splitlines()):
            documents[row["file"], row["item"]] += row["documents"]
            found[row["file"], row["item"]].add(row["n_gram"])
    return [
        {"file": file, "item": item, "documents": documents[file, item], "n_grams": sorted(found[file, item])}
        for file, item in sorted(documents)
    ]


class NgramIndex:
    """The n-grams of one length, and the first item that has each.

    Args:
        hashes: (n-grams,) of uint64, in the order of `items`.
        items: (n-grams, 2), the number of the file and of the item in it.
    """

    def __init__(self, hashes: np.ndarray, items: np.ndarray):
        self.hashes, first = np.unique(hashes, return_index=True)
        self.items = items[first]

    def find(self, hashes: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
        """The places in `hashes` that are in the index, each with its item."""
        nearest = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        places = np.flatnonzero(self.hashes[nearest] == hashes)
        return [(int(place), tuple(self.items[nearest[place]].tolist())) for place in places]


class WordHashes(dict):
    """Words to 64 bits each: the first 8 bytes of BLAKE2b, the same in every process; hashed when first asked."""

    def __missing__(self, word: str) -> int:
        if len(self) > KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        self[word] = int.from_bytes(digest, "little")
        return self[word]

    def of(self, words: list[str]) -> np.ndarray:
        """(words,) of uint64."""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def ngram_indexes(
    arguments: DecontaminationArguments, word_hashes: WordHashes
) -> tuple[dict[int, NgramIndex], Counter[int]]:
    """What is looked for, by n; and for each file the number of its items that cannot be found."""
    hashes, items = defaultdict(list), defaultdict(list)
    short: Counter[int] = Counter()
    for number, file in enumerate(arguments.decontaminate):
        for item, texts in enumerate(evaluation_items(Path(file), arguments.decontamination_column)):
            long_enough = [words for text in texts if len(words := normalised_words(text)) >= SHORTEST]
            short[number] += not long_enough
            for words in long_enough:
                n = min(arguments.decontamination_ngrams, len(words))
                hashes[n].append(n_gram_hashes(word_hashes.of(words), n))
                items[n].append(np.full((len(words) - n + 1, 2), (number, item), np.int32))
    return {n: NgramIndex(np.concatenate(hashes[n]), np.concatenate(items[n])) for n in sorted(hashes)}, +short


def normalised_words(text: str) -> list[str]:
    return UNPUNCTUATED_WORDS.word_tokenize(text.lower().replace("’", "'"))


def evaluation_items(file: Path, column: str | None) -> Iterator[list[str]]:
    """For each row (or line of a .txt) its strings, those in lists and dictionaries too; `column` names one field."""
    for row in _rows(file):
        yield list(_strings(row if column is None else row.get(column)))


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            for batch in pq.ParquetFile(file).iter_batches():
                yield from batch.to_pylist()
            return
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if file.suffix == ".txt":
                    yield {"text": line}
                elif line.strip():
                    yield _json_object(line, f"{file}, line {number}")
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise ValueError(f"{file} of --decontaminate cannot be read: {error}") from error


def _json_object(line: str, place: str) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}): give one object a line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {type(row).__name__}, not an object: give one object a line.")
    return row


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _short_names(files: list[Path]) -> list[str]:
    """As few of each path's last parts as tell the files apart: the report shall not show where they lie."""
    parts = 1
    while len(names := ["/".join(file.parts[-parts:]) for file in files]) > len(set(names)):
        if parts > max(len(file.parts) for file in files):
            raise ValueError("--decontaminate names a file twice: name it once.")
        parts += 1
    return names
