"""What a classifier took for what: a picture of the counts, and the pairs of classes that it takes for each other.

The picture is for as many classes as have room for their names and counts, so that nothing is told by colour alone; of
more classes the pairs say in words what matters.
"""

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .plots import STYLE, WIDE, shortened

PICTURED_CLASSES = 20
LABEL_LENGTH = 22  # Characters: longer names are shortened; the table of classes has them whole.
COLORS = 128
CELLS = matplotlib.colormaps["Blues"].resampled(21)  # In steps of 5 %: few colours make a small file.


def draw_confusion(labels: list[str], counts: list[list[int]], folder: Path) -> str | None:
    """Draws `confusion.png` into `folder`, which is created where needed; returns its name.

    Nothing is drawn, and None returned, for more than 20 classes.

    Args:
        counts: `(classes, classes)`: images of the row's class that were called the column's.
    """
    if len(labels) > PICTURED_CLASSES:
        return None
    counts = np.asarray(counts)
    # A row's share, not its count: rare classes are as visible as frequent ones.
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "text.parse_math": False}):  # a name may hold a $
        figure = _confusion_figure([shortened(label, LABEL_LENGTH) for label in labels], counts, shares)
        drawn = io.BytesIO()
        figure.savefig(drawn)
    folder.mkdir(exist_ok=True)
    # In so many colours that no eye sees the difference, it is half as large.
    Image.open(drawn).convert("RGB").quantize(COLORS).save(folder / "confusion.png", optimize=True)
    return "confusion.png"


def side(classes: int) -> float:
    """Of the square picture, in inches."""
    return min(max(2.6 + 0.42 * classes, 3.6), WIDE[0])


def _confusion_figure(labels: list[str], counts: np.ndarray, shares: np.ndarray) -> Figure:
    classes = len(labels)
    size, letters = side(classes), 9 if classes <= 12 else 8
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap=CELLS, vmin=0, vmax=1)
    axes.set_xticks(range(classes), labels, rotation=90, fontsize=letters)
    axes.set_yticks(range(classes), labels, fontsize=letters)
    axes.tick_params(length=0, colors="#374151")
    axes.set_xlabel("called", fontweight="bold")
    axes.set_ylabel("is", fontweight="bold")
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="both", color="#e5e7eb", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    for number in range(classes):  # The right answers, also for who does not see the colours.
        axes.add_patch(
            Rectangle((number - 0.5, number - 0.5), 1, 1, fill=False, edgecolor="#374151", linewidth=0.8, clip_on=False)
        )
    # A digit is about 0.65 of its size wide, and names take a fifth of the picture.
    room = 72 * 0.8 * size / classes / (0.65 * (len(str(counts.max())) + 0.5))
    for row, column in np.argwhere(counts):
        color = _letter_color(CELLS(shares[row, column]))
        number, digits = counts[row, column], min(letters, room)
        axes.text(column, row, f"{number}", ha="center", va="center", color=color, fontsize=digits)
    return figure


def _letter_color(background: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast by the WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def most_confused(labels: list[str], counts: list[list[int]], number: int = 10) -> list[dict[str, Any]]:
    """At most `number` pairs, those with the most images first: what it `is`, what it was `called`, how many `images`,
    and of how many `of` that class."""
    counts = np.asarray(counts)
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:number]
    return [
        {"is": labels[row], "called": labels[column], "images": int(wrong[row, column]), "of": int(counts[row].sum())}
        for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[row, column]
    ]
