"""The pictures of reinforcement learning: of one run, and of the stages of a road."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .plots import HALF, HELD_OUT, REFERENCE, STYLE, TRAINING, WIDE, new_figure, points_of, save_figures
from .reinforcement import STAGES, measures, ordered_stages

PARTS = ("#4c8c6b", "#c98b2b", "#8a6fb0", "#5b7083", "#b0687c", "#7a8450")  # Of a reward that is a sum.
STRICT, LENIENT, ANY = HELD_OUT, "#3b6ea5", REFERENCE
# The colour tells strict from lenient, a filled marker sampled replies from greedy ones.
LOOKS = {
    "pass@1": (STRICT, "o", True),
    "lenient_pass@1": (LENIENT, "s", True),
    "greedy_strict": (STRICT, "o", False),
    "greedy_lenient": (LENIENT, "s", False),
}
PERCENT = "{x:.4g}%"

Curve = list[tuple[float, float]]


def draw_reinforcement(history: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Draws what a run of GRPO logged as PNG files into `folder`, which is created where needed.

    Returns the file's name for each picture drawn: of `reward`, `pass_at_1`, `length`, `entropy` and `idle` (the shares
    of groups that teach nothing, for their rewards are equal, and of replies that were cut off).
    """
    figures = {}
    with matplotlib.rc_context(STYLE):
        if len(reward := points_of(history, "reward")) > 1:
            figures["reward"] = _reward_figure(reward, history)
        if len(points_of(history, "eval_pass@1")) > 1:
            figures["pass_at_1"] = _pass_figure(history)
        length = {
            "training": (points_of(history, "completions/mean_length"), TRAINING, None),
            "held-out": (points_of(history, "eval_tokens"), HELD_OUT, "o"),
        }
        idle = {
            "groups with equal rewards": (_percent(points_of(history, "frac_reward_zero_std")), TRAINING, None),
            "replies cut off": (_percent(points_of(history, "completions/clipped_ratio")), REFERENCE, None),
        }
        entropy = {"training": (points_of(history, "entropy"), TRAINING, None)}
        for name, title, label, lines in (
            ("length", "Length of replies", "tokens", length),
            ("entropy", "Entropy of the next token", "nats", entropy),
            ("idle", "Equal rewards, replies cut off", "share", idle),
        ):
            if any(len(points) > 1 for points, _, _ in lines.values()):
                figures[name] = _lines_figure(title, label, lines)
        for name, figure in figures.items():
            figure.axes[0].set_xlim(left=0)
            if name != "reward":  # which may be below 0
                figure.axes[0].set_ylim(bottom=0)
        save_figures(figures, folder)
    return {name: f"{name}.png" for name in figures}


def draw_stages(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draws `stages.png`, the accuracy after every stage of a road, into `folder`, which is created where needed."""
    stages = ordered_stages(report)
    if not stages:
        return {}
    with matplotlib.rc_context(STYLE):
        save_figures({"stages": _stages_figure(stages, measures(report))}, folder)
    return {"stages": "stages.png"}


def draw_road_by_step(report: dict[str, Any], folder: Path) -> dict[str, str]:
    """Draws the stages of reinforcement learning by step, as PNG files into `folder`, which is created where needed.

    Returns the file's name for each picture drawn: of `road_accuracy` and `road_length`.
    """
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, section, label, scale in (
            ("road_accuracy", "accuracy_by_step", "strict pass@1", 100),
            ("road_length", "response_length", "tokens a reply", 1),
        ):
            curves = {
                STAGES[stage]: list(seeds.values())
                for stage, seeds in report.get(section, {}).items()
                if any(len(curve) > 1 for curve in seeds.values())
            }
            if curves:
                figures[name] = _seeds_figure(curves, label, scale)
        save_figures(figures, folder)
    return {name: f"{name}.png" for name in figures}


def _reward_figure(reward: Curve, history: list[dict[str, Any]]) -> Figure:
    figure, axes = new_figure(HALF, title="Reward in training", y_label="mean of the samples")
    names = sorted({key.split("/")[1] for entry in history for key in entry if key.startswith("rewards/")})
    parts = {name: points for name in names if len(points := points_of(history, f"rewards/{name}/mean")) > 1}
    if len(parts) > 1:  # alone, it is the reward, up to its weight
        for (name, points), color in zip(parts.items(), PARTS, strict=False):
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=name)
    axes.plot(*zip(*reward, strict=True), color=TRAINING, linewidth=2, label="weighted sum")
    if len(parts) > 1:
        figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    return figure


def _pass_figure(history: list[dict[str, Any]]) -> Figure:
    figure, axes = new_figure(HALF, title="Accuracy, held-out", y_label="pass@1, with 95% intervals")
    for key, name, (color, marker, _) in (
        ("eval_lenient_pass@1", "lenient", LOOKS["lenient_pass@1"]),
        ("eval_pass@1", "strict", LOOKS["pass@1"]),
    ):
        points = _percent(points_of(history, key))
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
        low, high = (_percent(points_of(history, f"{key}_{side}")) for side in ("low", "high"))
        if len(low) == len(points) == len(high):
            steps, lows, highs = [x for x, _ in low], [y for _, y in low], [y for _, y in high]
            axes.fill_between(steps, lows, highs, color=color, alpha=0.2, linewidth=0)
    axes.yaxis.set_major_formatter(PERCENT)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure


def _lines_figure(title: str, label: str, lines: dict[str, tuple[Curve, str, str | None]]) -> Figure:
    figure, axes = new_figure(HALF, title=title, y_label=label)
    for name, (points, color, marker) in lines.items():
        if len(points) > 1 or (points and marker):  # a point without a marker is not to be seen
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
    if label == "share":
        axes.yaxis.set_major_formatter(PERCENT)
    if len(axes.lines) > 1:
        figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure


def _stages_figure(stages: dict[str, dict[str, Any]], names: dict[str, str]) -> Figure:
    """Each accuracy of each stage as a point with its interval, the accuracies of a stage beside each other."""
    figure, axes = new_figure(WIDE, title="Accuracy after every stage, held-out", y_label="right, with 95% intervals")
    axes.set_xlabel(None)
    places = np.linspace(-0.26, 0.26, len(names)) if len(names) > 1 else [0.0]
    for (key, name), place in zip(names.items(), places, strict=True):
        color, marker, filled = LOOKS.get(key, (ANY, "^", True))
        measured = [(i, stage[key]) for i, stage in enumerate(stages.values()) if key in stage]
        means = np.array([100 * accuracy["mean"] for _, accuracy in measured])
        lows, highs = (np.array([100 * accuracy[side] for _, accuracy in measured]) for side in ("low", "high"))
        axes.errorbar(
            [i + place for i, _ in measured], means, yerr=[np.maximum(means - lows, 0), np.maximum(highs - means, 0)],
            color=color, marker=marker, markersize=6, markerfacecolor=color if filled else "white",
            linestyle="none", elinewidth=1.3, capsize=2.5, label=name,
        )  # fmt: skip
    axes.set_xticks(range(len(stages)), [STAGES[name] for name in stages])
    axes.tick_params(axis="x", length=0)
    smaller = [i for i, name in enumerate(stages) if name in ("small", "distilled")]
    if smaller and smaller[0] > 0:  # another model begins
        axes.axvline(smaller[0] - 0.5, color=REFERENCE, linewidth=0.8, linestyle=":")
    axes.set_xlim(-0.5, len(stages) - 0.5)
    axes.set_ylim(0, 102)
    axes.yaxis.set_major_formatter(PERCENT)
    figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return figure


def _seeds_figure(curves: dict[str, list[Curve]], label: str, scale: float) -> Figure:
    """A panel a stage, in it a thin line a seed and, of several, a thick one of their mean."""
    figure = Figure(figsize=(WIDE[0], HALF[1]) if len(curves) > 1 else HALF, layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (title, seeds) in zip(panels, curves.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        _draw_seeds(axes, [[(step, scale * value) for step, value in curve] for curve in seeds if curve])
        axes.set_xlim(left=0)
        if scale == 100:
            axes.yaxis.set_major_formatter(PERCENT)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(label)
    several = max(panels, key=lambda axes: len(axes.lines))
    if len(several.lines) > 1:
        several.legend(fontsize=8)
    return figure


def _draw_seeds(axes: Axes, seeds: list[Curve]) -> None:
    for number, curve in enumerate(seeds):
        name = "each seed" if number == 0 else None
        axes.plot(*zip(*curve, strict=True), color=TRAINING, linewidth=1 if len(seeds) > 1 else 1.6, label=name)
    if len(seeds) > 1:
        values = [dict(curve) for curve in seeds]
        common = sorted(set.intersection(*map(set, values)))
        mean = [sum(curve[step] for curve in values) / len(values) for step in common]
        axes.plot(common, mean, color=HELD_OUT, linewidth=2, label="their mean")


def _percent(points: Curve) -> Curve:
    return [(step, 100 * value) for step, value in points]
