"""The pictures of a data set's card: what each stage left, and how long the documents are."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from hub_cards.plots import HELD_OUT, STYLE, TRAINING, WIDE, save_figures, shortened
from hub_cards.readable_numbers import count, quantity

ROW_HEIGHT = 0.28  # inches
MOST_LABELS = 14  # below an axis, without overlap


def draw_pictures(funnel: list[dict[str, Any]], histograms: list[dict[str, Any]], folder: Path) -> dict[str, str]:
    """Draws `funnel.png` and `length.png` into `folder`, which is created where needed; returns name -> file."""
    with matplotlib.rc_context(STYLE):
        drawn = {"funnel": funnel_figure(funnel)}
        lengths = [one for one in histograms if one["numeric"] and one["title"].startswith("Length")]
        if lengths:
            drawn["length"] = length_figure(lengths[0])
        folder.mkdir(parents=True, exist_ok=True)
        save_figures(drawn, folder)
    return {name: f"{name}.png" for name in drawn}


def funnel_figure(funnel: list[dict[str, Any]]) -> Figure:
    """Two columns of horizontal bars, documents and bytes, a row for each stage."""
    figure = Figure(figsize=(WIDE[0], 0.7 + ROW_HEIGHT * len(funnel)), layout="constrained")
    columns = figure.subplots(1, 2, sharey=True)
    labels = [shortened(row["stage"], 24).replace("$", r"\$") for row in funnel]
    for axes, name, unit, color in zip(columns, ("documents", "bytes"), (None, "B"), (TRAINING, HELD_OUT), strict=True):
        values = [row[name] for row in funnel]
        bars = axes.barh(range(len(values)), values, color=color, height=0.7)
        axes.bar_label(bars, [quantity(n, unit) if unit else count(n) for n in values], padding=3, fontsize=8)
        axes.set(title=f"{name} left".capitalize(), yticks=range(len(values)), yticklabels=labels)
        axes.margins(x=0.22)
        axes.grid(False)
        axes.tick_params(left=False)
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)
    columns[0].invert_yaxis()  # which both share
    return figure


def length_figure(histogram: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(WIDE[0], 2.6), layout="constrained")
    axes = figure.add_subplot(title="Length of documents", xlabel="bytes of UTF-8, from", ylabel="documents")
    edges = [name for name, _ in histogram["rows"]]
    width = 0.8 / len(histogram["series"])
    for i, (name, color) in enumerate(zip(histogram["series"], (TRAINING, HELD_OUT), strict=True)):
        places = [place + (i - 0.5) * width for place in range(len(edges))]
        axes.bar(places, [values[i] for _, values in histogram["rows"]], width, color=color, label=name)
    every = -(-len(edges) // MOST_LABELS)
    axes.set_xticks(range(0, len(edges), every), [binary(int(edge)) for edge in edges[::every]])
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.legend()
    return figure


def binary(number: int) -> str:
    """A power of two as people name it: 512, 1 Ki, 64 Ki, 2 Mi."""
    for size, prefix in ((2**30, "Gi"), (2**20, "Mi"), (2**10, "Ki")):
        if number >= size:
            return f"{number // size} {prefix}"
    return str(number)
