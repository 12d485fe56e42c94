"""How fast are duplicate lines dropped, ours against datatrove's blocks, and what does it cost of disk and memory?

    python -m benchmarks.line_dedup --html_folder FOLDER [--rounds 5]

Both run their three steps (hash, find, drop) on the same documents in memory on one core, and take turns. Long
documents are all the text of the pages in a folder of HTML, menus included; short ones a text data set, a sentence a
line. datatrove compares single lines (`n_sentences=1`, `split_sentences=False`); neither drops documents for their
length. Its lines left are others: it keeps empty lines, and it removes ASCII's punctuation and accents to compare.
xxhash 4 takes no strings, which datatrove gives it: here they are encoded for it, since its SHA-1 is slower.

Disk and memory are of `FindDuplicateLines` in one partition, on hashes drawn at random from as many values as there are
hashes, so that 37 % repeat another; with several partitions each holds its part.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from datatrove.data import Document
from datatrove.pipeline.dedup import SentDedupConfig, SentenceDedupFilter, SentenceDedupSignature, SentenceFindDedups
from loguru import logger
from resiliparse.extract.html2text import extract_plain_text

from benchmarks import measure
from training.text_data import load_text_dataset
from training.text_pipeline.line_dedup import DropDuplicateLines, FindDuplicateLines, HashLines, task_file
from training.text_pipeline.places import PLACE, save_array
from training.text_pipeline.words import WORDS

TASKS = 4
PARTITIONS = 4

Tasks = list[list[Document]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html_folder", type=Path, required=True, help="Folder of HTML pages: the long documents.")
    parser.add_argument("--dataset", default="wikipedia_leads", help="Text data set: the short documents.")
    parser.add_argument("--pages", type=int, default=1000, help="Long documents, at most.")
    parser.add_argument("--rounds", type=int, default=5, help="Rounds, in which both take turns.")
    parser.add_argument("--hashes", type=int, default=20_000_000, help="Hashes for the memory, in 20 tasks.")
    arguments = parser.parse_args()

    logger.remove()
    kinds = {
        "long": read_pages(arguments.html_folder, arguments.pages),
        "short": [text.replace(". ", ".\n") for text in load_text_dataset(arguments.dataset, "train")["text"]],
    }
    speed = {kind: compare(texts, arguments.rounds) for kind, texts in kinds.items()}
    memory = measure_memory(arguments.hashes)
    print_tables(speed, memory)
    shown = vars(arguments) | {"html_folder": arguments.html_folder.name, "tasks": TASKS, "partitions": PARTITIONS}
    results = {"arguments": shown, "documents": speed, "memory": memory}
    measure.save("line_dedup", results, ("datatrove", "numpy", "resiliparse", "xxhash"))


def read_pages(folder: Path, pages: int) -> list[str]:
    """All the text of so many pages, spread evenly over the folder's."""
    files = sorted(folder.rglob("*.html"))
    files = files[:: max(1, len(files) // pages)][:pages]
    return [extract_plain_text(file.read_bytes().decode("utf-8", "replace")) for file in files]


def compare(texts: list[str], rounds: int) -> dict:
    candidates: dict[str, Callable[[Tasks, Path], list[Document]]] = {
        "datatrove": run_datatrove,
        "hf_models": run_ours,
    }
    seconds, lines_left = {}, {}

    def deduplication(name: str):
        def deduplicate():
            tasks = [[Document(text, str(i)) for i, text in enumerate(texts)][task::TASKS] for task in range(TASKS)]
            with (
                tempfile.TemporaryDirectory() as folder,
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stderr(nowhere),
            ):
                started = time.process_time()  # of this process alone, however busy the machine is
                documents = candidates[name](tasks, Path(folder))
                seconds.setdefault(name, []).append(time.process_time() - started)
            lines_left[name] = sum(document.text.count("\n") + 1 for document in documents)

        return deduplicate

    measure.interleave({name: deduplication(name) for name in candidates}, rounds, warmup=1)
    timed = {name: times[1:] for name, times in seconds.items()}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "documents": len(texts),
        "megabytes": round(megabytes, 3),
        "lines": sum(text.count("\n") + 1 for text in texts),
        "speedup": measure.speedup(timed["datatrove"], timed["hf_models"]),
        "candidates": {
            name: {
                "seconds": [round(value, 4) for value in times],
                "documents_per_second": round(len(texts) / statistics.median(times), 1),
                "megabytes_per_second": round(megabytes / statistics.median(times), 2),
                "lines_left": lines_left[name],
            }
            for name, times in timed.items()
        },
    }


def run_ours(tasks: Tasks, folder: Path) -> list[Document]:
    for rank, task in enumerate(tasks):
        for _ in HashLines(folder).run(task, rank, TASKS):
            pass
    for rank in range(PARTITIONS):
        FindDuplicateLines(folder, TASKS, "keep_first").run(None, rank, PARTITIONS)
    drop = DropDuplicateLines(folder, PARTITIONS, min_document_characters=0)
    return [document for rank, task in enumerate(tasks) for document in drop.run(task, rank, TASKS)]


def run_datatrove(tasks: Tasks, folder: Path) -> list[Document]:
    config = SentDedupConfig(n_sentences=1, split_sentences=False, min_doc_words=0, min_num_sentences=0)
    hashes, found = str(folder / "hashes"), str(folder / "found")
    signature = SentenceDedupSignature(hashes, finder_workers=PARTITIONS, config=config, language=WORDS)
    signature.hash_fc = lambda line: xxhash.xxh64_intdigest(line.encode())
    for rank, task in enumerate(tasks):
        signature.run(task, rank, TASKS)
    for rank in range(PARTITIONS):
        SentenceFindDedups(hashes, found, config=config, lines_to_buffer=1000).run(None, rank, PARTITIONS)
    drop = SentenceDedupFilter(found, config=config, language=WORDS)
    return [document for rank, task in enumerate(tasks) for document in drop.run(task, rank, TASKS)]


def measure_memory(hashes: int, tasks: int = 20) -> dict:
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in range(tasks):
            # Spread over the whole range by an odd factor.
            drawn = draw.integers(hashes, size=hashes // tasks, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            save_array(task_file(folder, "hashes", task), np.sort(drawn))
            save_array(task_file(folder, "places", task), np.arange(len(drawn), dtype=PLACE))
        disk = sum(file.stat().st_size for file in folder.rglob("*.npy"))
        started = time.process_time()
        find_duplicates(folder, tasks)()
        seconds = time.process_time() - started
        dropped = sum(file.stat().st_size for file in (folder / "drop").glob("*.npy"))
        peak = measure.peak_memory(find_duplicates, folder, tasks)
    return {
        "hashes": hashes,
        "disk_bytes_per_hash": round(disk / hashes, 2),
        "found_bytes_per_hash": round(dropped / hashes, 2),
        "peak_bytes_per_hash": round(peak / hashes, 2),
        "hashes_per_second": round(hashes / seconds),
    }


def find_duplicates(folder: Path, tasks: int) -> Callable[[], object]:
    return lambda: FindDuplicateLines(folder, tasks, "keep_first").run(None, 0, 1)


def print_tables(speed: dict, memory: dict) -> None:
    for kind, measured in speed.items():
        measure.print_table(
            f"{measured['documents']} {kind} documents, {measured['megabytes']} MB, {measured['lines']} lines: "
            "{ratio:.2f} times as fast ({lower:.2f} to {upper:.2f})".format(**measured["speedup"]),
            ["line deduplication", "documents/s", "MB/s", "lines left"],
            [
                [
                    name,
                    f"{figures['documents_per_second']:,.0f}",
                    f"{figures['megabytes_per_second']:.1f}",
                    f"{figures['lines_left']:,}",
                ]
                for name, figures in measured["candidates"].items()
            ],
        )
    measure.print_table(
        f"Finding duplicates among {memory['hashes']:,} hashes, {memory['hashes_per_second']:,} a second",
        ["for 10^9 hashes", "GB"],
        [
            ["disk: hashes and places", f"{memory['disk_bytes_per_hash']:.1f}"],
            ["disk: places to drop", f"{memory['found_bytes_per_hash']:.1f}"],
            ["memory, of all partitions together", f"{memory['peak_bytes_per_hash']:.1f}"],
        ],
    )


if __name__ == "__main__":
    main()
