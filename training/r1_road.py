"""The stages of the R1 road: what each is made from, where it lies, and how it is run, resumed and made again."""

import ctypes
import hashlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .base_model import read_run
from .problems import parse_difficulty
from .run_record import RunRecord

DEMO_RECIPES = "training/recipes/llama_style/r1_demo"
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
        self.eval_difficulty = parse_difficulty("eval_difficulty", self.eval_difficulty)
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
            for name in (first, *made_from(first, self.given)):
                if name not in self.given:
                    folder = self._own_folder(name, seed)
                    for made in (folder, folder.with_name(folder.name + ".partial")):  # the latter is `collect`'s
                        shutil.rmtree(made, ignore_errors=True)
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
        made = [folder for later in made_from(name, self.given) if (folder := self._own_folder(later, seed)).exists()]
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
        print(f"== {time.perf_counter() - start:.0f} s", flush=True)


def made_from(stage: str, given: Container[str] = ()) -> list[str]:
    """All that a stage's result goes into, directly or not; what is `given` is made from nothing here."""
    found = {stage}
    for name, one in STAGES.items():  # each stands after what it is made from
        if name not in given and found & set(one.inputs.values()):
            found.add(name)
    return [name for name in STAGES if name in found - {stage}]


def _die_with_parent() -> None:
    """A stage must not go on writing after `kill -9` of the road, which would be run again beside it.

    SIGTERM, not SIGKILL: on that torchrun ends its workers, which the signal does not reach. (`accelerate launch` with
    one process does not: its worker lives on, and the run folder that it holds refuses another.)
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def finished(folder: Path) -> bool:
    run = read_run(str(folder))
    if run is not None:
        return run.get("status") == "finished"
    return (folder / "info.json").is_file()  # of data, written last


def load_recipe(road: Road, name: str) -> dict[str, Any]:
    return yaml.safe_load(road._recipe(name).read_text(encoding="utf-8"))


def evaluation_file(road: Road, seed: int, name: str) -> Path:
    return road.out / f"seed-{seed}" / "evaluations" / f"{name}.json"
