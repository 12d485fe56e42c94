"""The pictures of a card, drawn from a run's `history`: only those whose numbers it holds.

They are opaque white, for the Hub's dark page shows them too, and small enough (below 100 KB) to live in a repository.
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

TRAINING, HELD_OUT, REFERENCE = "#7f9fc4", "#d1495b", "#6b7280"
DASHES = ((4, 2), (1, 1.5), (7, 2, 1, 2))  # Of the runs to compare with; the lines of more would hide each other.
WIDE, HALF = (8.0, 3.6), (4.0, 2.9)  # Inches: of the card's text width, and of half of it with the same letter size.
STYLE = {
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}

# By what they are shares of, the held-out accuracies and their names.
ACCURACIES = {
    "images": {
        "accuracy": "top-1",
        "top5_accuracy": "top-5",
        "knn_accuracy": "k nearest neighbours",
        "linear_accuracy": "linear probe",
    },
    "tokens": {"token_accuracy": "predicted right"},
    "pairs": {"accuracy": "preferred answer above the other"},
}

Point = tuple[float, float]


def draw_curves(
    history: list[dict[str, Any]],
    metrics: dict[str, float],
    folder: Path,
    loss_label: str | None,
    comparisons: list[dict[str, Any]] = (),
    accuracy_of: str = "images",
) -> dict[str, str]:
    """Draws the curves of a training as PNG files into `folder`, which is created where needed.

    Args:
        history: Trainer's log, one dictionary a logged `step`.
        metrics: the run's figures; the compressors' bits per byte among them become lines to compare with.
        loss_label: what the loss is, with its unit; None for a loss that says nothing, which is not drawn.
        comparisons: other runs, each with its `name` and `metrics`; the accuracy of up to three of them, as many as can
            be told apart, becomes a line to compare with.
        accuracy_of: what an accuracy is a share of: images, tokens or pairs.

    Returns the file's name for each picture drawn: of `loss`, `bits_per_byte`, `accuracy` and `learning_rate`.
    """
    loss, held_out_loss = points_of(history, "loss"), points_of(history, "eval_loss")
    bits_per_byte, learning_rate = points_of(history, "eval_bits_per_byte"), points_of(history, "learning_rate")
    accuracies = {
        name: points
        for key, name in ACCURACIES[accuracy_of].items()
        if len(points := points_of(history, f"eval_{key}")) > 1
    }
    compressors = {
        name: metrics[key]
        for name, key in (("gzip -9", "gzip_bits_per_byte"), ("xz -9", "xz_bits_per_byte"))
        if metrics.get(key) is not None
    }

    figures = {}
    with matplotlib.rc_context(STYLE):
        if loss_label is not None and max(len(loss), len(held_out_loss)) > 1:
            figures["loss"] = _loss_figure(loss, held_out_loss, loss_label)
            for unit in ("tokens", "images"):
                _add_scale(figures["loss"].axes[0], points_of(history, f"{unit}_seen"), f"{unit} seen")
        if len(bits_per_byte) > 1:
            figures["bits_per_byte"] = _bits_per_byte_figure(bits_per_byte, compressors)
        if accuracies:
            others = {
                run["name"]: run["metrics"]["eval_accuracy"] for run in comparisons if "eval_accuracy" in run["metrics"]
            }
            figures["accuracy"] = _accuracy_figure(
                accuracies, others if len(others) <= len(DASHES) else {}, f"share of the {accuracy_of}"
            )
        if len(learning_rate) > 1:
            figures["learning_rate"] = _learning_rate_figure(learning_rate)
        for figure in figures.values():
            figure.axes[0].set_xlim(left=0)
        save_figures(figures, folder)
    return {name: f"{name}.png" for name in figures}


def points_of(history: list[dict[str, Any]], key: str) -> list[Point]:
    """`(step, value)` of every entry that has the value."""
    return [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]


def _loss_figure(loss: list[Point], held_out_loss: list[Point], label: str) -> Figure:
    figure, axes = new_figure(WIDE, title="Loss", y_label=label)
    if len(loss) > 1:  # a single point would be a line in the legend alone
        axes.plot(*zip(*loss, strict=True), color=TRAINING, label="training")
    if held_out_loss:
        axes.plot(*zip(*held_out_loss, strict=True), color=HELD_OUT, marker="o", markersize=4, label="held-out")
    axes.legend()
    return figure


def _add_scale(axes: Axes, seen: list[Point], label: str) -> None:
    if not seen or not seen[-1][1]:
        return
    # Steps read nearly as much each, so the second scale is the first one times a constant.
    per_step = seen[-1][1] / seen[-1][0]
    top = axes.secondary_xaxis("top", (lambda step: step * per_step, lambda number: number / per_step))
    top.xaxis.set_major_formatter(EngFormatter())
    top.spines["top"].set_visible(False)
    top.set_xlabel(label, loc="right")


def _accuracy_figure(accuracies: dict[str, list[Point]], others: dict[str, float], y_label: str) -> Figure:
    figure, axes = new_figure(HALF, title="Accuracy, held-out", y_label=y_label)
    for (name, points), color, marker in zip(accuracies.items(), (HELD_OUT, TRAINING), "os", strict=False):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
    for (name, value), dashes in zip(others.items(), DASHES, strict=False):
        label = f"end of {shortened(name, 32)}".replace("$", r"\$")  # no formula
        axes.axhline(value, color=REFERENCE, dashes=dashes, linewidth=1.2, label=label)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    figure.legend(loc="outside lower left", ncols=1 if others else 2, fontsize=8)
    return figure


def shortened(text: str, length: int) -> str:
    """At most `length` characters of `text`, taken from both ends: names often differ only at one."""
    if len(text) <= length:
        return text
    end = (length - 1) // 3
    return f"{text[: length - 1 - end]}…{text[-end:]}"


def _bits_per_byte_figure(bits_per_byte: list[Point], compressors: dict[str, float]) -> Figure:
    figure, axes = new_figure(HALF, title="Bits per byte, held-out", y_label="bits per byte of text")
    axes.plot(*zip(*bits_per_byte, strict=True), color=HELD_OUT, marker="o", markersize=4)
    for name, value in compressors.items():
        axes.axhline(value, color=REFERENCE, linestyle="--", linewidth=1)
        axes.annotate(
            # At the left, where the curve has not begun yet.
            name, (0, value), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
            ha="left", va="bottom", color=REFERENCE, fontsize=8,
        )  # fmt: skip
    return figure


def _learning_rate_figure(learning_rate: list[Point]) -> Figure:
    figure, axes = new_figure(HALF, title="Learning rate", y_label="learning rate")
    axes.plot(*zip(*learning_rate, strict=True), color=REFERENCE)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    return figure


def save_figures(figures: dict[str, Figure], folder: Path) -> None:
    for name, figure in figures.items():
        folder.mkdir(exist_ok=True)
        figure.savefig(folder / f"{name}.png")


def new_figure(size: tuple[float, float], title: str, y_label: str) -> tuple[Figure, Axes]:
    # Figure without pyplot: nothing global, and the Agg canvas whatever screen the machine has.
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel=y_label)
    axes.margins(x=0.02)
    return figure, axes
