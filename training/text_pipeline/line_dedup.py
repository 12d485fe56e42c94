"""Drops lines that the corpus has already: menus, cookie notices, licence texts (CCNet, arXiv 1911.00359, section 3.1).

Three steps, each with as many tasks as are given in brackets:

    HashLines(folder)                                              [tasks]       the last to see these documents ...
    FindDuplicateLines(folder, tasks, "keep_first")                [partitions]  of all tasks' hashes, by their range
    DropDuplicateLines(folder, partitions, min_document_characters=300)  [tasks] ... before this, in the same order

- Exact over all documents, whatever the number of tasks, partitions and workers. CCNet does so for groups of shards.
- A line is normalised and hashed as CCNet does (`normalised_lines`), so that the hashes are CCNet's.
- `keep_first` keeps a line where it comes first; `drop_all` keeps none that occurs twice, which is CCNet's way except
  that CCNet keeps the first of those that repeat within one document and are in no other.
- Lines of which nothing is left when normalised are always dropped. CCNet hashes them like others: in effect the same,
  since they are in more than one document.
- Two different lines have the same hash with probability 2^-64. Of 10^9 different lines, 10^18 / 2 / 2^64 = 0.027 pairs
  are expected to.
"""

import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datatrove.data import Document

from .places import MAX_PLACES, PLACE, load_array, read_places, save_array, write_places
from .stage import DocumentStage, FolderStage
from .tally import replace_file

HASH = np.dtype("<u8")
HASH_RANGE = 2**64

# CCNet's list (some quotation marks, dashes, full-width forms) without its full-width 1, which is 0 by then. It has
# none of ASCII's punctuation and little of Unicode's: `foo.` and `foo` are different lines.
PUNCTUATION = "«»“”„’´–—…" "∶━►" "、。〈〉《》「」【】" "！％（），．：；？～"  # fmt: skip
BEYOND_ASCII = re.compile(f"[\x80-\x9f{PUNCTUATION}]")
DIGIT_BEYOND_ASCII = re.compile(r"[^\D0-9]")
ASCII_DIGITS_TO_0 = bytes.maketrans(b"123456789", b"0" * 9)
ASCII_CONTROLS = bytes(code for code in (*range(32), 127) if code != ord("\n"))


@dataclass
class LineDedupArguments:
    line_dedup: str = field(
        default="keep_first",
        metadata={
            "help": "Lines that occur more than once, in all documents together: keep_first drops all but the first, "
            "drop_all (CCNet's way) the first too, off none."
        },
    )
    line_dedup_partitions: int = field(
        default=16,
        metadata={
            "help": "Parts, by range of the hash, in which duplicate lines are looked for: more parts need less memory "
            "each. The result is the same."
        },
    )
    min_document_characters: int = field(
        default=300,
        metadata={
            "help": "Documents with fewer characters after line_dedup are dropped, none where it is off; CCNet's 300."
        },
    )

    def __post_init__(self):
        if self.line_dedup is False:  # what YAML makes of off
            self.line_dedup = "off"
        if self.line_dedup not in ("keep_first", "drop_all", "off"):
            raise ValueError(f"--line_dedup is {self.line_dedup!r}: take keep_first, drop_all or off.")
        if self.line_dedup_partitions < 1:
            raise ValueError(f"--line_dedup_partitions is {self.line_dedup_partitions}: give 1 or more.")
        if self.min_document_characters < 0:
            raise ValueError(f"--min_document_characters is {self.min_document_characters}: give 0 or more.")


class HashLines(DocumentStage):
    """Writes the hash of each line and passes the documents on.

    A line's place is its number within the task. Of task RANK, sorted by hash and then place, both of shape (lines,):
    `hashes/RANK.npy` (64 bits) and `places/RANK.npy` (32 bits), without the lines that are empty when normalised, whose
    places are in `blank/RANK.npy`; `counts/RANK.json` says how many documents and lines there are.
    """

    name = "hash_lines"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = Path(folder)

    def begin(self, rank: int, world_size: int) -> None:
        self.hashes = bytearray()

    def process(self, document: Document) -> None:
        self.hashes += line_hashes(document.text)

    def end(self, rank: int, world_size: int) -> None:
        hashes = np.frombuffer(self.hashes, HASH)
        lines = len(hashes)
        if lines > MAX_PLACES:
            raise ValueError(f"Task {rank} has {lines} lines, and {MAX_PLACES} is the most: make more tasks of it.")
        blank = hashes == BLANK
        places = np.flatnonzero(~blank).astype(PLACE)
        hashes = hashes[~blank]
        order = np.argsort(hashes, kind="stable")
        save_array(task_file(self.folder, "hashes", rank), hashes[order])
        save_array(task_file(self.folder, "places", rank), places[order])
        save_array(task_file(self.folder, "blank", rank), np.flatnonzero(blank).astype(PLACE))
        counts = {"documents": self.tally.documents_in, "lines": lines}
        replace_file(counts_file(self.folder, rank), json.dumps(counts).encode())
        self.tally.counts.update({"lines": lines, "blank lines": int(blank.sum())})
        del self.hashes


class FindDuplicateLines(FolderStage):
    """Finds the lines to drop among those with a hash in this task's part of the range; its tasks are the partitions.

    For 10^9 hashes `HashLines` writes 12 GB, and the partitions take together 12 GB of memory here, measured where 37 %
    of the lines repeat another (benchmarks/line_dedup.py); at most 17 (8 + 1 + 8 bytes each), where all do.

    Args:
        folder: of `HashLines`.
        tasks: of `HashLines`.
        mode: keep_first or drop_all.
    """

    name = "find_duplicate_lines"

    def __init__(self, folder: Path, tasks: int, mode: str):
        super().__init__()
        if mode not in ("keep_first", "drop_all"):
            raise ValueError(f"The mode of FindDuplicateLines is {mode!r}: take keep_first or drop_all.")
        self.folder, self.tasks, self.mode = Path(folder), tasks, mode

    def work(self, rank: int, world_size: int) -> None:
        bounds = [self.slice_of_partition(task, rank, world_size) for task in range(self.tasks)]
        duplicated = self.duplicated_hashes(bounds)
        seen = np.zeros(len(duplicated), bool)
        drops = []
        for task, (start, stop) in enumerate(bounds):
            hashes = load_array(task_file(self.folder, "hashes", task))[start:stop]
            places = load_array(task_file(self.folder, "places", task))[start:stop]
            of = np.searchsorted(duplicated, hashes)
            of[of == len(duplicated)] = 0
            repeated = duplicated[of] == hashes if len(duplicated) else np.zeros(len(hashes), bool)
            of, drop = of[repeated], places[repeated]
            if self.mode == "keep_first":
                # The first of a run of equal hashes is the first line of the task that has it.
                first = np.concatenate([np.ones(min(1, len(of)), bool), of[1:] != of[:-1]]) & ~seen[of]
                seen[of] = True
                drop = drop[~first]
            drops.append(np.sort(drop))
        write_places(self.folder / "drop", partition_name(rank, world_size), drops)
        self.tally.counts["lines that occur more than once"] = len(duplicated)
        self.tally.counts["lines to drop"] = sum(map(len, drops))

    def slice_of_partition(self, task: int, partition: int, partitions: int) -> tuple[int, int]:
        hashes = load_array(task_file(self.folder, "hashes", task))
        edges = [-(-HASH_RANGE * i // partitions) for i in (partition, partition + 1)]
        start, stop = (len(hashes) if e == HASH_RANGE else int(np.searchsorted(hashes, HASH.type(e))) for e in edges)
        return start, stop

    def duplicated_hashes(self, bounds: list[tuple[int, int]]) -> np.ndarray:
        """Those that occur more than once, each once, sorted."""
        hashes = np.empty(sum(stop - start for start, stop in bounds), HASH)
        filled = 0
        for task, (start, stop) in enumerate(bounds):
            hashes[filled : filled + stop - start] = load_array(task_file(self.folder, "hashes", task))[start:stop]
            filled += stop - start
        hashes.sort()
        repeats = hashes[1:][hashes[1:] == hashes[:-1]]
        del hashes
        return repeats[np.concatenate([np.ones(min(1, len(repeats)), bool), repeats[1:] != repeats[:-1]])]


class DropDuplicateLines(DocumentStage):
    """Drops the lines that were found, and the documents of which too little is left.

    Args:
        folder: of `HashLines`.
        partitions: the tasks of `FindDuplicateLines`.
        min_document_characters: documents with fewer left are dropped as "short", or "empty" where none is left.

    Raises:
        ValueError: these are not the documents that `HashLines` saw, by their number or that of their lines.
    """

    name = "line_dedup"

    def __init__(self, folder: Path, partitions: int, min_document_characters: int = 300):
        super().__init__()
        self.folder, self.partitions = Path(folder), partitions
        self.min_document_characters = min_document_characters

    def begin(self, rank: int, world_size: int) -> None:
        file = counts_file(self.folder, rank)
        if not file.exists():
            raise ValueError(f"{file} is not there: run HashLines on the same tasks first.")
        self.expected = json.loads(file.read_text())
        kept = np.ones(self.expected["lines"], bool)
        kept[load_array(task_file(self.folder, "blank", rank))] = False
        for partition in range(self.partitions):
            kept[read_places(self.folder / "drop", partition_name(partition, self.partitions), rank)] = False
        self.kept = kept.tobytes()
        self.place = 0

    def process(self, document: Document) -> str | None:
        text = document.text
        start, self.place = self.place, self.place + text.count("\n") + 1
        kept = self.kept[start : self.place]
        if self.place > len(self.kept):
            raise ValueError(self.refusal(f"line {self.place - len(self.kept)} of {document.id} is one too many"))
        dropped = kept.count(0)
        if dropped:
            lines = text.split("\n")
            text = "\n".join(itertools.compress(lines, kept))
            self.tally.counts["lines dropped"] += dropped
            self.tally.counts["bytes of dropped lines"] += sum(
                len(line.encode("utf-8", "surrogatepass"))
                for line, is_kept in zip(lines, kept, strict=True)
                if not is_kept
            )
        if not text:
            return "empty"
        if len(text) < self.min_document_characters:
            return "short"
        document.text = text
        return None

    def end(self, rank: int, world_size: int) -> None:
        seen = {"documents": self.tally.documents_in, "lines": self.place}
        if seen != self.expected:
            raise ValueError(self.refusal(f"they are {seen['documents']} with {seen['lines']} lines"))
        del self.kept

    def refusal(self, what: str) -> str:
        return (
            f"The documents of line_dedup are not those that HashLines saw, which were {self.expected['documents']} "
            f"with {self.expected['lines']} lines: {what}. Put both behind the same steps, and hash again what changed."
        )


def line_hashes(text: str) -> bytes:
    """8 bytes a line: the first of the SHA-1 of its normalised form in UTF-8; CCNet reads them as little-endian."""
    sha1 = hashlib.sha1
    return b"".join([sha1(line).digest()[:8] for line in normalised_lines(text)])


BLANK = np.frombuffer(hashlib.sha1(b"").digest()[:8], HASH)[0]


def normalised_lines(text: str) -> list[bytes]:
    """The lines as CCNet compares them, in UTF-8, all of a document at once.

    Each is stripped, put into lower case, digits of any script become 0, and the punctuation above and the control
    characters (U+0000 to U+001F, U+007F to U+009F) are removed. Only a line feed ends a line.
    """
    text = "\n".join([line.strip() for line in text.split("\n")]).lower()
    if not text.isascii():
        text = BEYOND_ASCII.sub("", DIGIT_BEYOND_ASCII.sub("0", text))
    return text.encode("utf-8", "surrogatepass").translate(ASCII_DIGITS_TO_0, ASCII_CONTROLS).split(b"\n")


def task_file(folder: Path, kind: str, rank: int) -> Path:
    return folder / kind / f"{rank:05d}.npy"


def counts_file(folder: Path, rank: int) -> Path:
    return folder / "counts" / f"{rank:05d}.json"


def partition_name(partition: int, partitions: int) -> str:
    return f"{partition:05d}-of-{partitions:05d}"
