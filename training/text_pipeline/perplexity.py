"""Quality by perplexity, as in CCNet (arXiv 1911.00359): scores, cut-offs for each language, and three buckets.

Text that is like Wikipedia has a low perplexity: "head". Much of what is in "tail" is no prose: lists, menus, noise.
`ScorePerplexity`, `MeasureCutoffs` (unless cut-offs are given) and `AssignBucket` follow each other, each a phase
later, since the cut-offs are percentiles of all documents of a language. A document without `language` is scored by the
only model, where there is no other. Documents of languages without a model are in the bucket "all".
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document

from .perplexity_model import PerplexityModel, check_models, find_models, only_language
from .stage import DocumentStage, FolderStage
from .tally import power_of_two_bin, replace_file

BUCKETS = ("head", "middle", "tail", "all")
MEASURED = "measured"
EXPECTED_CUTOFFS = "{language: [head, tail]}, two rising positive numbers"


@dataclass
class PerplexityArguments:
    perplexity_models: str | None = field(
        default=None,
        metadata={
            "help": "Folder with CCNet's names: en.sp.model (SentencePiece) and en.arpa.bin (KenLM) for each language; "
            "`python -m training.train_perplexity_model` makes them. Text of unknown language is scored by the only "
            "model, where there is no other. Without a folder, nothing is scored."
        },
    )
    # The parser takes a string or a mapping only where None is possible too.
    perplexity_cutoffs: dict[str, list[float]] | str | None = field(
        default=MEASURED,
        metadata={
            "help": "`measured`: percentiles of this run. Or {language: [head, tail]} (in a recipe), a JSON file of "
            "that (cutoffs.json of an earlier run), or a CSV file in the layout of CCNet's cutoff.csv."
        },
    )
    perplexity_percentiles: list[float] = field(
        default_factory=lambda: [30, 60],
        metadata={
            "help": "Percentiles of a language's perplexities at which its head and its middle end; 30 and 60 in "
            "CCNet's code, thirds in its paper. Also the rows that are read of a CSV file."
        },
    )
    keep_buckets: list[str] = field(
        default_factory=lambda: list(BUCKETS),
        metadata={
            "help": "Buckets whose documents stay: head, middle, tail, all (languages without a model); default, every "
            "one. LLaMA (arXiv 2302.13971) does not say which it kept; RedPajama kept head and middle."
        },
    )

    def __post_init__(self):
        head, tail = (*self.perplexity_percentiles, None, None)[:2]
        if len(self.perplexity_percentiles) != 2 or not 0 < head < tail < 100:
            raise ValueError(
                f"--perplexity_percentiles is {self.perplexity_percentiles}: give two rising numbers between 0 and 100."
            )
        if unknown := [bucket for bucket in self.keep_buckets if bucket not in BUCKETS]:
            raise ValueError(f"--keep_buckets has {unknown[0]!r}: choose among {', '.join(BUCKETS)}.")
        if not self.keep_buckets:
            raise ValueError(f"--keep_buckets is empty and would drop everything: choose among {', '.join(BUCKETS)}.")
        if self.perplexity_models is None and set(self.keep_buckets) != set(BUCKETS):
            raise ValueError("--keep_buckets needs perplexities: name a folder by --perplexity_models.")

    def given_cutoffs(self) -> dict[str, list[float]] | None:
        """Language -> [head, tail] where they are given, and None where they are measured.

        Raises ValueError for a file that cannot be read, and for values that are no two rising positive numbers.
        """
        source = self.perplexity_cutoffs
        if source is None or source == MEASURED:
            return None
        if isinstance(source, dict):
            cutoffs = check_cutoffs(source, "--perplexity_cutoffs")
        else:
            cutoffs = read_cutoffs(Path(source), self.perplexity_percentiles)
        if not cutoffs:
            raise ValueError(f"--perplexity_cutoffs: {source} holds no cut-offs: expected {EXPECTED_CUTOFFS}.")
        return cutoffs


def check_perplexity(arguments: PerplexityArguments) -> None:
    """Raises ValueError, for the driver, where cut-offs or models cannot be used, and ImportError without KenLM."""
    if arguments.perplexity_models is not None:
        arguments.given_cutoffs()
        check_models(arguments.perplexity_models)


class ScorePerplexity(DocumentStage):
    """Adds `perplexity` (to 0.1, as CCNet does) to documents whose `language` has a model, or, without a `language`, to
    all where there is one model only.

    Args:
        models: folder of the models, which are loaded when the first document of their language comes.
        scores: folder that gets RANK.npz, an array of all scores for each language, for `MeasureCutoffs`; or None.
    """

    name = "perplexity"

    def __init__(self, models: str | Path, scores: Path | None = None):
        super().__init__()
        self.folder, self.scores_folder = Path(models), scores
        self.models: dict[str, PerplexityModel | None] = {}
        self.scores: dict[str, list[float]] = defaultdict(list)

    def begin(self, rank: int, world_size: int) -> None:
        self.files = find_models(self.folder)
        self.default_language = only_language(self.files)
        self.scores.clear()

    def process(self, document: Document) -> str | None:
        language = document.metadata.get("language") or self.default_language
        if language not in self.files:
            self.tally.counts["no model of the language"] += 1
            return None
        if language not in self.models:
            self.models[language] = PerplexityModel(*self.files[language])
        perplexity = self.models[language].perplexity(document.text)
        if perplexity is None:
            self.tally.counts["no text to score"] += 1
            return None
        perplexity = round(perplexity, 1)
        document.metadata["perplexity"] = perplexity
        self.scores[language].append(perplexity)
        self.tally.histograms[f"perplexity, {language}"][power_of_two_bin(perplexity)] += 1
        return None

    def end(self, rank: int, world_size: int) -> None:
        self.models.clear()
        if self.scores_folder is not None:
            content = BytesIO()
            np.savez(content, **{language: np.array(self.scores[language]) for language in sorted(self.scores)})
            replace_file(scores_file(self.scores_folder, rank), content.getvalue())


def scores_file(folder: Path, rank: int) -> Path:
    return Path(folder) / f"{rank:05d}.npz"


class MeasureCutoffs(FolderStage):
    """Writes the percentiles of each language's scores, exact over all tasks, as JSON: {language: [head, tail]}.

    A percentile between two documents is interpolated linearly (numpy's default). Memory: 8 bytes for each document of
    the most frequent language.

    Args:
        scores: the folder of `ScorePerplexity`, which ran in `tasks` tasks.
        cutoffs: the file to write.
    """

    name = "perplexity_cutoffs"

    def __init__(self, scores: Path, tasks: int, percentiles: list[float], cutoffs: Path):
        super().__init__()
        self.scores, self.tasks, self.percentiles, self.cutoffs = scores, tasks, percentiles, cutoffs

    def work(self, rank: int, world_size: int) -> None:
        files = defaultdict(list)
        for task in range(self.tasks):
            file = scores_file(self.scores, task)
            with np.load(file) as arrays:
                for language in arrays.files:
                    files[language].append(file)
        cutoffs = {}
        for language in sorted(files):
            scores = np.concatenate([self._load(file, language) for file in files[language]])
            self.tally.counts[f"documents, {language}"] = len(scores)
            cutoffs[language] = np.percentile(scores, self.percentiles, overwrite_input=True).tolist()
        replace_file(Path(self.cutoffs), (json.dumps(cutoffs, indent=1) + "\n").encode())

    def _load(self, file: Path, language: str) -> np.ndarray:
        with np.load(file) as arrays:
            return arrays[language]


class AssignBucket(DocumentStage):
    """Adds `bucket`, and drops documents of other buckets than `keep_buckets`: the reason is the bucket's name.

    A cut-off belongs to the bucket above it, as in CCNet's code: "head" is below the first, "middle" is at least the
    first and below the second, "tail" the rest. "all" is what has no perplexity or a language without cut-offs.

    Args:
        cutoffs: language -> [head, tail], or the JSON file that `MeasureCutoffs` writes in an earlier phase.
        default_language: of documents without a `language`, as `ScorePerplexity` took it.
    """

    name = "bucket"

    def __init__(
        self, cutoffs: dict[str, list[float]] | Path, keep_buckets: list[str], default_language: str | None = None
    ):
        super().__init__()
        self.cutoffs, self.keep_buckets, self.default_language = cutoffs, keep_buckets, default_language

    def begin(self, rank: int, world_size: int) -> None:
        if not isinstance(self.cutoffs, dict):
            self.cutoffs = read_cutoffs(Path(self.cutoffs))

    def process(self, document: Document) -> str | None:
        language = document.metadata.get("language") or self.default_language
        perplexity = document.metadata.get("perplexity")
        bucket = "all" if perplexity is None else choose_bucket(perplexity, self.cutoffs.get(language))
        document.metadata["bucket"] = bucket
        self.tally.histograms[f"bucket, {language or 'no language'}"][bucket] += 1
        return None if bucket in self.keep_buckets else bucket


def choose_bucket(perplexity: float, cutoffs: list[float] | None) -> str:
    if cutoffs is None:
        return "all"
    head, tail = cutoffs
    return "head" if perplexity < head else "middle" if perplexity < tail else "tail"


def read_cutoffs(file: Path, percentiles: Sequence[float] = ()) -> dict[str, list[float]]:
    """Language -> [head, tail] of a JSON file, or of two rows of a CSV file, those of `percentiles`.

    CCNet's CSV has a column for each language and a row for each percentile, whose number is in the first column.

    Raises ValueError for a file that cannot be read, a row that is not there, and values that are no cut-offs.
    """
    if not file.is_file():
        raise ValueError(f"--perplexity_cutoffs: there is no file {file}. Name one, or take `measured`.")
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            return check_cutoffs(json.loads(text), file)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise ValueError(f"--perplexity_cutoffs: {file} cannot be read ({error}): write it again.") from error
        raise
    header, *rows = [row for row in csv.reader(text.splitlines()) if row] or [[]]
    found = {row[0].strip(): row for row in rows}
    cutoffs: dict[str, list[Any]] = {language.strip(): [] for language in header[1:]}
    for percentile in percentiles:
        row = found.get(f"{percentile:g}")
        if row is None or len(row) != len(header):
            raise ValueError(
                f"--perplexity_cutoffs: {file} has no row of {len(header)} columns for the percentile {percentile:g}: "
                "set --perplexity_percentiles to two of its rows."
            )
        for language, value in zip(cutoffs, row[1:], strict=True):
            cutoffs[language].append(value)
    return check_cutoffs(cutoffs, file)


def check_cutoffs(cutoffs: Any, source: str | Path) -> dict[str, list[float]]:
    """As numbers; there may be none, as measured of documents of which none was scored."""
    if not isinstance(cutoffs, dict):
        raise ValueError(f"{source} holds no cut-offs: expected {EXPECTED_CUTOFFS}.")
    checked = {}
    for language, values in cutoffs.items():
        try:
            head, tail = map(float, values)
        except (TypeError, ValueError):
            head = tail = math.nan
        if not 0 < head <= tail:
            raise ValueError(f"{source} has {values!r} for the language {language!r}: expected {EXPECTED_CUTOFFS}.")
        checked[str(language)] = [head, tail]
    return checked
