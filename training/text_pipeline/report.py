"""What a run of the pipeline dropped, kept and took, as numbers: `report.json`, from the tallies of all its tasks.

What depends on the input and the options alone stands beside `timing`, which holds the rest: two runs of the same
input give the same bytes but for that entry. `report_page` makes the pages from these numbers.
"""

import itertools
import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from .document_files import ParquetDocuments
from .stage import FolderStage
from .tally import NAMED_BAD_INPUTS, Tally, replace_file

TALLIES, LOGS = "tallies", "logs"  # of the working folder: TALLIES/STAGE/RANK.json, and datatrove's LOGS/PHASE/
TOP_DOMAINS = 20  # a stage
BAD = "bad: "  # before the reason in the counts of a tally: see `Tally.bad`
LOG_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?")


class StageTotal(NamedTuple):
    tasks: int
    tally: Tally


class WriteReport(FolderStage):
    """The last phase, of one task: writes `report.json`, `report.html`, `README.md` and `card_assets/`.

    Args:
        work: the run's working folder, with the tallies and logs.
        output: the folder of the data set: its documents are in `output/documents/`.
        stages: in the order in which documents pass; each is `{"stage", "phase", "kind", "what"}`: name, name of its
            phase, "documents" for a stage that documents pass through and "work" for one that reads and writes other
            files, and what it does, in one sentence.
        facts: see `build_report`.
    """

    name = "report"

    def __init__(self, work: Path, output: Path, stages: list[dict[str, str]], facts: dict[str, Any]):
        super().__init__()
        self.working_folder, self.output, self.stages, self.facts = Path(work), Path(output), stages, facts

    def work(self, rank: int, world_size: int) -> None:
        from .report_page import write_card, write_page  # with matplotlib, which no other task has to load

        totals = read_tallies(self.working_folder / TALLIES, self.stages)
        report = build_report(totals, self.stages, self.facts, self.working_folder / LOGS)
        content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        replace_file(self.output / "report.json", content.encode("utf-8", "backslashreplace"))
        write_page(self.output / "report.html", report, {name: total.tally.samples for name, total in totals.items()})
        write_card(self.output, report)


def build_report(
    totals: dict[str, StageTotal], stages: list[dict[str, str]], facts: dict[str, Any], logs: Path
) -> dict[str, Any]:
    """The content of `report.json`.

    Args:
        totals: of `read_tallies`.
        facts: what no tally knows. `name` of the data set; `command`; `arguments`, those that decide what is written;
            `execution`, those that do not, such as `workers`; `hardware`; `input`, its `source` and number of `files`;
            `models`, each with `stage`, `path` and `note`, where it comes from and what stood in for data that could
            not be had; `license`, in the Hub's spelling.
        logs: datatrove's, one folder a phase.

    Raises ValueError, with the stage's name, where documents were lost or made between stages or within one.
    """
    check_documents(totals, stages)
    numbers = [stage_numbers(stage, totals[stage["stage"]]) for stage in stages]
    passed = [stage for stage in numbers if stage["kind"] == "documents"]
    first, last = passed[0], passed[-1]
    return {
        "name": facts.get("name", "documents"),
        "license": facts.get("license", "other"),
        "command": facts.get("command"),
        "arguments": facts.get("arguments", {}),
        "input": {"source": None, "files": None} | facts.get("input", {}),
        "models": facts.get("models", []),
        "documents_in": first["documents_in"] or first["documents_out"],
        "bytes_in": first["bytes_in"],
        "documents_out": last["documents_out"],
        "bytes_out": last["bytes_out"],
        "languages": languages(passed),
        "bad_inputs": bad_inputs([totals[stage["stage"]].tally for stage in stages]),
        "stages": numbers,
        "timing": timing(totals, stages, facts, logs, first["documents_in"] or first["documents_out"]),
    }


def read_tallies(folder: Path, stages: list[dict[str, str]]) -> dict[str, StageTotal]:
    """Stage -> its tally over all tasks, and how many tasks there were. Raises ValueError where a stage has none."""
    totals = {}
    for name in (stage["stage"] for stage in stages):
        files = sorted((Path(folder) / name).glob("*.json"))
        if not files:
            raise ValueError(f"The stage {name} left no tally: run the pipeline again, so that it is done over.")
        totals[name] = StageTotal(len(files), Tally.total(name, map(Tally.load, files)))
    return totals


def check_documents(totals: dict[str, StageTotal], stages: list[dict[str, str]]) -> None:
    passed = [totals[stage["stage"]].tally for stage in stages if stage["kind"] == "documents"]
    if not passed:
        raise ValueError("No stage of this run saw documents: there is nothing to report.")
    for before, tally in itertools.pairwise(passed):
        if tally.documents_in != before.documents_out:
            raise ValueError(
                f"The stage {tally.stage} was given {tally.documents_in:,} documents, but {before.stage} before it "
                f"passed on {before.documents_out:,}: remove the working folder and run the pipeline again."
            )
        if (missing := tally.documents_in - tally.dropped.total() - tally.documents_out) != 0:
            raise ValueError(
                f"The stage {tally.stage} was given {tally.documents_in:,} documents, of which it passed on "
                f"{tally.documents_out:,} and dropped {tally.dropped.total():,}: {abs(missing):,} are unaccounted for."
            )


def stage_numbers(stage: dict[str, str], total: StageTotal) -> dict[str, Any]:
    """What is reproducible of one stage: documents and bytes, reasons of drops, counts, histograms, domains."""
    tally = total.tally
    numbers = {name: stage[name] for name in ("stage", "phase", "kind", "what")} | {"tasks": total.tasks}
    if stage["kind"] == "documents":
        numbers |= {name: getattr(tally, name) for name in ("documents_in", "bytes_in", "documents_out", "bytes_out")}
    histograms = {"bytes_in": tally.sizes_in, "bytes_out": tally.sizes_out} | tally.histograms
    return numbers | {
        "dropped": {
            reason: {"documents": documents, "bytes": tally.dropped_bytes[reason]}
            for reason, documents in most_first(tally.dropped)
        },
        "counts": dict(sorted(tally.counts.items())),
        "histograms": {name: sorted_bins(histograms[name]) for name in sorted(histograms) if histograms[name]},
        "dropped_domains": dict(most_first(tally.dropped_domains)[:TOP_DOMAINS]),
    }


def most_first(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def sorted_bins(bins: dict[str, int]) -> dict[str, int]:
    """By the lower edge where all bins are numbers; else, of labels, the fullest first."""
    try:
        return dict(sorted(bins.items(), key=lambda entry: float(entry[0])))
    except ValueError:
        return dict(most_first(bins))


def languages(stages: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Language -> documents that were identified as it, and that are left at the end; empty where nobody asked."""
    # Counted by the stage that identifies them, and by the one that writes the documents.
    counted = {s["stage"]: s["histograms"]["languages"] for s in stages if "languages" in s["histograms"]}
    identified, left = next(iter(counted.values()), {}), counted.get(ParquetDocuments.name, {})
    return {language: {"identified": n, "kept": left.get(language, 0)} for language, n in most_first(identified)}


def bad_inputs(tallies: Iterable[Tally]) -> dict[str, Any]:
    """Input that was skipped: how often for what reason, and the first places of it."""
    reasons, named = {}, []
    for tally in tallies:
        for name, number in tally.counts.items():
            if name.startswith(BAD):
                reason = name.removeprefix(BAD)
                reasons[reason] = reasons.get(reason, 0) + number
        named += tally.bad_inputs
    return {"count": sum(reasons.values()), "reasons": dict(most_first(reasons)), "named": named[:NAMED_BAD_INPUTS]}


def timing(
    totals: dict[str, StageTotal], stages: list[dict[str, str]], facts: dict[str, Any], logs: Path, documents: int
) -> dict[str, Any]:
    """Seconds are of one core but for `wall_seconds`; rates are of one core, of what a stage was given."""
    by_stage = {}
    for name, (_, tally) in totals.items():
        by_stage[name] = {"seconds": round(tally.seconds, 3)}
        if tally.seconds > 0 and tally.bytes_in:
            documents_in = tally.documents_in or tally.documents_out
            by_stage[name] |= {
                "documents_per_second": float(f"{documents_in / tally.seconds:.4g}"),
                "bytes_per_second": float(f"{tally.bytes_in / tally.seconds:.4g}"),
            }
    phases = {phase: wall_seconds(logs / phase) for phase in dict.fromkeys(stage["phase"] for stage in stages)}
    core_seconds = sum(total.tally.seconds for total in totals.values())
    wall = [seconds for seconds in phases.values() if seconds is not None]
    return {
        "core_seconds": round(core_seconds, 3),
        "documents_per_core_second": float(f"{documents / core_seconds:.4g}") if core_seconds else None,
        "wall_seconds": round(sum(wall), 1) if wall else None,
        "wall_seconds_by_phase": phases,
        "stages": by_stage,
        "execution": {"workers": None} | facts.get("execution", {}),
        "hardware": facts.get("hardware", {}),
    }


def wall_seconds(phase: Path) -> float | None:
    """Seconds during which at least one of the phase's tasks ran, from datatrove's logs; pauses do not count.

    A task begins at the first line of its log, and ends when its mark of completion is made.
    """
    times = []
    for mark in (phase / "completions").glob("*"):
        log = phase / "logs" / f"task_{mark.name}.log"
        if log.is_file():
            with log.open(encoding="utf-8", errors="replace") as lines:
                began = LOG_TIME.search(next(lines, ""))
            if began:
                times.append((datetime.fromisoformat(began[0]).timestamp(), mark.stat().st_mtime))
    if not times:
        return None
    seconds, until = 0.0, float("-inf")
    for began, ended in sorted(times):
        seconds += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return round(seconds, 1)
