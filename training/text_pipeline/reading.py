"""Reads what the pipeline begins with: web archives, saved pages, JSON lines, parquet, text, and the Hub's data sets.

`plan_tasks` divides the files into tasks by their sizes alone; `ReadDocuments` reads those of one task. A page goes
out as bytes (`metadata["raw"]`, for `ExtractText`), everything else as text. What cannot be read is counted, with its
file and offset, and skipped; a share of it above `max_bad_share` stops the run, since then the input is another than
was meant.
"""

import glob
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline

from .stage import RAW, TalliedStep, document_bytes
from .tally import Tally
from .text_files import DamagedFile, lines, parse_json, read_json_lines, read_parquet, read_text, row_document
from .warc_files import read_warc

WEB_KINDS = {".warc": "warc", ".wet": "warc", ".html": "html", ".htm": "html", ".xhtml": "html"}
ROW_KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
PACKED = {".gz", ".zst"}  # not for html and parquet
HUB = "hub:"
HUB_TASKS = 64
# So many records make a share, within a task; at its end, so many bad ones do.
RECORDS_OF_A_SHARE = 1000
FEW_BAD_RECORDS = 10


class BadInputError(ValueError):
    """More of the input is unreadable than `max_bad_share` allows."""


@dataclass
class ReadArguments:
    dataset: str = field(
        default="wikipedia_leads",
        metadata={
            "help": "What to read: a sample's name, a local file, folder or glob (warc, wet, html, jsonl, json, txt, "
            "also .gz and .zst; parquet), or a Hub id. Of a folder in which web archives or pages are, only these are "
            "read. In a .txt file, every paragraph between blank lines is a document."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several, such as a language."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to read, of data that has splits: not of web archives and pages."}
    )
    text_column: str = field(default="text", metadata={"help": "Column or JSON field that holds the documents."})
    max_record_bytes: int = field(
        default=16 << 20,
        metadata={"help": "Bytes of a page, line or paragraph above which it is skipped; 16 MiB by default."},
    )
    max_bad_share: float = field(
        default=0.05, metadata={"help": "Share of the records that may be unreadable; above it the run stops."}
    )
    task_bytes: int = field(
        default=32 << 20,
        metadata={"help": "Bytes of files that make a task; a larger file is one task. 32 MiB by default."},
    )

    def __post_init__(self):
        for name in ("max_record_bytes", "task_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give a number of bytes above 0.")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share is {self.max_bad_share}: give a share from 0 to 1.")


def plan_tasks(arguments: ReadArguments) -> tuple[list[list[str]], dict[str, int]]:
    """The files of each task, and how many files were left out, by suffix.

    Files are taken in the order of their paths and put together up to `task_bytes`. An entry of a Hub data set is
    `hub:PART/PARTS`, a part of its files.

    Raises:
        FileNotFoundError: nothing of that name, here or on the Hub.
        ValueError: no file that can be read, or data without the text column.
    """
    path = _local_path(arguments)
    if path is None:
        return _plan_hub_tasks(arguments), {}
    files, left_out = find_files(path, arguments)
    if not files:
        found = f"only {', '.join(f'{number} {suffix}' for suffix, number in left_out.items())}" if left_out else "none"
        kinds = ", ".join([*WEB_KINDS, *ROW_KINDS])
        raise ValueError(f"{arguments.dataset} holds no files to read, {found}: give {kinds} files.")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"All files of {arguments.dataset} are empty: give files with content.")
    check_text_column(files, arguments)
    tasks, size = [[]], 0
    for file in files:
        file_size = file.stat().st_size
        if tasks[-1] and size + file_size > arguments.task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(str(file))
        size += file_size
    return tasks, left_out


class ReadDocuments(TalliedStep):
    """Yields the documents of task RANK of `tasks`, as `plan_tasks` made them.

    The id of a document is its own where its data has one (a WARC record's, a field `id`), and else FILE/OFFSET, FILE
    being relative to the folder that is read.
    """

    name = "read"

    def __init__(self, tasks: list[list[str]], arguments: ReadArguments):
        super().__init__()
        self.tasks = tasks
        self.arguments = arguments
        path = _local_path(arguments)
        self.root = None if path is None else _root(path)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        tally = self.tally = Tally(self.name)
        documents = self._read(rank, world_size)
        while True:
            started = time.process_time()
            document = next(documents, None)
            if document is not None:
                tally.leaves(document, document_bytes(document))
            bad = tally.bad_input_count
            tally.documents_in = tally.documents_out + bad
            if tally.documents_in >= RECORDS_OF_A_SHARE and bad > tally.documents_in * self.arguments.max_bad_share:
                raise BadInputError(_too_bad(tally))
            tally.seconds += time.process_time() - started
            if document is None:
                break
            yield document
        if bad > max(FEW_BAD_RECORDS, tally.documents_in * self.arguments.max_bad_share):
            raise BadInputError(_too_bad(tally))
        self.save_tally(rank)

    def _read(self, rank: int, world_size: int) -> Iterator[Document]:
        for entry in (entry for task in self.tasks[rank::world_size] for entry in task):
            if entry.startswith(HUB):
                yield from self._read_hub(entry)
            else:
                yield from self._read_file(Path(entry))

    def _read_file(self, path: Path) -> Iterator[Document]:
        arguments, tally = self.arguments, self.tally
        name = path.relative_to(self.root).as_posix()
        size = path.stat().st_size
        tally.bytes_in += size
        if size == 0:
            tally.bad(name, 0, "empty file")
            return
        kind = kind_of(path)
        try:
            if kind == "warc":
                yield from read_warc(path, name, arguments.max_record_bytes, tally)
            elif kind == "html":
                yield from read_page(path, name, size, arguments.max_record_bytes, tally)
            elif kind == "parquet":
                yield from read_parquet(path, name, arguments.text_column, tally)
            elif kind == "json":
                yield from read_json_lines(path, name, arguments.text_column, arguments.max_record_bytes, tally)
            else:
                yield from read_text(path, name, arguments.max_record_bytes, tally)
        except DamagedFile as damage:
            tally.bad(name, damage.offset, damage.reason)

    def _read_hub(self, entry: str) -> Iterator[Document]:
        index, count = map(int, entry.removeprefix(HUB).split("/"))
        rows = _hub_rows(self.arguments).shard(num_shards=count, index=index)
        for number, row in enumerate(rows):
            name = f"{self.arguments.dataset}/{self.arguments.dataset_split}/{index}"
            for document in row_document(row, name, number, self.arguments.text_column, self.tally):
                self.tally.bytes_in += document_bytes(document)
                yield document


def read_page(path: Path, name: str, size: int, max_record_bytes: int, tally: Tally) -> Iterator[Document]:
    if size > max_record_bytes:
        tally.bad(name, 0, "record above max_record_bytes")
    else:
        yield Document(text="", id=name, metadata={RAW: path.read_bytes(), "file": name, "offset": 0})


def check_bad_share(tallies: Iterable[Tally], max_bad_share: float) -> None:
    """Raises BadInputError where of all tasks together too much could not be read, or nothing could be."""
    tally = Tally.total("read", tallies)
    if tally.bad_input_count and not tally.documents_out:
        raise BadInputError(f"Nothing could be read. {_too_bad(tally)}")
    if tally.bad_input_count > max(FEW_BAD_RECORDS, tally.documents_in * max_bad_share):
        raise BadInputError(_too_bad(tally))


def _too_bad(tally: Tally) -> str:
    reasons = Counter({name.removeprefix("bad: "): n for name, n in tally.counts.items() if name.startswith("bad: ")})
    files = Counter(bad["file"] for bad in tally.bad_inputs)
    worst = max(files, key=lambda file: (files[file], file))
    first = next(bad for bad in tally.bad_inputs if bad["file"] == worst)
    return (
        f"{tally.bad_input_count} of {tally.documents_in} records cannot be read "
        f"({', '.join(f'{reason}: {number}' for reason, number in reasons.most_common(3))}), most of them of {worst}, "
        f"first at offset {first['offset']}: mend or remove the file, or raise --max_bad_share."
    )


def find_files(path: Path, arguments: ReadArguments) -> tuple[list[Path], dict[str, int]]:
    """The files that are read, sorted, and the number of those that are not, by suffix."""
    if path.is_file():
        return ([path], {}) if kind_of(path) else ([], {path.suffix or "without suffix": 1})
    folder = path.is_dir()
    found = path.rglob("*") if folder else map(Path, glob.iglob(str(path), recursive=True))
    files = sorted((file for file in found if file.is_file()), key=lambda file: file.parts)
    chosen = [file for file in files if _content_suffix(file) in WEB_KINDS and kind_of(file)]
    if not folder:
        chosen = [file for file in files if kind_of(file)]
    elif not chosen and any(map(kind_of, files)):
        chosen = _files_of_split(path, arguments)
    left = Counter(file.suffix or "without suffix" for file in set(files) - set(chosen))
    return chosen, dict(sorted(left.items()))


def _files_of_split(folder: Path, arguments: ReadArguments) -> list[Path]:
    """A folder of text data is divided into splits by its file names, as every command divides it."""
    from ..dataset_source import asked_splits, refuse_sliced_stream
    from ..text_data import files_by_split

    refuse_sliced_stream(arguments.dataset_split)
    by_split = files_by_split(folder, arguments.dataset_config)
    names = asked_splits(folder, arguments.dataset_split, by_split)
    files = sorted({file for name in names for file in by_split[name]}, key=lambda file: file.parts)
    return [folder / file.relative_to(folder.absolute()) for file in files if kind_of(file)]


def check_text_column(files: list[Path], arguments: ReadArguments) -> None:
    """Raises where the first row that can be read has no text column: in all likelihood none has."""
    for file in files:
        kind = kind_of(file)
        try:
            if kind == "parquet":
                names = pq.read_schema(file).names
            elif kind == "json":
                rows = (parse_json(line) for _, line in lines(file, arguments.max_record_bytes) if line)
                names = list(next(row for row in rows if isinstance(row, dict)))
            else:
                continue
        except (pa.ArrowException, OSError, DamagedFile, StopIteration):
            continue
        if arguments.text_column not in names:
            raise ValueError(
                f"{file} has no column {arguments.text_column!r}, only {', '.join(names)}: set --text_column to one."
            )
        return


def kind_of(file: Path) -> str | None:
    kind = (WEB_KINDS | ROW_KINDS).get(_content_suffix(file))
    return None if file.suffix in PACKED and kind in ("html", "parquet") else kind


def _content_suffix(file: Path) -> str:
    return (file.with_suffix("").suffix if file.suffix in PACKED else file.suffix).lower()


def _local_path(arguments: ReadArguments) -> Path | None:
    """A file, a folder, or a pattern; None for a Hub id."""
    path = Path(arguments.dataset).expanduser()
    if glob.has_magic(arguments.dataset) and not path.exists():
        return path
    from ..dataset_source import local_path

    return local_path(arguments.dataset, None, {*WEB_KINDS, *ROW_KINDS, *PACKED})


def _root(path: Path) -> Path:
    """The folder to which names of files are relative; of a pattern, its part without wildcards."""
    if path.is_dir():
        return path
    while path.is_file() or glob.has_magic(str(path)):
        path = path.parent
    return path


def _plan_hub_tasks(arguments: ReadArguments) -> list[list[str]]:
    from ..dataset_source import refuse_sliced_stream

    refuse_sliced_stream(arguments.dataset_split)
    rows = _hub_rows(arguments)
    first = next(iter(rows), None)
    if first is None:
        raise ValueError(f"{arguments.dataset} ({arguments.dataset_split}) has no rows: name data that has some.")
    if arguments.text_column not in first:
        raise ValueError(
            f"{arguments.dataset} has no column {arguments.text_column!r}, only {', '.join(first)}: set --text_column "
            "to one."
        )
    count = min(rows.num_shards, HUB_TASKS)
    return [[f"{HUB}{index}/{count}"] for index in range(count)]


def _hub_rows(arguments: ReadArguments):
    from ..dataset_source import load_from_hub

    return load_from_hub(arguments.dataset, arguments.dataset_split, arguments.dataset_config, True, "text")
