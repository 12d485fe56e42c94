"""What a card says of reinforcement learning: of one run of GRPO, and of a road of stages (`training.r1`)."""

import math
import re
from typing import Any

# The stages of a road in its order, and what tables and pictures call them.
STAGES = {
    "base": "Base",
    "zero": "R1-Zero",
    "sft": "SFT",
    "final": "Final",
    "small": "Smaller base",
    "distilled": "Distilled",
}
REWARDS = {
    "accuracy": "how right the answer is, from 0 to 1, by the problem's own scorer where it has one",
    "exact": "1 where the answer is the known one, as a number or a text",
    "symbolic": "1 where the answer equals the known one as mathematics",
    "format": "thoughts in `<think>`, the answer in `<answer>`, and nothing else: from 0 to 1, with credit by part",
    "length": "below 0 for a reply that comes near to the limit of its length or reaches it",
    "repetition": "below 0 for a reply that repeats itself",
    "reward_model": "the score of a reward model",
}
LOSS_PAPERS = {
    "dapo": ("DAPO, whose loss was used", "2503.14476"),
    "dr_grpo": ("Dr. GRPO, whose loss was used", "2503.20783"),
    "cispo": ("CISPO, the loss that was used", "2506.13585"),
    "sapo": ("SAPO, the loss that was used", "2511.20347"),
    "luspo": ("LUSPO, the loss that was used", "2602.05261"),
    "vespo": ("VESPO, the loss that was used", "2602.10693"),
}
EXAMPLES = 3  # Problems whose replies are shown, each by every stage.


def describe_reinforcement(run: dict[str, Any]) -> dict[str, Any]:
    """What the template of `grpo` asks for beside the run's own sections, as far as it follows from them."""
    training = run["training"]
    return {
        "pass_at_k": _pass_at_k(run["metrics"], "eval_"),
        "rewards": _rewards(training.get("rewards") or {}, run["history"]),
        "warnings": _grouped(run["warnings"]),
        "replies": _replies(run["samples"]),
        "loss_paper": LOSS_PAPERS.get(training.get("loss_type")),
    }


def describe_road(report: dict[str, Any]) -> dict[str, Any]:
    """What the templates ask for beside the `report` of a road itself, which is {} where there is none."""
    stages = ordered_stages(report)
    last = "final" if "final" in stages else "sft"
    return {
        "stages": stages,
        "names": STAGES,
        "measures": measures(report),
        "changes": _changes(stages, last),
        "examples": _examples(report),
        "pass_at_k": _pass_at_k(measures(report)),
        "last": last,
    }


def ordered_stages(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that were measured, in the road's order."""
    stages = report.get("stages", {})
    return {name: stages[name] for name in STAGES if name in stages}


def measures(report: dict[str, Any]) -> dict[str, str]:
    """The names of the accuracies that the stages hold, by their keys."""
    found = set().union(*report.get("stages", {}).values())
    names = {"pass@1": "Strict pass@1"} | {key: f"Strict {key}" for key in _pass_at_k(found)}
    names |= {"lenient_pass@1": "Lenient pass@1", "greedy_strict": "Strict, greedy"}
    return {key: name for key, name in (names | {"greedy_lenient": "Lenient, greedy"}).items() if key in found}


def _pass_at_k(names: Any, prefix: str = "") -> list[str]:
    """Of `names` those of pass@k for a k above 1, without `prefix`."""
    sizes = [int(found[1]) for name in names if (found := re.fullmatch(prefix + r"pass@(\d+)", name))]
    return [f"pass@{k}" for k in sorted(sizes) if k > 1]


def _changes(stages: dict[str, dict[str, Any]], last: str) -> list[dict[str, Any]]:
    """Between two stages, of each accuracy the `points` gained, and whether the two intervals are `apart`; `whole`
    where it is the whole road to its `last` stage."""
    pairs = (("base", "zero"), ("base", "sft"), ("sft", "final"), ("base", last), ("small", "distilled"))
    changes = []
    for before, after in dict.fromkeys(pairs):
        if before not in stages or after not in stages:
            continue
        points = {}
        for key in measures({"stages": stages}).keys() & stages[before].keys() & stages[after].keys():
            old, new = stages[before][key], stages[after][key]
            points[key] = {
                "points": 100 * (new["mean"] - old["mean"]),
                "apart": new["low"] > old["high"] or new["high"] < old["low"],
            }
        whole = (before, after) == ("base", last)
        changes.append({"before": before, "after": after, "by": points, "whole": whole})
    return changes


def _examples(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The first problems that have examples, each with the `replies` of the stages in the road's order."""
    problems: dict[str, dict[str, Any]] = {}
    for example in report.get("examples", []):
        problem = problems.setdefault(example["question"], {key: example[key] for key in ("question", "answer")})
        problem.setdefault("replies", []).append(example)
    shown = list(problems.values())[:EXAMPLES]
    for problem in shown:
        problem["replies"].sort(key=lambda example: list(STAGES).index(example["stage"]))
    return shown


def _rewards(weights: dict[str, float], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each reward's `name`, `weight`, `what` it is for, and its mean in the `first` and the `last` log line."""
    rewards = []
    for name, weight in weights.items():
        key = f"rewards/{name}/mean"
        means = [entry[key] for entry in history if entry.get(key) is not None and not math.isnan(entry[key])]
        first, last = (means[0], means[-1]) if means else (None, None)
        rewards.append({"name": name, "weight": weight, "what": REWARDS.get(name), "first": first, "last": last})
    return rewards


def _grouped(warnings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a kind: how `often`, at which `step` first and `last`, and the `text` of the last one."""
    kinds: dict[str, dict[str, Any]] = {}
    for warning in warnings:
        kind = kinds.setdefault(warning["kind"], {"step": warning["step"], "often": 0})
        kind |= {"last": warning["step"], "often": kind["often"] + 1, "text": warning["text"]}
    return list(kinds.values())


def _replies(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each prompt of the last step its reply then (`after`), and the first one that was recorded (`before`), where
    that is another step's."""
    first: dict[str, dict[str, Any]] = {}
    for sample in samples:
        first.setdefault(sample["prompt"], sample)
    last = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    return [
        {"before": before if (before := first[sample["prompt"]])["step"] != sample["step"] else None, "after": sample}
        for sample in last
    ]
