"""Trains LLaMA's quality classifier (arXiv 2302.13971, section 2.1), and says how well it does on held-out documents.

    python -m training.train_reference_classifier --positives data/cited_pages --negatives data/random_pages \\
        --positives_are "pages that English Wikipedia cites" --negatives_are "random pages of Common Crawl 2024-10" \\
        --output_dir runs/reference_classifier

As RedPajama's: fastText's supervised training at its defaults, on as many positives as negatives, each document on one
line. Where cited and random pages cannot be had, stand-ins can: what they are must be said, and is told wherever the
model's figures are. `python -m training.text_pipeline.cited_urls` collects the addresses of cited pages. The same text
gives the same bytes. Writes `reference.bin`, for `--reference_model` of `training.prepare_text`, with the run's
`run.json`, the precision-recall curve as a picture, and a README.
"""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hub_cards.plots import HALF, HELD_OUT, REFERENCE, STYLE, save_figures

from .command_line import parse_arguments, plain_errors
from .fasttext_training import draw, save_classifier, train_classifier
from .markdown import markdown_table, percent
from .run_record import RunRecord, replace_file
from .text_data import describe_texts, iterate_texts, load_text_dataset
from .text_pipeline import reference_classifier
from .text_pipeline.fasttext_models import training_line
from .text_pipeline.reference_classifier import ReferenceArguments, reference_score

THRESHOLDS = (0.05, 0.1, ReferenceArguments.min_reference_score, 0.5, 0.75, 0.9, 0.95)
CALIBRATION_BINS = 10


@dataclass
class ReferenceClassifierArguments:
    positives: str = field(
        default="",
        metadata={
            "help": "Pages to tell apart as good, such as those that Wikipedia cites: a sample's name, a local file or "
            "folder (parquet, jsonl, json, txt; also .gz), or a Hub id."
        },
    )
    negatives: str = field(default="", metadata={"help": "Random pages, given in the same way."})
    positives_are: str = field(
        default="", metadata={"help": "What the positives are, in a few words: told with all figures."}
    )
    negatives_are: str = field(
        default="", metadata={"help": "What the negatives are, in a few words: told with all figures."}
    )
    positives_split: str = field(default="train", metadata={"help": "Split of --positives; slices: train[:95%%]."})
    negatives_split: str = field(default="train", metadata={"help": "Split of --negatives; slices: train[:95%%]."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the documents, of both."})
    max_documents: int = field(
        default=300_000, metadata={"help": "Documents of each kind, at most, drawn at random; RedPajama's 300,000."}
    )
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the documents that are kept from training, for the figures."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draw, the order and the first weights."})
    output_dir: str = field(
        default="runs/reference_classifier", metadata={"help": "Folder of the run, new or of the same run."}
    )

    def __post_init__(self):
        for name in ("positives", "negatives"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: name a file, folder or data set.")
            if not getattr(self, f"{name}_are").strip():
                raise ValueError(f"--{name}_are is missing: say in a few words what the {name} are.")
        if self.max_documents < 2:
            raise ValueError(f"--max_documents is {self.max_documents}: give 2 or more.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held_out_share is {self.held_out_share}: give a share between 0 and 1.")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: give 0 or more.")


def main() -> None:
    with plain_errors():
        arguments, given = parse_arguments(ReferenceClassifierArguments, description="Trains a quality classifier.")
        sources, data = {}, {}
        for name in ("positives", "negatives"):
            source, split = getattr(arguments, name), getattr(arguments, f"{name}_split")
            sources[name] = load_text_dataset(source, split, arguments.text_column)
            data[name] = describe_texts(sources[name], source, split) | {"are": getattr(arguments, f"{name}_are")}
        record = RunRecord.start(arguments.output_dir, "train_reference_classifier", given, data)
        if record.finished:
            print(f"{arguments.output_dir} holds this model, finished.")
            return
        training, held_out = balanced_split(sources["positives"], sources["negatives"], arguments)
        record.save()
        model = train(training, sources, arguments.seed)
    folder = Path(arguments.output_dir)
    save_classifier(model, folder / "reference.bin")
    scores = {
        name: np.array([reference_score(model, sources[name][index]["text"]) for index in indices])
        for name, indices in held_out.items()
    }
    figures = evaluate(scores["positives"], scores["negatives"])
    figures["trained_on"] = len(training)
    draw_precision_recall(scores["positives"], scores["negatives"], folder)
    replace_file(folder / "README.md", readme(data, figures))
    metrics = {"average_precision": figures["average_precision"], "calibration_error": figures["calibration_error"]}
    record.finish(metrics=metrics, evaluation=figures)
    print(f"Average precision {figures['average_precision']:.4f} on {figures['documents']} held-out documents.")
    print(f"Saved the classifier in {arguments.output_dir}.")


Training = list[tuple[str, int]]  # (positives or negatives, row), in the order in which they are trained on


def balanced_split(
    positives: datasets.Dataset, negatives: datasets.Dataset, arguments: ReferenceClassifierArguments
) -> tuple[Training, dict[str, list[int]]]:
    """As many of either kind, different from each other and not blank, in random order; the first are held out.

    A text that is of both kinds is of neither. Raises ValueError where less than two of a kind are left.
    """
    drawn = {"positives": _drawn(positives, arguments.seed), "negatives": _drawn(negatives, arguments.seed)}
    for number in drawn["positives"].keys() & drawn["negatives"].keys():
        del drawn["positives"][number], drawn["negatives"][number]
    for name, documents in drawn.items():
        if len(documents) < 2:
            raise ValueError(f"--{name} has {len(documents)} documents that the other has not: give at least 2.")
    size = min(arguments.max_documents, *map(len, drawn.values()))
    kept_out = min(max(round(size * arguments.held_out_share), 1), size - 1)
    training, held_out = [], {}
    for name, documents in drawn.items():
        chosen = sorted(documents.items())[:size]
        held_out[name] = [row for _, row in chosen[:kept_out]]
        training += [(number, name, row) for number, row in chosen[kept_out:]]
    return [(name, row) for _, name, row in sorted(training)], held_out


def _drawn(texts: datasets.Dataset, seed: int) -> dict[float, int]:
    """The row of each different text, by its random number."""
    rows: dict[float, int] = {}
    for row, text in enumerate(iterate_texts(texts)):
        if text.strip():
            rows.setdefault(draw(text, seed), row)
    return rows


def train(training: Training, sources: dict[str, datasets.Dataset], seed: int) -> Any:
    labels = {"positives": reference_classifier.REFERENCE, "negatives": reference_classifier.RANDOM}
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.txt"
        with lines.open("w", encoding="utf-8") as target:
            for name, row in training:
                target.write(training_line(labels[name], sources[name][row]["text"]))
        return train_classifier(lines, seed)


def evaluate(positives: np.ndarray, negatives: np.ndarray) -> dict[str, Any]:
    """How well scores tell positives from negatives, of which there are as many.

    Returns:
        average_precision: the area under the precision-recall curve, as a sum of steps.
        thresholds: at each minimum score, `precision`, `recall`, and the share of `negatives_dropped`.
        calibration: for each tenth of the scores, the `documents` in it, their mean `score`, the share of `positives`.
        calibration_error: mean distance of score and share over the tenths, weighted by their documents (the expected
            calibration error of arXiv 1706.04599).
    """
    precision, recall = precision_recall(positives, negatives)
    scores = np.concatenate([positives, negatives])
    truth = np.concatenate([np.ones(len(positives)), np.zeros(len(negatives))])
    bins = np.minimum((scores * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration = [
        {
            "from": i / CALIBRATION_BINS,
            "documents": int(inside.sum()),
            "score": round(float(scores[inside].mean()), 4),
            "positives": round(float(truth[inside].mean()), 4),
        }
        for i in range(CALIBRATION_BINS)
        if (inside := bins == i).any()
    ]
    distances = [row["documents"] * abs(row["score"] - row["positives"]) for row in calibration]
    thresholds = []
    for threshold in THRESHOLDS:
        true, false = int((positives >= threshold).sum()), int((negatives >= threshold).sum())
        thresholds.append(
            {
                "min_reference_score": threshold,
                "precision": round(true / (true + false), 4) if true + false else None,
                "recall": round(true / len(positives), 4),
                "negatives_dropped": round(1 - false / len(negatives), 4),
            }
        )
    return {
        "documents": len(scores),
        "average_precision": round(float(np.sum(np.diff(recall, prepend=0.0) * precision)), 4),
        "thresholds": thresholds,
        "calibration": calibration,
        "calibration_error": round(sum(distances) / len(scores), 4),
    }


def precision_recall(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall where the minimum is each score that occurs, from the highest down: `(scores,)` each."""
    levels = np.unique(np.concatenate([positives, negatives]))[::-1]
    true = len(positives) - np.searchsorted(np.sort(positives), levels, side="left")
    false = len(negatives) - np.searchsorted(np.sort(negatives), levels, side="left")
    return true / (true + false), true / len(positives)


def draw_precision_recall(positives: np.ndarray, negatives: np.ndarray, folder: Path) -> None:
    """Draws `precision_recall.png` into `folder`."""
    precision, recall = precision_recall(positives, negatives)
    threshold = ReferenceArguments.min_reference_score
    true, false = (positives >= threshold).sum(), (negatives >= threshold).sum()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=HALF, layout="constrained")
        axes = figure.add_subplot()
        axes.step(recall, precision, where="pre", color=HELD_OUT)
        if true + false:
            axes.plot(true / len(positives), true / (true + false), "o", color=HELD_OUT)
            axes.annotate(f"score ≥ {threshold}", (true / len(positives), true / (true + false)), (-4, -14),
                          textcoords="offset points", ha="right", color=HELD_OUT)  # fmt: skip
        share = len(positives) / (len(positives) + len(negatives))
        axes.axhline(share, color=REFERENCE, linestyle=":")
        axes.text(0.02, share - 0.02, "by chance", color=REFERENCE, va="top")
        axes.set(title="Held-out documents", xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.05))
        save_figures({"precision_recall": figure}, folder)


def readme(data: dict[str, Any], figures: dict[str, Any]) -> str:
    thresholds = [
        [
            str(row["min_reference_score"]),
            percent(row["precision"]),
            percent(row["recall"]),
            percent(row["negatives_dropped"]),
        ]
        for row in figures["thresholds"]
    ]
    calibration = [
        [f"{row['from']:.1f}", str(row["documents"]), f"{row['score']:.3f}", f"{row['positives']:.3f}"]
        for row in figures["calibration"]
    ]
    return f"""# A classifier of reference pages

`reference.bin` is a fastText classifier of whole documents, trained by `training.train_reference_classifier` on
{figures["trained_on"]:,} documents, half of them positives.

- Positives (`__label__reference`): {data["positives"]["are"]}
- Negatives (`__label__random`): {data["negatives"]["are"]}

On {figures["documents"]:,} held-out documents, half of them positives, its average precision is
{figures["average_precision"]:.4f}. It has learnt what tells these two kinds apart, which is quality only as far as they
differ in that. `run.json` has the command, the data's fingerprints and all figures.

![Precision and recall](precision_recall.png)

{markdown_table(["minimum score", "precision", "recall", "negatives dropped"], thresholds)}

Precision is that among as many positives as negatives; where good pages are rarer it is lower.

How far a score is a probability: the share of positives among documents of similar scores, which lies
{figures["calibration_error"]:.4f} from their mean score on average. Where that is much, choose a minimum score by what
it drops, in the table above.

{markdown_table(["scores from", "documents", "mean score", "share of positives"], calibration)}
"""


if __name__ == "__main__":
    main()
