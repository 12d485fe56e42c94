"""What a whole Common Crawl snapshot would take, projected from the report of a small run of the text pipeline.

    python -m benchmarks.text_projection runs/web/report.json [--shards 1600] [--cores 100 1000 5000]

Prints Markdown: core hours of each stage, hours by the clock, memory and disk of line deduplication, disk of what lies
between phases, and every assumption. All is proportional to the number of documents: it is a rule of three, and as good
as the run's documents are like the snapshot's.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_cards.readable_numbers import count, quantity, rounded

TIB = 2**40
# May 2024, CC-MAIN-2024-22. Pages and uncompressed size: "May 2024 Crawl Archive Now Available", commoncrawl.org/blog.
# Compressed sizes: from the crawls' own index pages, as github.com/eugenesiow/LLM-Insights lists them.
SNAPSHOT = "CC-MAIN-2024-22"
SNAPSHOT_DOCUMENTS = 2.7e9
SNAPSHOT_BYTES = {"WARC": 78.62 * TIB, "WET": 7.31 * TIB}
CCNET_DOCUMENTS_PER_SECOND = 40  # of a core, the whole pipeline: arXiv 1911.00359
HASH_BYTES_ON_DISK = 12  # of a line: its hash and its place
PACKED = 0.40  # JSON lines under zstd level 1, of their text's size: 0.39 to 0.41 on first paragraphs of Wikipedia


@dataclass
class Projection:
    """Seconds and hours are of the snapshot.

    Attributes:
        core_hours: stage -> hours of one core.
        serial_hours: of `core_hours`, what one task does alone while others wait.
        lines: that are hashed.
        group_hashes: lines whose hashes are compared with one another: of one group of shards.
        phase_bytes: phase -> bytes of text after it.
    """

    documents: float
    core_hours: dict[str, float]
    serial_hours: float
    lines: float
    group_hashes: float
    phase_bytes: dict[str, float]

    @property
    def total_core_hours(self) -> float:
        return sum(self.core_hours.values())

    def wall_hours(self, cores: int) -> float:
        """Amdahl's law: what can be shared by `cores` cores is, the rest takes its time."""
        return self.serial_hours + (self.total_core_hours - self.serial_hours) / cores


def project(report: dict[str, Any], documents: float, shards: int, shards_per_group: int) -> Projection:
    """Scales the content of a `report.json` to `documents`, which lie in as many `shards` of equal size.

    Raises ValueError where the report is of no documents, or a group has more shards than there are.
    """
    if not report["documents_in"]:
        raise ValueError("The report is of no documents: make one of a run that read some.")
    if not 1 <= shards_per_group <= shards:
        raise ValueError(f"--shards_per_group is {shards_per_group}: give 1 to {shards}, the number of shards.")
    scale = documents / report["documents_in"]
    seconds = {name: figures["seconds"] for name, figures in report["timing"]["stages"].items()}
    core_hours = {name: value * scale / 3600 for name, value in seconds.items()}
    # A stage of one task in a run of several is one that cannot be split.
    several = report["stages"][0]["tasks"] > 1
    serial = [stage["stage"] for stage in report["stages"] if several and stage["tasks"] == 1]
    lines = sum(stage["counts"].get("lines", 0) for stage in report["stages"] if stage["stage"] == "hash_lines") * scale
    phase_bytes = {
        stage["phase"]: stage["bytes_out"] * scale for stage in report["stages"] if stage["kind"] == "documents"
    }
    return Projection(
        documents=documents,
        core_hours=core_hours,
        serial_hours=sum(core_hours[name] for name in serial),
        lines=lines,
        group_hashes=lines * shards_per_group / shards,
        phase_bytes=phase_bytes,
    )


def markdown(projection: Projection, report: dict[str, Any], options: argparse.Namespace) -> str:
    total = projection.total_core_hours
    lines = [
        f"{count(projection.documents)} documents in {options.shards:,} shards.",
        "",
        "| Stage | Core hours | Share |",
        "|:---|---:|---:|",
        *(
            f"| {name} | {hours(value)} | {value / total:.1%} |"
            for name, value in projection.core_hours.items()
            if total
        ),
        f"| **all** | **{hours(total)}** | |",
        f"| CCNet, at its 40 documents a second and core | {hours(ccnet_hours(projection.documents))} | |",
        "",
        "| Cores | Hours by the clock |",
        "|---:|---:|",
        *(f"| {cores:,} | {hours(projection.wall_hours(cores))} |" for cores in options.cores),
        "",
        "| Memory and disk | |",
        "|:---|---:|",
    ]
    if projection.lines:
        group_bytes = projection.group_hashes * options.bytes_per_hash
        lines += [
            f"| Lines hashed | {count(projection.lines)} |",
            f"| Hashes compared at once, of {options.shards_per_group} shards | {count(projection.group_hashes)} |",
            f"| Memory of a task that compares them, of {options.partitions} a group "
            f"| {rounded(group_bytes / options.partitions, 'B')} |",
            f"| Disk for all hashes | {rounded(projection.lines * HASH_BYTES_ON_DISK, 'B')} |",
        ]
    lines += [f"| Input, {kind} | {quantity(size, 'B')} |" for kind, size in SNAPSHOT_BYTES.items()]
    lines += [
        f"| Documents after {phase}, packed | {rounded(size * PACKED, 'B')} |"
        for phase, size in projection.phase_bytes.items()
    ]
    return "\n".join([*lines, "", "Assumed:", "", *(f"- {one}" for one in assumptions(projection, report, options))])


def assumptions(projection: Projection, report: dict[str, Any], options: argparse.Namespace) -> list[str]:
    read = report["documents_in"]
    mean = report["stages"][0]["bytes_out"] / read
    machine = ", ".join(f"{name} {value}" for name, value in report["timing"]["hardware"].items())
    sorting = math.log(projection.documents) / math.log(max(read, 2))
    stated = [
        f"{SNAPSHOT} has {count(SNAPSHOT_DOCUMENTS)} pages; here {count(projection.documents)} are projected.",
        f"Time and bytes are proportional to documents: a stage sees, drops and takes as much of the snapshot's as of "
        f"the {count(read)} documents of the run, whose mean is {quantity(mean, 'B')} as read; the snapshot's is "
        f"{quantity(SNAPSHOT_BYTES['WET'] / SNAPSHOT_DOCUMENTS, 'B')} of gzipped text. Duplicates "
        f"are more frequent in more text, so more lines would be dropped, and later stages would see less.",
        f"Cores are as fast as the run's{f' ({machine})' if machine else ''}, and all are busy from a phase's start to "
        f"its end. Downloads, queues and the network take no time.",
        f"Sorting is taken as proportional; n log n would be {sorting:.1f} times as much for what sorts.",
        f"Lines are deduplicated within groups of {options.shards_per_group} shards, as CCNet holds those of 50 in "
        f"memory; comparing takes {options.bytes_per_hash} bytes a hash at its peak.",
        f"Text between phases is packed to {PACKED:.0%} of its size.",
    ]
    if projection.serial_hours:
        stated.append(f"{hours(projection.serial_hours)} core hours are of stages of one task, which others wait for.")
    return stated


def share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def ccnet_hours(documents: float) -> float:
    return documents / CCNET_DOCUMENTS_PER_SECOND / 3600


def hours(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the report.json of a run")
    parser.add_argument("--documents", type=float, default=SNAPSHOT_DOCUMENTS, help="pages of the snapshot")
    parser.add_argument("--shards", type=int, default=1600, help="CCNet's 1600")
    parser.add_argument("--shards_per_group", type=int, default=50, help="shards deduplicated together; CCNet's 50")
    parser.add_argument("--partitions", type=int, default=16, help="tasks that share the hashes of a group")
    parser.add_argument(
        "--bytes_per_hash",
        type=float,
        default=12,
        help="peak memory of comparing, as benchmarks.line_dedup measures it",
    )
    parser.add_argument("--cores", type=int, nargs="+", default=[100, 1000, 5000])
    options = parser.parse_args()
    try:
        report = json.loads(options.report.read_text(encoding="utf-8"))
        projection = project(report, options.documents, options.shards, options.shards_per_group)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"{options.report}: {error}")
    print(markdown(projection, report, options))


if __name__ == "__main__":
    main()
