"""Tasks of lm-evaluation-harness (EleutherAI's `lm-eval`): its own by name, others by a YAML file, and ours.

Ours lie in `evaluation_tasks/` and are made of the sample data, so they need no network. In a task's file, relative
`data_files` are meant relative to the file.
"""

import difflib
import hashlib
import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

OURS = Path(__file__).parent / "evaluation_tasks"


def our_tasks() -> list[str]:
    return sorted(file.stem for file in OURS.glob("*.yaml"))


def load_tasks(names: list[str]) -> dict[str, list[Any]]:
    """By each name: the harness's tasks and groups, with their data read. A name may be a YAML file's.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no such task, or one whose file or data cannot be read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("--tasks needs lm-eval: `pip install 'hf_models[evaluate]'`.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = {name: OURS / f"{name}.yaml" for name in our_tasks()}
    files |= {name: Path(name) for name in names if name.endswith((".yaml", ".yml"))}
    # The harness's own 14,000 take seconds to list.
    manager = TaskManager(include_defaults=any(name not in files for name in names))
    loaded = {}
    for name in names:
        if name not in files and name not in manager.task_index:
            similar = difflib.get_close_matches(name, [*our_tasks(), *manager.all_tasks], n=1)
            raise ValueError(
                f"There is no task {name!r}{f' (did you mean {similar[0]!r}?)' if similar else ''}: ours are "
                f"{', '.join(our_tasks())}; others are lm-evaluation-harness's, whose data come from the Hub, or named "
                "by a YAML file."
            )
        spec = read_task_file(files[name]) if name in files else name
        try:
            found = manager.load([spec])
        except Exception as error:  # whatever a task's file and its data come to
            where = "" if name in files else f", and its data come from the Hub (ours do not: {', '.join(our_tasks())})"
            raise ValueError(f"The task {name} cannot be loaded{where}: {type(error).__name__}: {error}") from error
        members = {member for group in found.get("group_map", {}).values() for member in group}
        everything = found.get("groups", {}) | found["tasks"]
        loaded[name] = [task for task_name, task in everything.items() if task_name not in members]
    return loaded


def read_task_file(file: Path) -> dict[str, Any]:
    """A task's configuration, with the functions that it names and with absolute `data_files`."""
    from lm_eval.tasks._yaml_loader import load_yaml  # as the harness's own command line reads such a file

    if not file.is_file():
        raise FileNotFoundError(f"There is no task file {str(file)!r}: name an existing one.")
    try:
        config = load_yaml(file)
    except Exception as error:  # YAML's own errors, and whatever importing the functions that it names comes to
        raise ValueError(f"{file} cannot be read as a task: {error}") from error
    if "group" in config or not isinstance(config.get("task"), str):
        raise ValueError(f"{file} describes no single task (`task: NAME`): give the file of each task.")
    options = config.get("dataset_kwargs") or {}
    if "data_files" in options:
        config["dataset_kwargs"] = options | {"data_files": _absolute(options["data_files"], file.absolute().parent)}
    return config


def _absolute(paths: Any, folder: Path) -> Any:
    if isinstance(paths, dict):
        return {split: _absolute(path, folder) for split, path in paths.items()}
    if isinstance(paths, list):
        return [_absolute(path, folder) for path in paths]
    return paths if "://" in paths else str(folder / Path(paths).expanduser())


def evaluate_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, list[Any]],
    *,
    batch_size: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> list[dict[str, Any]]:
    """What the harness measures of each task: its `name`, `metrics`, `n`, `chance`, `settings` and `data`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    results = simple_evaluate(
        # The softmax is taken in float32 whatever the weights are: bfloat16 has too few digits for a sum.
        HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"),
        tasks=[task for tasks in loaded.values() for task in tasks],
        task_manager=TaskManager(include_defaults=False),  # they are loaded
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
    )
    files = {tasks[0].task_name: name for name, tasks in loaded.items() if name.endswith((".yaml", ".yml"))}
    settings = {
        "harness": f"lm-eval {importlib.metadata.version('lm_eval')}",
        "apply_chat_template": apply_chat_template,
    }
    return [
        {
            "name": name,
            "metrics": _metrics(row),
            "n": _count(name, results),
            "chance": _chance(results["samples"].get(name, []), results["configs"].get(name, {})),
            "settings": settings
            | {"num_fewshot": results["n-shot"].get(name), "task_version": results["versions"].get(name)},
            "data": _data(name, files.get(name), results),
        }
        for name, row in results["results"].items()
    ]


def _metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """From the harness's entries "acc,none" and "acc_stderr,none"; a filter other than "none" stays in the name."""
    metrics = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            metrics[name] = {"value": value, "stderr": error if isinstance(error, int | float) else None}
    return metrics


def _count(name: str, results: dict[str, Any]) -> int:
    """Questions asked; of a group those of all its tasks."""
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(_count(member, results) for member in results["group_subtasks"][name])


def _chance(samples: list[dict[str, Any]], config: dict[str, Any]) -> float | None:
    """The accuracy of a blind choice; None where nothing is chosen from."""
    if config.get("output_type") != "multiple_choice" or not samples:
        return None
    # For mutual information the harness asks twice as much.
    asked_for_each = 2 if any(metric["metric"] == "acc_mutual_info" for metric in config.get("metric_list", [])) else 1
    shares = [
        (len(sample["target"]) if isinstance(sample["target"], list) else 1) * asked_for_each / len(sample["arguments"])
        for sample in samples
    ]
    return sum(shares) / len(shares)


def _data(name: str, file: str | None, results: dict[str, Any]) -> dict[str, Any]:
    config = results["configs"].get(name, {})
    named = [config.get("metadata", {}).get("dataset"), config.get("dataset_path"), config.get("dataset_name")]
    data = {"dataset": file or "/".join(part for part in named if part) or name}
    if split := config.get("test_split") or config.get("validation_split"):
        data["split"] = split
    if documents := {sample["doc_id"]: sample["doc_hash"] for sample in results["samples"].get(name, [])}:
        data["fingerprint"] = hashlib.sha256("".join(documents.values()).encode()).hexdigest()[:16]
    return data
