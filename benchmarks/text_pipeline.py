"""How many documents a second does the text pipeline take, stage by stage, and what does a second worker bring?

    python -m benchmarks.text_pipeline 'crawl/*.warc.gz' --language_model lid.176.ftz --languages en \\
        --perplexity_models FOLDER --reference_model FILE --decontaminate FILE [--rounds 2]

Two pipelines, on the same pages:
- whole: from WARC files through every stage.
- ccnet: what CCNet does (arXiv 1911.00359), from its kind of input: line deduplication, language identification and
  perplexity of a WET file, which this script writes from the text that was extracted. CCNet's paper gives 40 documents
  a second and worker for it.

Rates are of CPU time (of one worker, where nothing else shares its core), which hardly depends on what else the machine
does; the gain by a second worker is by the clock, runs with one and with two taking turns. `benchmarks.line_dedup` and
`benchmarks.language_id` compare these two stages with datatrove's blocks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from warcio.warcwriter import WARCWriter

from benchmarks import measure

CCNET_DOCUMENTS_PER_SECOND = 40
NOTHING = {"line_dedup": "off", "quality_rules": "off", "near_duplicates": "false", "mask_emails": "false"}
NOTHING |= {"mask_ips": "false"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="WARC files: a file, folder or pattern, best as many files as fill two workers")
    parser.add_argument("--language_model", required=True)
    parser.add_argument("--languages", default="en")
    parser.add_argument("--perplexity_models", required=True)
    parser.add_argument("--reference_model", required=True)
    parser.add_argument("--decontaminate", required=True)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    arguments = vars(parser.parse_args())
    rounds, dataset = arguments.pop("rounds"), arguments.pop("dataset")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        common = {"task_bytes": 1}  # a task for each file
        extracted = prepare(folder / "extracted", {"dataset": dataset} | NOTHING | common, 2)
        wet = write_wet(folder / "extracted" / "documents", folder / "wet")
        ccnet = {name: arguments[name] for name in ("language_model", "languages", "perplexity_models")}
        pipelines = {
            "whole": {"dataset": dataset} | arguments | common,
            "ccnet": {"dataset": str(wet)} | common | NOTHING | {"line_dedup": "keep_first"} | ccnet,
        }
        reports: dict[str, dict[int, list[dict]]] = {name: {1: [], 2: []} for name in pipelines}
        for i in range(rounds):
            for name, options in pipelines.items():
                for workers in (1, 2) if i % 2 else (2, 1):
                    place = folder / f"{name}-{workers}-{i}"
                    reports[name][workers].append(prepare(place, options, workers))
    results = {name: summary(name, by_workers) for name, by_workers in reports.items()}
    shown = {name: Path(value).name for name, value in arguments.items()} | {"rounds": rounds}
    shown["pages"], shown["bytes_of_text"] = extracted["documents_in"], extracted["bytes_out"]
    measure.save("text_pipeline", {"arguments": shown, "pipelines": results}, ("datatrove", "resiliparse", "fastwarc"))


def prepare(place: Path, options: dict[str, Any], workers: int) -> dict[str, Any]:
    """Runs the command; returns its `report.json`."""
    words = [sys.executable, "-m", "training.prepare_text", "--output_dir", str(place), "--workers", str(workers)]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(ended.stderr)
    return json.loads((place / "report.json").read_text(encoding="utf-8"))


def write_wet(documents: Path, folder: Path) -> Path:
    """The text of the parquet files as conversion records, as Common Crawl's WET files have it; one file for each."""
    folder.mkdir()
    for file in sorted(documents.glob("*.parquet")):
        with (folder / f"{file.stem}.warc.wet.gz").open("wb") as stream:
            writer = WARCWriter(stream, gzip=True)
            for row in pq.read_table(file, columns=["url", "text"]).to_pylist():
                headers = {"Content-Type": "text/plain"}
                record = writer.create_warc_record(
                    row["url"], "conversion", payload=BytesIO(row["text"].encode()), warc_headers_dict=headers
                )
                writer.write_record(record)
    return folder


def summary(name: str, by_workers: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the runs with one worker; prints them as a table."""
    alone = by_workers[1]
    stages = {}
    for stage in alone[0]["stages"]:
        seconds = statistics.median(report["timing"]["stages"][stage["stage"]]["seconds"] for report in alone)
        documents, size = stage.get("documents_in") or stage.get("documents_out"), stage.get("bytes_in")
        stages[stage["stage"]] = {"core_seconds": round(seconds, 2)}
        if documents and seconds:
            stages[stage["stage"]] |= {
                "documents": documents,
                "documents_per_second": round(documents / seconds),
                "megabytes_per_second": round(size / seconds / 1e6, 2),
            }
    core_seconds = statistics.median(report["timing"]["core_seconds"] for report in alone)
    wall = {
        workers: [report["timing"]["wall_seconds"] for report in reports] for workers, reports in by_workers.items()
    }
    gains = [one / two for one, two in zip(wall[1], wall[2], strict=True)]
    rate = alone[0]["documents_in"] / core_seconds
    rows = [
        [
            stage,
            f"{entry['core_seconds']:.1f}",
            str(entry.get("documents", "")),
            str(entry.get("documents_per_second", "")),
            str(entry.get("megabytes_per_second", "")),
        ]
        for stage, entry in stages.items()
    ]
    title = (
        f"{name}: {rate:.0f} documents a core-second, {rate / CCNET_DOCUMENTS_PER_SECOND:.1f} x CCNet's "
        f"{CCNET_DOCUMENTS_PER_SECOND}; two workers {statistics.median(gains):.2f} x as fast as one by the clock"
    )
    measure.print_table(title, ["stage", "core seconds", "documents", "documents/s", "MB/s"], rows)
    return {
        "documents_in": alone[0]["documents_in"],
        "documents_out": alone[0]["documents_out"],
        "core_seconds": round(core_seconds, 1),
        "documents_per_core_second": round(rate, 1),
        "times_ccnet": round(rate / CCNET_DOCUMENTS_PER_SECOND, 2),
        "wall_seconds": {str(workers): seconds for workers, seconds in wall.items()},
        "gain_of_two_workers": [round(gain, 2) for gain in gains],
        "stages": stages,
    }


if __name__ == "__main__":
    main()
