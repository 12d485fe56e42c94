"""Turns raw pages or texts into clean documents and token shards, and reports what every stage dropped and why.

    python -m training.prepare_text --config training/recipes/text_pipeline/quickstart.yaml
    python -m training.prepare_text --config training/recipes/text_pipeline/llama_mixture.yaml

The first form prepares one `--dataset`: it reads, extracts, drops repeated lines, identifies languages, applies rules,
scores, masks, decontaminates, drops near-duplicates, and with `--tokenizer` tokenises. The second takes `sources`, each
prepared by a recipe of its own or finished already, and mixes their tokens.

    OUTPUT/documents/*.parquet   the clean documents          OUTPUT/report.html   what was dropped, to read
    OUTPUT/tokens/*.parquet      shards for `pretrain_lm`     OUTPUT/report.json   the same as numbers
    OUTPUT/README.md             the data set's card          OUTPUT/work/         what it takes to go on after a stop
    OUTPUT/cutoffs.json          measured cut-offs of perplexity, for `--perplexity_cutoffs` of other runs

What is written depends on the input and the options, never on the number of workers. The same command again goes on
after an interruption, or says that the data is finished. The stages are in `training/text_pipeline/`.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .command_line import parse_arguments, plain_errors
from .run_record import RunRecord, portable
from .text_pipeline.decontamination import Decontaminate
from .text_pipeline.execution import ExecutionArguments, Phase, PhaseError, run_phases
from .text_pipeline.language_id import check_language_model
from .text_pipeline.local_executor import prepare_process
from .text_pipeline.mixture_inputs import (
    MixArguments,
    document_phases,
    mixture_phases,
    open_fast_tokenizer,
    read_sources,
)
from .text_pipeline.perplexity import check_perplexity
from .text_pipeline.reading import plan_tasks
from .text_pipeline.reference_classifier import check_reference_model
from .text_pipeline.report import LOGS, TALLIES, WriteReport
from .text_pipeline.source_phases import CONTAMINATED, SourceArguments, describe_stages, source_phases


@dataclass
class OutputArguments:
    output_dir: str = field(default="runs/text", metadata={"help": "Folder of the data, new or of the same run."})
    license: str = field(
        default="other", metadata={"help": "Licence of the documents as the Hub spells it, for the data set's card."}
    )
    keep_work: bool = field(
        default=False, metadata={"help": "Keep what the phases left for one another, to run a later stage by hand."}
    )


PARTS = (SourceArguments, MixArguments, OutputArguments)
# What changes nothing in what is written, and so may be another at each start.
HOW = {item.name for item in fields(ExecutionArguments)} | {"keep_work", "max_bad_share"}
PLACE = {"output_dir", "config", "processes"}


@dataclass
class Preparation:
    """What was asked for, by parts; `given` as `parse_arguments` returns it."""

    source: SourceArguments
    mix: MixArguments
    output: OutputArguments
    execution: ExecutionArguments
    given: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.output.output_dir)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @classmethod
    def from_recipe(cls, recipe: str, execution: ExecutionArguments) -> "Preparation":
        """Of a mixture's source; what runs the tasks is the mixture's.

        Raises:
            ValueError: fields that there are not, or that only the mixture can have.
        """
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        parts, given = [], {}
        for part in PARTS:
            named = {item.name: content.pop(item.name) for item in fields(part) if item.name in content}
            parts.append(part(**named))
            given |= named
        if unknown := [name for name in content if name not in HOW]:
            raise ValueError(f"Unknown field {unknown[0]!r} in {recipe}: `--help` lists the fields there are.")
        return cls(*parts, execution, given)


def prepare(asked: Preparation) -> None:
    """Runs what is not done yet.

    Raises:
        ValueError, OSError: what the user gave cannot be used; before any work is spent, but for a mixture's sources,
            which are prepared first, and for what only the documents themselves show.
    """
    if asked.mix.tokenizer:
        open_fast_tokenizer(asked.mix.tokenizer)
    if asked.mix.sources:
        prepare_sources(asked)
        sources = read_sources(asked.mix)
        inputs = {"files": len(sources.files), "fingerprint": sources.fingerprint()}
        data = {"sources": inputs}
    else:
        tasks, left_out = plan_tasks(asked.source)
        if left_out:
            print("Not read: " + ", ".join(f"{number} {suffix}" for suffix, number in left_out.items()), flush=True)
        check_models(asked.source)
        inputs = describe_files([Path(file) for task in tasks for file in task])
        data = {"dataset": {"path": asked.source.dataset} | inputs}
        if judges := judging_files(asked.source):
            data["models and evaluation sets"] = describe_files(judges)
    decides = {name: value for name, value in asked.given.items() if name not in HOW}
    record = RunRecord.start(asked.folder, "prepare_text", decides, data)
    if record.finished:
        print(f"{asked.folder} holds this data, finished: report.html in it tells what was dropped.")
        return
    record.save(execution={name: value for name, value in asked.given.items() if name in HOW})
    documents, tokens = asked.folder / "documents", asked.folder / "tokens"
    if asked.mix.sources:
        phases = mixture_phases(asked.mix, sources, asked.work, tokens)
    else:
        phases = source_phases(asked.source, tasks, asked.work, documents)
        if asked.mix.tokenizer:
            phases += document_phases(asked.mix, documents, len(tasks), asked.work, tokens)
    facts = {
        "name": asked.folder.name,
        "command": record.content["command"],
        "license": asked.output.license,
        "arguments": {name: value for name, value in record.content["arguments"].items() if name not in PLACE},
        "input": {"source": record.content["data"].get("dataset", {}).get("path")} | inputs,
        "models": describe_models(asked.source),
        "execution": {"executor": asked.execution.executor, "workers": asked.execution.workers},
        "hardware": record.content["hardware"],
    }
    report = WriteReport(asked.work, asked.folder, describe_stages(phases), facts)
    phases.append(Phase("report", [report], 1))
    for step in (step for phase in phases for step in phase.steps):
        step.tally_folder = asked.work / TALLIES
    if run_phases(phases, asked.execution, asked.work / LOGS):
        finish(asked, record)
    else:
        print(f"Submitted. The last job writes {asked.folder / 'report.html'}; the same command then closes the run.")


def prepare_sources(asked: Preparation) -> None:
    """Prepares what a mixture takes from recipes and what is not finished; on Slurm that is a job for each before."""
    for name, source in asked.mix.sources.items():
        if "recipe" not in source:
            continue
        part = Preparation.from_recipe(source["recipe"], asked.execution)
        if asked.execution.executor == "slurm" and not (part.folder / "report.json").exists():
            raise ValueError(
                f"The source {name!r} is not prepared yet, and jobs on Slurm cannot be waited for: run "
                f"`python -m training.prepare_text --config {source['recipe']}` with the same --executor first."
            )
        print(f"Source {name}: {source['recipe']}", flush=True)
        prepare(part)


def check_models(source: SourceArguments) -> None:
    """Raises ValueError, or ImportError for KenLM, where a model or an evaluation set cannot be used."""
    check_language_model(source)
    check_perplexity(source)
    check_reference_model(source)
    Decontaminate(source)  # reads the files


def describe_files(files: list[Path]) -> dict[str, Any]:
    """Number and bytes of the files, and a hash of their names and sizes: what a run that goes on must find again."""
    sizes = [file.stat().st_size if file.exists() else 0 for file in files]  # a part of a Hub data set is no file
    named = "\n".join(f"{file.name} {size}" for file, size in zip(files, sizes, strict=True))
    return {"files": len(files), "bytes": sum(sizes), "fingerprint": hashlib.sha256(named.encode()).hexdigest()[:16]}


def judging_files(source: SourceArguments) -> list[Path]:
    """The files of the models, and of the evaluation sets."""
    named = [source.language_model, source.perplexity_models, source.reference_model, *source.decontaminate]
    paths = [Path(path) for path in named if path is not None]
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]


def describe_models(source: SourceArguments) -> list[dict[str, str]]:
    """The models that judged the documents, and what their own records say that they were trained on."""
    models = {
        "language": source.language_model,
        "perplexity": source.perplexity_models,
        "reference": source.reference_model,
    }
    described = []
    for stage, path in models.items():
        if path is None:
            continue
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        described.append({"stage": stage, "path": portable(path, "path"), "note": model_note(folder)})
    return described


def model_note(folder: Path) -> str:
    """From the `run.json` that our training commands leave beside a model; empty beside another's."""
    try:
        data = json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]
        named = {name: entry.get("are") or entry["dataset"] for name, entry in data.items() if name != "eval"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    told = [text if name == "train" else f"{name}: {text}" for name, text in named.items()]
    return f"Trained on {'; '.join(told)}."


def finish(asked: Preparation, record: RunRecord) -> None:
    """What is left to do when all tasks are done."""
    for partial in asked.folder.rglob(".*.partial"):  # of a process that was killed
        partial.unlink()
    if not asked.output.keep_work:
        for entry in asked.work.iterdir():
            if entry.name not in (TALLIES, LOGS, CONTAMINATED):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    report = json.loads((asked.folder / "report.json").read_text(encoding="utf-8"))
    metrics = {name: report[name] for name in ("documents_in", "bytes_in", "documents_out", "bytes_out")}
    record.finish(metrics)
    print(
        f"{asked.folder}: {metrics['documents_in']:,} documents in, {metrics['documents_out']:,} out; "
        f"{asked.folder / 'report.html'} tells what was dropped."
    )


def main() -> None:
    with plain_errors():
        *parts, given = parse_arguments(
            SourceArguments, MixArguments, OutputArguments, ExecutionArguments, description=__doc__
        )
        prepare_process()
    with plain_errors(ValueError, OSError, ImportError, PhaseError):
        try:
            prepare(Preparation(*parts, given))
        except KeyboardInterrupt:
            print("Stopped: the same command goes on.", file=sys.stderr)
            sys.exit(130)  # as a shell reports Ctrl-C


if __name__ == "__main__":
    main()
