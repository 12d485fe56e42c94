"""Goes the road of DeepSeek-R1 (arXiv 2501.12948) from a base model to a report, in stages that can be resumed.

    python -m training.r1 --config training/recipes/llama_style/r1_demo/r1.yaml

For each seed:
1. `zero`: GRPO on the base with rewards for right answers and for their format only (R1-Zero);
2. `zero_samples`: what it solves is sampled, verified and, with general conversations, made a data set;
3. `sft`: the base, from scratch, is fine-tuned on that;
4. `reward`: a reward model learns preferences;
5. `final`: GRPO on harder problems, together with that reward model on general prompts (R1);
6. `final_samples`, `distilled`: a smaller base is fine-tuned on what the final model solves.
Before these, for all seeds, where no --base is given: `texts`, `tokenizer`, `base`, and the smaller base `small`.

A stage is one command of ours with the recipe of its name, run in a folder of its own, and a folder that is finished is
not made again; the same command goes on where it was stopped. `--again STAGE` removes that stage and all that was made
from it first. `--skip` leaves stages out: without `zero` the base is sampled from, without `reward` only rules reward,
without `final` the fine-tuned model is distilled.

At the end every model solves the same held-out problems, which no stage has seen: all generated problems are told apart
by the hash of their question (`training.problems.held_out`), and problems of a data set by comparison. Out come
`report.json`, a card with tables and plots, and the report in the final model's card.
"""

import ctypes
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from hub_cards.build_card import build_card

from .base_model import read_run
from .command_line import parse_arguments, plain_errors
from .exact_match import prompt_ids
from .language_models import load_language_model, load_tokenizer
from .problems import load_problems, prompt_of, without
from .run_record import FILE_NAME, RunRecord, portable, replace_file
from .solving import difference_interval, mean_interval, measure

DEMO_RECIPES = "training/recipes/llama_style/r1_demo"
# What an evaluation tells of each problem, and what the report calls the mean of it.
PER_PROBLEM = {
    "pass@1": "strict",
    "lenient_pass@1": "lenient",
    "greedy_strict": "greedy_strict",
    "greedy_lenient": "greedy_lenient",
}
PR_SET_PDEATHSIG = 1  # of Linux' prctl


class Stage(NamedTuple):
    """A command with the recipe `recipe` (by default the stage's name) in the recipes' folder.

    Args:
        inputs: fields of the command, and the stage (or base) whose folder each is given.
        shared: whether all seeds use the same.
    """

    module: str
    inputs: dict[str, str]
    shared: bool = False
    recipe: str | None = None


STAGES = {
    "texts": Stage("training.chain_sum_texts", {}, shared=True),
    "tokenizer": Stage("training.train_tokenizer", {"dataset": "texts"}, shared=True),
    "base": Stage("training.pretrain_lm", {"dataset": "texts", "tokenizer": "tokenizer"}, shared=True),
    "small": Stage("training.pretrain_lm", {"dataset": "texts", "tokenizer": "tokenizer"}, shared=True),
    "zero": Stage("training.grpo", {"model": "base"}),
    "zero_samples": Stage("training.collect", {"model": "zero"}),
    "sft": Stage("training.sft", {"model": "base", "dataset": "zero_samples"}),
    "reward": Stage("training.reward", {"model": "sft"}),
    "final": Stage("training.grpo", {"model": "sft", "reward_model": "reward"}),
    "final_samples": Stage("training.collect", {"model": "final"}),
    "distilled": Stage("training.sft", {"model": "small", "dataset": "final_samples"}),
}
SKIPPABLE = {"zero": "base", "reward": None, "final": "sft", "final_samples": None, "distilled": None, "small": None}
TITLES = {
    "base": "Base",
    "zero": "R1-Zero: GRPO on the base",
    "sft": "SFT of the base on Zero's verified samples",
    "final": "GRPO with the reward model",
    "small": "Smaller base",
    "distilled": "SFT of the smaller base on the final model's verified samples",
}
MODELS = tuple(TITLES)
# Those that are asked as a base is: they have not learnt the chat template.
CONTINUE_TEXT = ("base", "zero", "small")


@dataclass
class R1Arguments:
    output_dir: str = field(default="runs/r1_demo", metadata={"help": "The folder of the whole road."})
    recipes: str = field(default=DEMO_RECIPES, metadata={"help": "Folder with one recipe a stage, NAME.yaml."})
    base: str | None = field(
        default=None, metadata={"help": "The model to begin with; by default the recipes' base is pretrained."}
    )
    small: str | None = field(
        default=None, metadata={"help": "The smaller model to distil into; by default pretrained as well."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "The road is gone once for each."})
    skip: list[str] = field(default_factory=list, metadata={"help": f"Stages to leave out, of {', '.join(SKIPPABLE)}."})
    again: str | None = field(default=None, metadata={"help": "A stage to make again, with all that is made from it."})
    eval_dataset: str = field(default="reasoning_gym:chain_sum", metadata={"help": "Problems of the report."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Their split."})
    eval_difficulty: dict[str, Any] | str | None = field(default=None, metadata={"help": "Their difficulty, as JSON."})
    num_eval_problems: int = field(default=300, metadata={"help": "How many of them."})
    eval_samples: int = field(default=8, metadata={"help": "Replies to each, the k of pass@k."})
    max_new_tokens: int = field(default=96, metadata={"help": "Longest reply, in tokens."})
    eval_batch_size: int = field(default=512, metadata={"help": "Replies that are sampled at once."})
    min_base_solved: float = field(
        default=0.1,
        metadata={
            "help": "Share of its own problems that the base has to solve at least once in --eval_samples tries: what "
            "is never sampled is never rewarded. Below it the road ends before `zero`."
        },
    )
    launcher: str = field(
        default="python",
        metadata={"help": "What starts a stage on several processes: 'accelerate launch --config_file X.yaml'."},
    )

    def __post_init__(self):
        if isinstance(self.eval_difficulty, str):
            self.eval_difficulty = json.loads(self.eval_difficulty)
        if unknown := set(self.skip) - set(SKIPPABLE):
            raise ValueError(f"--skip names {', '.join(sorted(unknown))}: take from {', '.join(SKIPPABLE)}.")
        if self.again is not None and self.again not in STAGES:
            raise ValueError(f"--again is {self.again!r}: take one of {', '.join(STAGES)}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"--seeds is {self.seeds}: give at least one, and none twice.")
        # What is made from a stage that is left out is left out with it.
        if "small" in self.skip or "final_samples" in self.skip:
            self.skip = [*self.skip, "final_samples", "distilled"]
        if "distilled" in self.skip:
            self.skip = [*self.skip, "small", "final_samples"]


class Road:
    """The stages of one run, their folders, and what was recorded of them."""

    def __init__(self, arguments: R1Arguments, record: RunRecord):
        self.arguments, self.record = arguments, record
        self.out = Path(arguments.output_dir)
        given = {"base": arguments.base, "small": arguments.small}
        self.given = {name: folder for name, folder in given.items() if folder is not None}
        needed_by = {"texts": ("base", "small"), "tokenizer": ("base", "small")}
        left_out = set(arguments.skip) | set(self.given)
        for name, users in needed_by.items():
            if all(user in left_out for user in users):
                left_out.add(name)
        self.stages = [name for name in STAGES if name not in left_out]

    def folder(self, name: str, seed: int) -> str | None:
        """Where a stage's result lies; where it is left out, what takes its place."""
        if name in self.given:
            return self.given[name]
        if name in self.arguments.skip:
            return None if SKIPPABLE[name] is None else self.folder(SKIPPABLE[name], seed)
        return str(self._own_folder(name, seed))

    def _own_folder(self, name: str, seed: int) -> Path:
        return self.out / name if STAGES[name].shared else self.out / f"seed-{seed}" / name

    def command(self, name: str, seed: int) -> list[str]:
        stage = STAGES[name]
        words = ["--config", str(self._recipe(name))]
        for option, source in stage.inputs.items():
            folder = self.folder(source, seed)
            if folder is not None:
                words += [f"--{option}", folder]
        if name == "final" and "reward" in self.arguments.skip:
            words += ["--reward_model", "", "--prompt_dataset", ""]
            if weights := load_recipe(self, name).get("reward_weights"):
                words += ["--reward_weights", *map(str, weights[:-1])]
        words += ["--output_dir", self.folder(name, seed)]
        if not stage.shared:
            words += ["--seed", str(seed)]
        return ["-m", stage.module, *words]

    def _recipe(self, name: str) -> Path:
        return Path(self.arguments.recipes) / f"{name}.yaml"

    def check(self) -> None:
        # Two of the recipes say how the models are asked as well.
        for name in [*self.stages, "zero", "final"]:
            if not self._recipe(name).is_file():
                raise FileNotFoundError(f"The stage {name} needs the recipe {self._recipe(name)}: write it.")

    def remove_from(self, first: str) -> None:
        """Removes the folders of a stage and of all that is made from it, with the evaluations of their models."""
        seeds = set(self.arguments.seeds)
        if STAGES[first].shared:
            seeds |= {int(folder.name.removeprefix("seed-")) for folder in self.out.glob("seed-*")}
        for seed in seeds:
            for name in (first, *made_from(first)):
                if name not in self.given:
                    shutil.rmtree(self._own_folder(name, seed), ignore_errors=True)
                    self._remove_evaluations(name, seed)

    def _remove_evaluations(self, name: str, seed: int) -> None:
        of_name = [name]
        for stage in ("zero", "final"):
            of_name += [f"own_{stage}_before"] * (name == STAGES[stage].inputs["model"])
            of_name += [f"own_{stage}_after"] * (name == stage)
        for one in of_name:
            evaluation_file(self, seed, one).unlink(missing_ok=True)

    def _check_gone(self, name: str, seed: int) -> None:
        """Of a stage that is about to be made: ValueError where something that was made from it is there already."""
        made = [folder for later in made_from(name) if (folder := self._own_folder(later, seed)).exists()]
        if made:
            raise ValueError(
                f"{self._own_folder(name, seed)} is to be made, and {', '.join(map(str, made))} would not be of it: "
                f"give --again {name}."
            )
        self._remove_evaluations(name, seed)

    def run(self, name: str, seed: int) -> None:
        """Runs a stage unless its folder is finished; its command and recipe have to be those that began it."""
        folder = Path(self.folder(name, seed))
        command = self.command(name, seed)
        digest = hashlib.sha256(self._recipe(name).read_bytes()).hexdigest()[:16]
        key = name if STAGES[name].shared else f"seed-{seed}/{name}"
        made = self.record.content.get("stages", {})
        asked = {"command": shlex.join(["python", *command]), "recipe": digest}
        known = made.get(key)
        if known is not None and folder.exists() and {k: known.get(k) for k in asked} != asked:
            what = "recipe" if known["recipe"] != digest else "command"
            raise ValueError(f"The {what} of {folder} has changed since it was begun: give --again {name}, or undo it.")
        if finished(folder):
            return
        if not folder.exists():
            self._check_gone(name, seed)
        self.record.save(stages=made | {key: asked})
        print(f"\n== {key}: {asked['command']}", flush=True)
        start = time.perf_counter()
        launcher = [sys.executable] if self.arguments.launcher == "python" else shlex.split(self.arguments.launcher)
        ended = subprocess.run([*launcher, *command], preexec_fn=_die_with_parent)
        if ended.returncode != 0:
            sys.exit(ended.returncode if ended.returncode > 0 else 1)
        if not finished(folder):
            raise RuntimeError(f"{asked['command']} ended without finishing {folder}.")
        seconds = round(time.perf_counter() - start, 1)
        self.record.save(stages=made | {key: asked | {"seconds": seconds}})
        print(f"== {seconds:.0f} s", flush=True)


def made_from(stage: str) -> list[str]:
    """All that a stage's result goes into, directly or not."""
    found = {stage}
    for name, one in STAGES.items():  # each stands after what it is made from
        if found & set(one.inputs.values()):
            found.add(name)
    return [name for name in STAGES if name in found - {stage}]


def _die_with_parent() -> None:
    """A stage must not go on writing after `kill -9` of the road, which would be run again beside it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def finished(folder: Path) -> bool:
    run = read_run(str(folder))
    if run is not None:
        return run.get("status") == "finished"
    return (folder / "info.json").is_file()  # of data, written last


# ---- evaluation ------------------------------------------------------------------------------------------------------


def load_recipe(road: Road, name: str) -> dict[str, Any]:
    return yaml.safe_load(road._recipe(name).read_text(encoding="utf-8"))


def evaluate(road: Road, model: str, seed: int, file: Path, problems: list[dict], greedy: bool) -> dict[str, Any]:
    """What `measure` says of the model of a stage, kept in `file`."""
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    folder = road.folder(model, seed)
    print(
        f"== seed {seed}: {folder} solves {len(problems)} problems, {road.arguments.eval_samples} times each",
        flush=True,
    )
    recipe = load_recipe(road, "zero" if model in CONTINUE_TEXT else "final")
    template = recipe.get("prompt_template", "{question}")
    rows = [
        problem | {"prompt": prompt_of(problem["question"], template, recipe.get("apply_chat_template", True))}
        for problem in problems
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, tokenizer = load_language_model(folder).to(device), load_tokenizer(folder)
    measured = measure(
        network,
        tokenizer,
        problems,
        prompt_ids(rows, tokenizer, apply_chat_template=False),
        samples=road.arguments.eval_samples,
        ks=(1, road.arguments.eval_samples),
        temperature=1.0,
        max_new_tokens=road.arguments.max_new_tokens,
        batch_size=road.arguments.eval_batch_size,
        seed=seed,
        greedy=greedy,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(measured, ensure_ascii=False) + "\n")
    return measured


def own_problems(road: Road, stage: str) -> tuple[list[dict], dict[str, Any]]:
    """Held-out problems of the kind that a stage of reinforcement learning trains on, and their description."""
    recipe = load_recipe(road, stage)
    return load_problems(
        recipe.get("eval_dataset", recipe["dataset"]),
        recipe.get("eval_dataset_split", "test"),
        road.arguments.num_eval_problems,
        difficulty=recipe.get("eval_difficulty", recipe.get("difficulty")),
        config=None if "eval_dataset" in recipe else recipe.get("dataset_config"),
        **_columns(recipe),
    )


def _columns(recipe: dict[str, Any]) -> dict[str, str]:
    return {name: recipe[name] for name in ("question_column", "answer_column") if name in recipe}


def evaluation_file(road: Road, seed: int, name: str) -> Path:
    return road.out / f"seed-{seed}" / "evaluations" / f"{name}.json"


def check_base(road: Road, seed: int) -> None:
    """Raises ValueError where the base solves too few problems for reinforcement learning to begin with."""
    problems, _ = own_problems(road, "zero")
    measured = evaluate(road, "base", seed, evaluation_file(road, seed, "own_zero_before"), problems, greedy=False)
    solved = float((shares({seed: measured}, "strict") > 0).mean())
    if solved < road.arguments.min_base_solved:
        raise ValueError(
            f"The base {road.folder('base', seed)} solves {solved:.1%} of Zero's problems in "
            f"{road.arguments.eval_samples} tries, and reinforcement learning can only choose among what is sampled: "
            "pretrain it longer, take easier problems, or lower --min_base_solved."
        )


def questions_of(road: Road, seed: int) -> dict[str, set[str]]:
    """The questions that each stage's data hold, of data that are not made yet none."""
    found: dict[str, set[str]] = {}
    for name in road.stages:
        folder = Path(road.folder(name, seed))
        if name == "texts" and finished(folder):
            lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
            documents = [json.loads(line)["text"] for line in lines]
            found[name] = {text.split("\nAnswer:")[0].removeprefix("Question: ") for text in documents}
        elif name.endswith("_samples") and finished(folder):
            rows = pq.read_table(folder / "train.parquet").to_pylist()
            found[name] = {message["content"] for row in rows for message in row["messages"]}
        elif name in ("zero", "final"):
            recipe = load_recipe(road, name)
            rows, _ = load_problems(
                recipe["dataset"],
                recipe.get("dataset_split", "train"),
                recipe.get("num_problems"),
                difficulty=recipe.get("difficulty"),
                seed=recipe.get("problem_seed", 0),
                config=recipe.get("dataset_config"),
                **_columns(recipe),
            )
            # A data set's problems that are held out elsewhere are left out by `training.grpo` as well.
            found[name] = {row["question"] for row in without(rows, own_problems(road, name)[0])}
    return found


def check_apart(road: Road, problems: list[dict]) -> dict[str, int]:
    """How many questions of each stage's data are among the held-out ones: none, or ValueError."""
    held_out = {problem["question"] for problem in problems}
    overlap = {}
    for seed in road.arguments.seeds:
        for name, questions in questions_of(road, seed).items():
            overlap[name] = overlap.get(name, 0) + len(questions & held_out)
    if shared := [name for name, count in overlap.items() if count]:
        raise ValueError(
            f"Some held-out problems are in the data of {', '.join(shared)}: name another --eval_dataset or split."
        )
    return overlap


def evaluate_all(road: Road) -> tuple[dict, dict, dict[str, Any]]:
    """The evaluations by model and seed, those of each RL stage on its own task, and the problems' description."""
    arguments = road.arguments
    problems, description = load_problems(
        arguments.eval_dataset,
        arguments.eval_dataset_split,
        arguments.num_eval_problems,
        difficulty=arguments.eval_difficulty,
    )
    by_model: dict[str, dict[int, dict]] = {}
    own: dict[str, dict] = {}
    for seed in arguments.seeds:
        for model in MODELS:
            if model not in arguments.skip:
                measured = evaluate(road, model, seed, evaluation_file(road, seed, model), problems, greedy=True)
                by_model.setdefault(model, {})[seed] = measured
        for stage in ("zero", "final"):
            if stage in arguments.skip:
                continue
            before = STAGES[stage].inputs["model"]
            of_its_own, task = own_problems(road, stage)
            if task["fingerprint"] == description["fingerprint"]:
                pair = by_model[before][seed], by_model[stage][seed]
            else:
                files = (evaluation_file(road, seed, f"own_{stage}_{when}") for when in ("before", "after"))
                pair = tuple(
                    evaluate(road, model, seed, file, of_its_own, greedy=False)
                    for model, file in zip((before, stage), files, strict=True)
                )
            own.setdefault(stage, {"task": task, "pairs": {}})["pairs"][seed] = pair
    return by_model, own, description


# ---- report ----------------------------------------------------------------------------------------------------------


def shares(measured: dict[int, dict], name: str) -> np.ndarray:
    """`(seeds, problems)`: each problem's share of right replies, of the counts `name`."""
    counts = np.array([one["per_problem"][name] for one in measured.values()], dtype=float)
    samples = 1 if name.startswith("greedy") else next(iter(measured.values()))["samples"]
    return counts / samples


def summarise_model(measured: dict[int, dict]) -> dict[str, Any]:
    first = next(iter(measured.values()))
    samples = first["samples"]
    solved_once = (shares(measured, "strict") > 0).astype(float)  # pass@k of k samples
    summary: dict[str, Any] = {name: mean_interval(shares(measured, kind)) for name, kind in PER_PROBLEM.items()}
    summary[f"pass@{samples}"] = mean_interval(solved_once)
    summary |= {
        name: float(np.mean([one[name] for one in measured.values()])) for name in ("format", "ended", "tokens")
    }
    return summary | {
        "problems": first["problems"],
        "samples": samples,
        "temperature": first["temperature"],
        "seeds": list(measured),
    }


def build_report(
    road: Road, by_model: dict, own: dict, description: dict[str, Any], overlap: dict[str, int]
) -> dict[str, Any]:
    arguments = road.arguments
    made = road.record.content.get("stages", {})
    stages = {}
    for model, measured in by_model.items():
        keys = [model if STAGES[model].shared else f"seed-{seed}/{model}" for seed in measured]
        seconds = [made[key]["seconds"] for key in dict.fromkeys(keys) if "seconds" in made.get(key, {})]
        folder = road.folder(model, next(iter(measured)))
        stages[model] = {"title": TITLES[model], "folder": folder} | summarise_model(measured)
        if seconds:
            stages[model]["seconds"] = round(float(np.mean(seconds)), 1)
    own_tasks = {}
    for stage, found in own.items():
        before, after = (shares({seed: pair[i] for seed, pair in found["pairs"].items()}, "strict") for i in (0, 1))
        own_tasks[stage] = _of(found["task"], "dataset", "difficulty") | {
            "problems": before.shape[1],
            "samples": arguments.eval_samples,
            "before": mean_interval(before),
            "after": mean_interval(after),
            "difference": difference_interval(before, after),
        }
    report = {
        "problems": _of(description, "dataset", "difficulty", "rows", "fingerprint") | {"in_training_data": overlap},
        "seeds": arguments.seeds,
        "max_new_tokens": arguments.max_new_tokens,
        "stages": stages,
        "own_tasks": own_tasks,
        "collected": _collected(road),
        "response_length": _by_step(road, "completions/mean_length"),
        "accuracy_by_step": _by_step(road, "eval_pass@1"),
        "examples": _examples(by_model),
    }
    return report | {"targets": _targets(by_model, own_tasks)}


def _of(entries: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: entries[name] for name in names if name in entries}


def _targets(by_model: dict, own_tasks: dict) -> dict[str, Any]:
    """What the demonstration set out to show, and whether it did."""
    last = "final" if "final" in by_model else "sft"
    base, final = (shares(by_model[model], "strict").mean() for model in ("base", last))
    greedy = difference_interval(*(shares(by_model[model], "greedy_lenient") for model in ("base", last)))
    targets = {
        "doubled": {
            "text": "Strict pass@1 at T=1 at least doubles from base to final.",
            "met": bool(final >= 2 * base),
            "factor": float(final / base) if base else None,
        },
        "lenient": {
            "text": "Lenient greedy accuracy rises significantly from base to final.",
            "met": greedy["low"] > 0,
            "difference": greedy,
        },
    }
    for stage, task in own_tasks.items():
        targets[f"own_task_{stage}"] = {
            "text": f"{TITLES[stage]}: significantly better on its own task than the model that it began with.",
            "met": task["difference"]["low"] > 0,
            "difference": task["difference"],
        }
    return targets


def _collected(road: Road) -> dict[str, Any]:
    found = {}
    for stage in ("zero", "final"):
        infos = [
            json.loads(file.read_text(encoding="utf-8"))
            for seed in road.arguments.seeds
            if (file := road.out / f"seed-{seed}" / f"{stage}_samples" / "info.json").is_file()
        ]
        if infos:
            counts = [info["made_by"]["counts"] for info in infos]
            found[stage] = {name: float(np.mean([one[name] for one in counts])) for name in counts[0]}
    return found


def _by_step(road: Road, name: str) -> dict[str, dict[str, list]]:
    curves: dict[str, dict[str, list]] = {}
    for stage in ("zero", "final"):
        for seed in road.arguments.seeds:
            run = None if stage in road.arguments.skip else read_run(road.folder(stage, seed))
            if run is not None:
                points = [[entry["step"], entry[name]] for entry in run["history"] if entry.get(name) is not None]
                curves.setdefault(stage, {})[str(seed)] = points
    return curves


def _examples(by_model: dict) -> list[dict[str, Any]]:
    return [
        {"stage": model} | {name: example[name] for name in ("question", "answer", "reply", "strict")}
        for model, measured in by_model.items()
        for example in next(iter(measured.values()))["examples"][:2]
    ]


def write_report(road: Road, report: dict[str, Any]) -> None:
    report = portable(report)
    replace_file(road.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    road.record.finish({}, report=report)
    build_card(road.out)
    last = "final" if "final" in report["stages"] else "sft"
    for seed in road.arguments.seeds:
        folder = road.out / f"seed-{seed}" / last
        run = read_run(str(folder)) | {"road": report}
        replace_file(folder / FILE_NAME, json.dumps(run, indent=2, ensure_ascii=False) + "\n")
        build_card(folder)
    print(f"\n{'':62} strict T=1   pass@{road.arguments.eval_samples}   lenient T=1   greedy strict   lenient   tokens")
    for stage in report["stages"].values():
        names = ("pass@1", f"pass@{road.arguments.eval_samples}", "lenient_pass@1", "greedy_strict", "greedy_lenient")
        cells = "".join(f"{stage[name]['mean']:11.3f}" for name in names)
        print(f"{stage['title']:62}{cells}{stage['tokens']:10.1f}")
    for target in report["targets"].values():
        print(f"{'met' if target['met'] else 'MISSED'}: {target['text']}")
    print(f"To read: {road.out / 'README.md'}")


def main() -> None:
    with plain_errors():
        arguments, given = parse_arguments(R1Arguments, description=__doc__)
        # These may change in the same folder: seeds are added, stages left out or made again.
        free = ("seeds", "skip", "again", "min_base_solved", "launcher")
        asked = {name: value for name, value in given.items() if name not in free}
        problems, description = load_problems(
            arguments.eval_dataset,
            arguments.eval_dataset_split,
            arguments.num_eval_problems,
            difficulty=arguments.eval_difficulty,
        )
        record = RunRecord.start(arguments.output_dir, "r1", asked, {"eval": description})
        road = Road(arguments, record)
        road.check()
        check_apart(road, problems)  # what can be told before hours of training
        if arguments.again is not None:
            road.remove_from(arguments.again)
        record.content["status"] = "running"
        record.save()
        for name in road.stages:
            if STAGES[name].shared:
                road.run(name, 0)
        for seed in arguments.seeds:
            for name in road.stages:
                if name == "zero":
                    check_base(road, seed)
                if not STAGES[name].shared:
                    road.run(name, seed)
        overlap = check_apart(road, problems)
    by_model, own, description = evaluate_all(road)
    write_report(road, build_report(road, by_model, own, description, overlap))


if __name__ == "__main__":
    main()
