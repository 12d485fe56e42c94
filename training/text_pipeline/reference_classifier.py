"""LLaMA's quality filter (arXiv 2302.13971, section 2.1): a linear classifier of pages that Wikipedia cites, against
random pages; what it finds unlike a cited page is dropped.

LLaMA does not say how it was trained; this is RedPajama's reading of it, a fastText classifier of whole documents (as
`training.train_reference_classifier` makes one) and the threshold of 0.25.
"""

import math
from dataclasses import dataclass, field

from datatrove.data import Document

from .fasttext_models import check_model_file, load_classifier, most_likely, on_one_line
from .stage import DocumentStage

REFERENCE, RANDOM = "reference", "random"  # the labels, without fastText's prefix
BINS = 20  # of the histogram of scores


@dataclass
class ReferenceArguments:
    reference_model: str | None = field(
        default=None,
        metadata={
            "help": "fastText model of training.train_reference_classifier, which tells reference pages from random "
            "ones. None switches the filter off."
        },
    )
    min_reference_score: float = field(
        default=0.25,
        metadata={"help": "Documents that are less probably like reference pages are dropped; RedPajama's 0.25."},
    )

    def __post_init__(self):
        if not 0 <= self.min_reference_score <= 1:
            raise ValueError(f"--min_reference_score is {self.min_reference_score}: give a probability, from 0 to 1.")


class ScoreReference(DocumentStage):
    """Sets `reference_score`, the probability of the label "reference" to four decimals, and drops what has little."""

    name = "reference"

    def __init__(self, arguments: ReferenceArguments):
        super().__init__()
        self.arguments = arguments
        self.model = None

    def begin(self, rank: int, world_size: int) -> None:
        self.model = load_classifier(self.arguments.reference_model)

    def process(self, document: Document) -> str | None:
        score = round(reference_score(self.model, document.text), 4)
        document.metadata["reference_score"] = score
        self.tally.histograms["reference_scores"][score_bin(score)] += 1
        return "low reference score" if score < self.arguments.min_reference_score else None

    def end(self, rank: int, world_size: int) -> None:
        self.model = None  # the stage is pickled for its next task


def check_reference_model(arguments: ReferenceArguments) -> None:
    """Raises ValueError, for the driver, where the model cannot be used; does nothing without one."""
    if arguments.reference_model is None:
        return
    labels = check_model_file(arguments.reference_model).labels
    if sorted(labels) != sorted((REFERENCE, RANDOM)):
        found = ", ".join(labels[:5]) or "none, as word vectors have"
        raise ValueError(
            f"--reference_model {arguments.reference_model} should have the labels {REFERENCE} and {RANDOM}, and has "
            f"{found}: train one with training.train_reference_classifier."
        )


def reference_score(model, text: str) -> float:
    """Probability of the label "reference"; zero for a blank text."""
    line = on_one_line(text)
    return dict(most_likely(model, line, labels=2)).get(REFERENCE, 0.0) if line else 0.0


def score_bin(score: float) -> str:
    """The lower edge of its bin of 0.05: 0.00, 0.05, ..., 0.95; the last one holds 1 too."""
    # Of the four decimals, for 0.15 * 20 is less than 3.
    return f"{min(math.floor(round(score * BINS, 3)), BINS - 1) / BINS:.2f}"
