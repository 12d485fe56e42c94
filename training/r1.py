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

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from .command_line import parse_arguments, plain_errors
from .exact_match import prompt_ids
from .grpo import GrpoArguments
from .language_models import load_language_model, load_tokenizer
from .problems import load_problems, prompt_of, without
from .r1_report import build_report, shares, write_report
from .r1_road import (
    CONTINUE_TEXT,
    MODELS,
    STAGES,
    R1Arguments,
    Road,
    evaluation_file,
    finished,
    load_recipe,
)
from .run_record import RunRecord, replace_file
from .solving import measure


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


def own_problems(road: Road, stage: str, size: int | None = None) -> tuple[list[dict], dict[str, Any]]:
    """Held-out problems of the kind that a stage of reinforcement learning trains on, and their description.

    `size` is how many; by default as many as the report has.
    """
    recipe = load_recipe(road, stage)
    return load_problems(
        recipe.get("eval_dataset", recipe["dataset"]),
        recipe.get("eval_dataset_split", "test"),
        size or road.arguments.num_eval_problems,
        difficulty=recipe.get("eval_difficulty", recipe.get("difficulty")),
        config=None if "eval_dataset" in recipe else recipe.get("dataset_config"),
        **_columns(recipe),
    )


def _columns(recipe: dict[str, Any]) -> dict[str, str]:
    return {name: recipe[name] for name in ("question_column", "answer_column") if name in recipe}


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
            before, after = load_recipe(road, name).get("prompt_template", "{question}").split("{question}")
            asked = (message["content"] for row in rows for message in row["messages"])
            found[name] = {text.removeprefix(before).removesuffix(after) for text in asked}
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
            # A data set's problems that the stage itself evaluates on, and no others, are left out by `training.grpo`.
            own, _ = own_problems(road, name, recipe.get("num_eval_problems", GrpoArguments.num_eval_problems))
            found[name] = {row["question"] for row in without(rows, own)}
    return found


def check_apart(road: Road, problems: list[dict]) -> dict[str, int]:
    """How many questions of each stage's data are among the held-out ones: none, or ValueError."""
    overlap = {}
    for seed in road.arguments.seeds:
        for name, questions in questions_of(road, seed).items():
            apart = without(problems, [{"question": question} for question in questions])
            overlap[name] = overlap.get(name, 0) + len(problems) - len(apart)
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
        if record.finished:  # with more seeds, say, there is more to do
            record.begin_session()
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
