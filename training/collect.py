"""Collects a model's right answers to learn from: rejection sampling, with general conversations mixed in.

    python -m training.collect --model runs/r1/zero --dataset reasoning_gym:chain_sum --num_problems 1000 \\
        --general_dataset instructions --general_split train[:1000] --output_dir data/collected

The rule: the model answers each problem `--samples` times. Accepted is what is right and has the asked form
(`rewards.is_strict`). Of a problem's accepted answers, each counted once, the `--keep` shortest are kept: the ones that
wander least. DeepSeek-R1 (arXiv 2501.12948, section 2.3.3) made the reasoning part of its supervised data so.

Writes a folder that `--dataset` of `training.sft` takes: train.parquet and test.parquet with the columns `messages`
(the prompt and the answer, as a chat, whether or not the answer was written in one) and `source` (problems
or general), and info.json: licences, how many were accepted, and how. Test rows are of problems that no training row is
of.

A killed command goes on when it is given again: what was written is kept, chunk by chunk, in a folder beside the one
asked for, which appears only when it is whole. The same command gives the same rows.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .adapters import WEIGHTS_FILE, is_adapter_folder, open_writer
from .chat_data import describe_rows, load_conversations
from .command_line import parse_arguments, plain_errors
from .exact_match import generate_replies, prompt_ids
from .language_models import stored_fingerprint
from .problems import ProblemArguments, prompt_of
from .rewards import is_strict
from .run_record import portable, replace_file

# Batches after which what was written is put on the disk: little is lost, and prompts of like length still meet.
BATCHES_A_CHUNK = 4


@dataclass
class CollectArguments(ProblemArguments):
    model: str = field(
        default="runs/grpo", metadata={"help": "Whose answers: the folder of a model or an adapter, or a Hub id."}
    )
    output_dir: str = field(default="data/collected", metadata={"help": "The folder to write."})
    samples: int = field(default=8, metadata={"help": "Answers that the model gives to each problem."})
    temperature: float = field(default=1.0, metadata={"help": "At which they are sampled."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of an answer, at most."})
    batch_size: int = field(default=256, metadata={"help": "Answers that are written at once."})
    keep: int = field(default=1, metadata={"help": "Accepted answers to a problem that are kept, the shortest."})
    test_share: float = field(
        default=0.05, metadata={"help": "Share of the problems, and of the general conversations, in test.parquet."}
    )
    general_dataset: str = field(
        default="", metadata={"help": "Conversations to mix in, as training.sft takes them; none by default."}
    )
    general_split: str = field(default="train", metadata={"help": "Split of those; slices: train[:1000]."})
    seed: int = field(default=0, metadata={"help": "Of the sampling and of the choice of test rows."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("samples", "max_new_tokens", "batch_size", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"--temperature is {self.temperature}: give more than 0.")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"--test_share is {self.test_share}: give 0 or more, and less than 1.")


def run(arguments: CollectArguments) -> dict[str, Any]:
    """Writes the folder, or finds it finished; returns the content of its info.json."""
    problems, problem_data = arguments.load()
    data = {"problems": problem_data, "model": describe_model(arguments.model)}
    general = []
    if arguments.general_dataset:
        rows = load_conversations(arguments.general_dataset, arguments.general_split)
        data["general"] = describe_rows(rows, arguments.general_dataset, arguments.general_split)
        general = as_messages(rows, arguments.general_dataset)
    asked = portable({name: value for name, value in asdict(arguments).items() if name != "output_dir"})
    sources = {name: description.pop("info", {}) for name, description in data.items()}
    asked["general_dataset"] = portable(arguments.general_dataset, "dataset")
    asked = {"arguments": asked, "data": portable(data)}
    folder = Path(arguments.output_dir)
    partial = folder.with_name(folder.name + ".partial")
    finished = open_folders(folder, partial, asked)
    if finished is not None:
        return finished

    accepted, counts = sample_chunks(problems, arguments, partial)
    if counts["solved"] == 0:
        shutil.rmtree(partial)
        raise ValueError(
            f"None of {counts['samples']} answers to {len(problems)} problems was accepted: collect from a model that "
            "solves some, or from easier problems."
        )
    splits = split_rows(problems, accepted, general, arguments)
    counts |= {f"{name}_rows": len(rows) for name, rows in splits.items()} | {"general": len(general)}
    info = describe(arguments, asked, sources, counts)
    whole = partial / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for name, rows in splits.items():
        pq.write_table(pa.Table.from_pylist(rows), whole / f"{name}.parquet", compression="zstd")
    (whole / "info.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(whole, folder)  # takes the place of an empty folder, too
    shutil.rmtree(partial)
    return info


def describe_model(path: str) -> dict[str, str]:
    """The entry `model` of the data: a folder may hold another model the next time."""
    if is_adapter_folder(path):
        with (Path(path) / WEIGHTS_FILE).open("rb") as file:
            return {"path": path, "fingerprint": hashlib.file_digest(file, "sha256").hexdigest()[:16]}
    return {"path": path, "fingerprint": stored_fingerprint(path)}


def as_messages(rows: datasets.Dataset, name: str) -> list[list[dict[str, str]]]:
    if rows.column_names == ["messages"]:
        return rows["messages"][:]
    if rows.column_names == ["text"] or isinstance(rows[0]["prompt"], str):
        raise ValueError(f"{name} holds texts, not conversations: give 'messages', or prompts and completions of them.")
    return [row["prompt"] + row["completion"] for row in rows]


def open_folders(folder: Path, partial: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The info.json of a finished `folder`; None where there is work left, and `partial` is there to do it in.

    Raises ValueError where either holds anything else than what was `asked`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        info = _read(folder / "info.json") or {}
        _check_same(folder, info.get("made_by", {}), asked)
        shutil.rmtree(partial, ignore_errors=True)
        return info
    before = _read(partial / "asked.json")
    if before is not None:
        _check_same(partial, before, asked)
    elif partial.exists() and any(entry.name != "asked.json.partial" for entry in partial.iterdir()):
        raise ValueError(f"{partial} is there already, and not of this command: remove it, or choose --output_dir.")
    partial.mkdir(parents=True, exist_ok=True)
    replace_file(partial / "asked.json", json.dumps(asked, indent=2, ensure_ascii=False))
    return None


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _check_same(folder: Path, before: dict[str, Any], asked: dict[str, Any]) -> None:
    if not {"arguments", "data"} <= before.keys():
        raise ValueError(f"{folder} is there already, with other content: choose another --output_dir, or empty it.")
    differences = [
        f"{name} was {before[section].get(name)!r} and is now {asked[section].get(name)!r}"
        for section in ("arguments", "data")
        for name in sorted(before[section].keys() | asked[section].keys())
        if before[section].get(name) != asked[section].get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds what another command collected: {'; '.join(differences[:2])}. Choose another "
            "--output_dir, delete this one, or give the arguments that began it."
        )


def sample_chunks(
    problems: list[dict[str, str]], arguments: CollectArguments, partial: Path
) -> tuple[list[list[str]], dict[str, Any]]:
    """Of each problem the answers that are kept, and the counts. Chunks that lie in `partial` are read from there."""
    size = max(1, BATCHES_A_CHUNK * arguments.batch_size // arguments.samples)
    accepted, counts, opened = [], {"problems": len(problems), "samples": 0, "accepted": 0, "prompts_too_long": 0}, None
    for number, first in enumerate(range(0, len(problems), size)):
        file = partial / f"chunk-{number:05}.json"
        chunk = _read(file)
        if chunk is None:
            if opened is None:
                opened = open_writer(arguments.model, device="cuda" if torch.cuda.is_available() else "cpu")
            # Each chunk has a seed of its own, so that those before it need not be drawn again.
            torch.manual_seed(arguments.seed * 1_000_003 + number)
            chunk = sample(problems[first : first + size], *opened, arguments)
            replace_file(file, json.dumps(chunk, ensure_ascii=False))
        for row in chunk:
            accepted.append(row["kept"])
            counts["samples"] += row["samples"]
            counts["accepted"] += row["accepted"]
            counts["prompts_too_long"] += row["samples"] == 0
        shown = f"{len(accepted)} of {len(problems)} problems, {counts['accepted']} of {counts['samples']} answers"
        print(f"{shown} accepted", flush=True)
    counts |= {
        "solved": sum(bool(kept) for kept in accepted),
        "kept": sum(map(len, accepted)),
        "acceptance": counts["accepted"] / max(1, counts["samples"]),
    }
    return accepted, counts


def sample(
    problems: list[dict[str, str]],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    arguments: CollectArguments,
) -> list[dict[str, Any]]:
    """Of each problem the `samples` drawn (0 where the model's context has no room), those `accepted`, and the `kept`.

    The first two are numbers, the last the answers themselves.
    """
    questions = [
        {"prompt": prompt_of(problem["question"], arguments.prompt_template, arguments.apply_chat_template)}
        for problem in problems
    ]
    prompts = prompt_ids(questions, tokenizer, apply_chat_template=False)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = [context is None or len(ids) + arguments.max_new_tokens <= context for ids in prompts]
    fitting = [ids for ids, fits in zip(prompts, room, strict=True) if fits]
    written = iter(
        generate_replies(
            model,
            tokenizer,
            fitting,
            arguments.max_new_tokens,
            arguments.batch_size,
            samples=arguments.samples,
            temperature=arguments.temperature,
        )
    )
    rows = []
    for problem, fits in zip(problems, room, strict=True):
        replies = next(written) if fits else []
        rows.append({"samples": len(replies)} | select(problem, replies, arguments.keep))
    return rows


def select(problem: dict[str, str], replies: list[dict[str, Any]], keep: int) -> dict[str, Any]:
    """How many of the replies are `accepted`, and of these, each once, the `keep` shortest by their tokens."""
    times: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for reply in replies:
        text = reply["text"].strip()
        times[text] = times.get(text, 0) + 1
        tokens[text] = min(reply["tokens"], tokens.get(text, reply["tokens"]))
    right = [text for text in times if is_strict(text, problem["answer"], problem["entry"])]
    shortest = sorted(right, key=lambda text: (tokens[text], text))
    return {"accepted": sum(times[text] for text in right), "kept": shortest[:keep]}


def split_rows(
    problems: list[dict[str, str]],
    accepted: list[list[str]],
    general: list[list[dict[str, str]]],
    arguments: CollectArguments,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of `train` and, where any are held out, of `test`: a problem's answers all go the same way."""
    random = np.random.default_rng(arguments.seed)
    groups = [
        [
            {"messages": _exchange(arguments.prompt_template.replace("{question}", problem["question"]), text)}
            | {"source": "problems"}
            for text in kept
        ]
        for problem, kept in zip(problems, accepted, strict=True)
        if kept
    ]
    conversations = [[{"messages": messages, "source": "general"}] for messages in general]
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for of_source in (groups, conversations):
        held_out = set(random.permutation(len(of_source))[: int(len(of_source) * arguments.test_share)].tolist())
        for i, rows in enumerate(of_source):
            splits["test" if i in held_out else "train"] += rows
    return {name: rows for name, rows in splits.items() if rows}


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def describe(
    arguments: CollectArguments, asked: dict[str, Any], sources: dict[str, dict[str, Any]], counts: dict[str, Any]
) -> dict[str, Any]:
    """`info.json`, with the licence of the general conversations, or else of the problems, as the `sources` have it.

    Of two licences none is given, but that a generated problem is nobody's text and asks for nothing.
    """
    names = [sources["problems"].get("name", asked["arguments"]["dataset"])]
    if arguments.general_dataset:
        names.append(sources["general"].get("name", asked["arguments"]["general_dataset"]))
    info = {"name": f"Verified answers to {', and '.join(names)}", "modality": "chat"}
    read = [sources["problems"], sources.get("general", {})]
    known = read[0] | read[1]
    info |= {name: known[name] for name in ("license", "language") if name in known}
    if asked["data"]["problems"].get("source") != "generator" and len({*_named(read, "license")}) > 1:
        del info["license"]  # neither is that of both
    if notices := list(dict.fromkeys(_named(read, "attribution"))):
        info["attribution"] = " ".join(notices)
    origin = (
        f"Answers of a language model to {counts['problems']} problems ({asked['arguments']['dataset']}), "
        f"{arguments.samples} samples of each at temperature {arguments.temperature}: {counts['accepted']} were right "
        f"and in the asked form, and of each of the {counts['solved']} problems that had such, the {arguments.keep} "
        "shortest different ones were kept (`training/collect.py`)."
    )
    if arguments.general_dataset:
        origin += f" {counts['general']} conversations of {asked['arguments']['general_dataset']} are mixed in."
    return info | {"origin": origin, "made_by": asked | {"counts": counts}}


def _named(sources: list[dict[str, Any]], name: str) -> list[str]:
    return [source[name] for source in sources if name in source]


def main() -> None:
    # One process collects: where `accelerate launch` starts several, the others have nothing to do.
    if os.environ.get("RANK", "0") != "0":
        return
    with plain_errors():
        arguments, _ = parse_arguments(CollectArguments, description=__doc__)
        info = run(arguments)
    counts = info["made_by"]["counts"]
    print(
        f"{arguments.output_dir} is finished: {counts['accepted']} of {counts['samples']} answers accepted "
        f"({counts['acceptance']:.1%}), {counts['solved']} of {counts['problems']} problems solved, "
        f"{counts['kept']} answers kept, {counts['general']} general conversations"
    )


if __name__ == "__main__":
    main()
