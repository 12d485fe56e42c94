"""Line deduplication against a dictionary, and its hashes against CCNet's definition worked out by hand."""

import hashlib
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from datatrove.data import Document

from training.text_pipeline.document_files import DocumentReader, DocumentWriter, read_documents
from training.text_pipeline.execution import ExecutionArguments, Phase, run_phases
from training.text_pipeline.line_dedup import (
    DropDuplicateLines,
    FindDuplicateLines,
    HashLines,
    LineDedupArguments,
    line_hashes,
    normalised_lines,
)
from training.text_pipeline.local_executor import prepare_process

# Lines that are equal to others when normalised, or empty.
LINES = [
    "Menu",
    " menu\t",
    "MENU",
    "Page 12",
    "page 34",
    "“Read more”…",
    "read more",
    "",
    "  ",
    "…",
    "\x07",
    "été",
    "ÉTÉ",
]


def random_tasks(draw: random.Random) -> list[list[Document]]:
    def line() -> str:
        return (
            draw.choice(LINES)
            if draw.random() < 0.5
            else f"Line {chr(draw.randrange(97, 123))}{chr(draw.randrange(97, 105))}"
        )

    def text() -> str:
        return "\n".join(line() for _ in range(draw.choice([0, 1, 2, 5, 20])))

    tasks = [draw.choice([0, 1, 3, 10]) for _ in range(draw.choice([1, 2, 5]))]
    return [[Document(text(), f"{task}/{i}") for i in range(documents)] for task, documents in enumerate(tasks)]


def normalised(line: str) -> str:
    """CCNet's rule, line by line."""
    line = re.sub(r"\d", "0", line.strip().lower())
    return re.sub("[\x00-\x1f\x7f-\x9f，。、„”“«»１」「《》´∶：？！（）；–—．～’…━〈〉【】％►]", "", line)


def brute_force(texts: list[str], mode: str) -> list[str]:
    count = Counter(normalised(line) for text in texts for line in text.split("\n"))
    seen, results = set(), []
    for text in texts:
        kept = []
        for line in text.split("\n"):
            key = normalised(line)
            if key and (count[key] == 1 or (mode == "keep_first" and key not in seen)):
                kept.append(line)
            seen.add(key)
        results.append("\n".join(kept))
    return results


def deduplicate(tasks: list[list[Document]], folder: Path, mode: str, partitions: int, min_characters: int = 0):
    """Texts that are left, by document, and the tallies of `DropDuplicateLines`."""
    tasks = [[Document(document.text, document.id) for document in task] for task in tasks]
    for rank, task in enumerate(tasks):
        assert list(HashLines(folder).run(task, rank, len(tasks))) == task
    for rank in range(partitions):
        FindDuplicateLines(folder, len(tasks), mode).run(None, rank, partitions)
    left, tallies = {}, []
    for rank, task in enumerate(tasks):
        drop = DropDuplicateLines(folder, partitions, min_characters)
        left |= {document.id: document.text for document in drop.run(task, rank, len(tasks))}
        tallies.append(drop.tally)
    return left, tallies


@pytest.mark.parametrize("mode", ["keep_first", "drop_all"])
def test_equals_a_dictionary_whatever_the_partitions(tmp_path, mode):
    draw = random.Random(0)
    for trial in range(12):
        tasks = random_tasks(draw)
        documents = [document for task in tasks for document in task]
        texts = brute_force([document.text for document in documents], mode)
        expected = {document.id: text for document, text in zip(documents, texts, strict=True) if text}
        left, tallies = deduplicate(tasks, tmp_path / str(trial), mode, partitions=draw.choice([1, 2, 3, 16]))
        assert left == expected
        assert sum(tally.dropped["empty"] for tally in tallies) == len(documents) - len(expected)
        lines = [line for document in documents for line in document.text.split("\n")]
        kept = [line for text in texts if text for line in text.split("\n")]
        assert sum(tally.counts["lines dropped"] for tally in tallies) == len(lines) - len(kept)
        size = sum(len(line.encode()) for line in lines) - sum(len(line.encode()) for line in kept)
        assert sum(tally.counts["bytes of dropped lines"] for tally in tallies) == size


def test_does_not_depend_on_how_documents_are_split_into_tasks(tmp_path):
    documents = [document for task in random_tasks(random.Random(6)) for document in task]
    assert len(documents) > 10
    splits = [[documents], [documents[:4], [], documents[4:]], [[document] for document in documents]]
    results = [deduplicate(split, tmp_path / str(i), "keep_first", 2)[0] for i, split in enumerate(splits)]
    assert results[0] == results[1] == results[2]


def test_hashes_are_ccnets():
    """The left column is a line, the right what CCNet's rule makes of it: worked out by hand."""
    table = {
        "  Hello World 2024\r": "hello world 0000",
        "«Été» – 12 %": "été  00 %",  # ASCII's % stays, as do the spaces inside
        "１２ ٣ ५": "00 0 0",  # full-width, Arabic-Indic and Devanagari digits
        "（１）：「東京」。": "0東京",
        "a\tb\x00c\x7fd\x85e": "abcde",
        "\u00a0… x": " x",  # stripped first, then the dots removed: the space before x stays
        "ΟΔΟΣ": "οδος",  # a capital sigma at a word's end
        "...!?-": "...!?-",
        " – ": "",
        "": "",
    }
    document = "\n".join(table)
    assert [line.decode() for line in normalised_lines(document)] == list(table.values())
    digests = [hashlib.sha1(line.encode()).digest()[:8] for line in table.values()]
    assert line_hashes(document) == b"".join(digests)


def test_a_document_of_which_too_little_is_left_is_dropped(tmp_path):
    long, short = "unlike any other " * 20, "quite short"
    tasks = [[Document(f"menu\n{long}", "0"), Document(f"menu\n{short}", "1"), Document("menu", "2")]]
    left, (tally,) = deduplicate(tasks, tmp_path, "keep_first", 1, LineDedupArguments().min_document_characters)
    assert left == {"0": f"menu\n{long}"}
    assert tally.dropped == {"short": 1, "empty": 1}
    assert {row["text"] for row in tally.samples["dropped"]} == {f"menu\n{short}", "menu"}  # as they came in


@pytest.mark.parametrize("change", ["a document less", "a document more", "a line less", "a line more"])
def test_refuses_other_documents_than_were_hashed(tmp_path, change):
    texts = ["a\nb", "c\nd"]
    deduplicate([[Document(text, str(i)) for i, text in enumerate(texts)]], tmp_path, "keep_first", 1)
    changed = {"a document less": texts[:1], "a document more": [*texts, "e"], "a line less": ["a", "c\nd"]}
    texts = changed.get(change, ["a\nb\nx", "c\nd"])
    with pytest.raises(ValueError, match=r"HashLines saw, which were 2 with 4 lines: .*hash again what changed"):
        list(DropDuplicateLines(tmp_path, 1).run([Document(text, str(i)) for i, text in enumerate(texts)]))


def test_refuses_what_was_not_written_before(tmp_path):
    with pytest.raises(ValueError, match="run HashLines on the same tasks first"):
        list(DropDuplicateLines(tmp_path, 1).run([Document("a", "0")]))
    list(HashLines(tmp_path).run([Document("a", "0")]))
    with pytest.raises(ValueError, match="run the step that writes it first"):
        FindDuplicateLines(tmp_path, 2, "keep_first").run()
    FindDuplicateLines(tmp_path, 1, "keep_first").run(None, 0, 2)
    with pytest.raises(ValueError, match="run the step that writes it first"):  # one of the two partitions is missing
        list(DropDuplicateLines(tmp_path, 2).run([Document("a", "0")]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"line_dedup": "first"}, "--line_dedup is 'first': take keep_first, drop_all or off"),
        ({"line_dedup_partitions": 0}, "--line_dedup_partitions is 0"),
        ({"min_document_characters": -1}, "--min_document_characters is -1"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        LineDedupArguments(**options)


def test_odd_text_passes(tmp_path):
    texts = ["\ud800 lone surrogate\n\ud800 lone surrogate", "\n\n", "x" * 1_000_000, "line\u2028separator\x0bstays"]
    left, _ = deduplicate([[Document(text, str(i)) for i, text in enumerate(texts)]], tmp_path, "keep_first", 3)
    assert left == {"0": "\ud800 lone surrogate", "2": texts[2], "3": texts[3]}


def phases(folder: Path, tasks: int, partitions: int) -> list[Phase]:
    read = DocumentReader("read", folder / "input")
    drop = DropDuplicateLines(folder / "lines", partitions, 0)
    return [
        Phase("hash", [read, HashLines(folder / "lines")], tasks),
        Phase("find", [FindDuplicateLines(folder / "lines", tasks, "keep_first")], partitions),
        Phase("drop", [read, drop, DocumentWriter("write", folder / "output")], tasks),
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_bytes_do_not_depend_on_workers_or_on_a_task_that_is_run_again(tmp_path):
    prepare_process()
    tasks = [
        [Document("menu\n" + "\n".join(f"{word} {i}" for word in "abc"), f"{t}/{i}") for i in range(5)]
        for t in range(3)
    ]
    written = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        for rank, task in enumerate(tasks):
            list(DocumentWriter("input", folder / "input").run(task, rank))
        run_phases(phases(folder, 3, 2), ExecutionArguments(workers=workers), folder / "logs")
        written.append({kind: files(folder / kind) for kind in ("lines", "output")})
    assert written[0] == written[1]

    # Killed while it wrote: halves of files lie beside, and the tasks have no marks.
    for file in list((folder / "lines").rglob("*.npy")):
        file.with_name(f".{file.name}.1.partial").write_bytes(file.read_bytes()[:20])
        if file.name.startswith("00001"):
            file.unlink()
    for mark in (folder / "logs").rglob("completions/*"):
        mark.unlink()
    run_phases(phases(folder, 3, 2), ExecutionArguments(workers=1), folder / "logs")
    again = {kind: files(folder / kind) for kind in ("lines", "output")}
    again["lines"] = {name: content for name, content in again["lines"].items() if not name.endswith(".partial")}
    assert again == written[0]
    texts = [document.text for document in read_documents(folder / "output/00000.jsonl.zst")]
    assert texts == ["menu\na 0\nb 0\nc 0"]  # digits count as 0: the other lines and documents are repeats
