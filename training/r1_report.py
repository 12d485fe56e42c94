"""The report of the R1 road: what every stage was worth, in numbers that its evaluations and runs left."""

import json
from typing import Any

import numpy as np

from hub_cards.build_card import build_card

from .base_model import read_run
from .r1_road import TITLES, Road
from .run_record import FILE_NAME, portable, replace_file
from .solving import difference_interval, mean_interval

# What an evaluation tells of each problem, and what the report calls the mean of it.
PER_PROBLEM = {
    "pass@1": "strict",
    "lenient_pass@1": "lenient",
    "greedy_strict": "greedy_strict",
    "greedy_lenient": "greedy_lenient",
}


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
    stages = {}
    for model, measured in by_model.items():
        folder = road.folder(model, next(iter(measured)))
        stages[model] = {"title": TITLES[model], "folder": folder} | summarise_model(measured)
        runs = [run for seed in measured if (run := read_run(road.folder(model, seed))) is not None]
        if runs:
            stages[model]["seconds"] = round(float(np.mean([run["wall_time_seconds"] for run in runs])), 1)
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
            "met": bool(final > base and final >= 2 * base),
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
