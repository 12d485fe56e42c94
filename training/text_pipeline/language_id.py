"""Language identification as CCNet's (arXiv 1911.00359, section 2.3): fastText's classifier, its best label kept above
a threshold.

Any supervised fastText model whose labels are language codes will do: lid.176.bin or .ftz (176 languages), GlotLID,
OpenLID, or one of `training.train_language_id`. Only the beginning of a document is looked at, by the rule of
`fasttext_models.on_one_line`: more changes few labels and takes most of the time.
"""

import difflib
import re
from dataclasses import dataclass, field

from datatrove.data import Document

from .fasttext_models import check_model_file, load_classifier, most_likely, on_one_line
from .stage import DocumentStage

# ISO 639, maybe with a script or region: en, ceb, zh-TW, bat-smg, eng_Latn.
LANGUAGE_CODE = re.compile(r"[a-z]{2,3}([_-][A-Za-z0-9]{2,8})*")


@dataclass
class LanguageArguments:
    language_model: str | None = field(
        default=None,
        metadata={
            "help": "fastText model that names the language of a document: lid.176.bin, lid.176.ftz, or one of "
            "training.train_language_id. None switches language identification off."
        },
    )
    languages: list[str] | None = field(
        default=None, metadata={"help": "Languages to keep, as the model names them: en fr. None keeps all."}
    )
    min_language_score: float = field(
        default=0.5, metadata={"help": "Documents whose language is less probable are dropped; CCNet's 0.5."}
    )
    language_characters: int = field(
        default=2000,
        metadata={"help": "Characters of a document that its language is told from: its first, cut at a word."},
    )

    def __post_init__(self):
        if not 0 <= self.min_language_score <= 1:
            raise ValueError(f"--min_language_score is {self.min_language_score}: give a probability, from 0 to 1.")
        if self.language_characters < 1:
            raise ValueError(f"--language_characters is {self.language_characters}: give 1 or more.")
        if self.languages is not None and not self.languages:
            raise ValueError("--languages is empty: name the languages to keep, or leave it out to keep all.")
        if self.languages is not None and self.language_model is None:
            raise ValueError("--languages needs --language_model: name the fastText model that tells languages.")


class IdentifyLanguage(DocumentStage):
    """Sets `language` and `language_score` (to four decimals), and keeps what is probably of a language to keep."""

    name = "language"

    def __init__(self, arguments: LanguageArguments):
        super().__init__()
        self.arguments = arguments
        self.languages = frozenset(arguments.languages) if arguments.languages else None
        self.model = None

    def begin(self, rank: int, world_size: int) -> None:
        self.model = load_classifier(self.arguments.language_model)

    def process(self, document: Document) -> str | None:
        line = on_one_line(document.text, self.arguments.language_characters)
        if not line:
            return "no text"
        ((language, score),) = most_likely(self.model, line)
        score = round(score, 4)
        document.metadata["language"], document.metadata["language_score"] = language, score
        self.tally.histograms["languages"][language] += 1
        # Before the language: what is named with so little certainty may as well be of a language to keep.
        if score < self.arguments.min_language_score:
            return "low language score"
        if self.languages is not None and language not in self.languages:
            return "other language"
        self.tally.histograms["languages_kept"][language] += 1
        return None

    def end(self, rank: int, world_size: int) -> None:
        self.model = None  # the stage is pickled for its next task


def check_language_model(arguments: LanguageArguments) -> None:
    """Raises ValueError where the model cannot be used, or does not know a language to keep. Does nothing without one.

    For the driver: reads the model's dictionary (milliseconds for lid.176), so that no worker finds out later.
    """
    if arguments.language_model is None:
        return
    file = arguments.language_model
    known = check_model_file(file).labels
    if not known:
        raise ValueError(f"--language_model {file} is a model of word vectors: name one that classifies languages.")
    if others := [label for label in known if not LANGUAGE_CODE.fullmatch(label)]:
        raise ValueError(
            f"--language_model {file} tells no languages: it has the label {others[0]!r}, which is no language code."
        )
    for language in arguments.languages or ():
        if language not in known:
            similar = difflib.get_close_matches(language, known, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(similar)}?" if similar else f"it knows {', '.join(sorted(known)[:20])}."
            raise ValueError(f"--languages names {language!r}, which {file} does not know: {hint}")
