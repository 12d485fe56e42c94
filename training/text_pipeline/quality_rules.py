"""Rules of thumb for web text: Gopher's (arXiv 2112.11446, appendix A.1), C4's (1910.10683) and FineWeb's (2406.17557).

The rules are datatrove's filters with its thresholds, which are the papers'. Particular here: words are found by two
regular expressions (`words`), not by spaCy; a rule that holds for English only is left out where a document's
`language` is known to be another; and the rules are datatrove's to the result, at several times its speed.

C4's list of bad words is not included: it is English slang of 2012, and it drops what minorities write (2104.08758).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.utils.text import split_into_words

from .stage import DocumentStage
from .words import UNPUNCTUATED_WORDS, WORDS, n_gram_hashes

# The cheapest first. C4's rules also drop lines, so FineWeb's, which look at the lines, come before.
RULES = ("fineweb", "c4", "gopher_quality", "gopher_repetition")
RULES_BY_WORDS = ("gopher_quality", "gopher_repetition")  # the slow ones; they leave texts as they are
TOO_LONG_WORD = 1000  # characters: datatrove's default, as in the code of C4
FULL_WIDTH_ONE = "\uff11"  # which datatrove takes for a symbol, as CCNet does
# Languages, named as fastText's lid.176 names them, without a space between words: what `words` finds in them are not
# words, so neither their lengths nor their n-grams mean what the rules mean.
WITHOUT_SPACES = frozenset({"bo", "dz", "ja", "km", "lo", "my", "th", "wuu", "yue", "zh"})
# Further ones whose sentences do not end in a mark that C4 knows: . ! ? "
OTHER_FULL_STOP = frozenset(
    {"am", "as", "bh", "bn", "bpy", "hi", "hy", "mai", "mr", "ne", "or", "pa", "pnb", "sa", "sd", "ti", "ur"}
)


@dataclass
class QualityRuleArguments:
    quality_rules: list[str] = field(
        default_factory=lambda: ["gopher_quality", "gopher_repetition", "c4"],
        metadata={
            "help": "Rules that drop documents of the web: gopher_quality, gopher_repetition, c4 (drops lines too), "
            "fineweb; or off. Text whose language is not identified is taken for English."
        },
    )

    def __post_init__(self):
        if self.quality_rules in (["off"], False):  # what YAML makes of off
            self.quality_rules = []
        unknown = [name for name in self.quality_rules if name not in RULES]
        if unknown:
            raise ValueError(
                f"--quality_rules has {', '.join(map(repr, unknown))}: name some of {', '.join(sorted(RULES))}, or off."
            )


def quality_rules(arguments: QualityRuleArguments) -> list[DocumentStage]:
    """A stage for each rule that is asked for, the cheapest first whatever the order they are named in."""
    return [QualityRule(name) for name in RULES if name in arguments.quality_rules]


class QualityRule(DocumentStage):
    """One family of rules, as far as it fits the document's language; one without `language` is taken for English.

    Args:
        name: one of `RULES`, also the stage's name in the report.
    """

    def __init__(self, name: str):
        self.name = name
        super().__init__()
        self.filters = _filters(name)

    def process(self, document: Document) -> str | None:
        if not document.text.strip():
            return "empty"
        language = document.metadata.get("language") or "en"
        rule = self.filters[_kind_of_language(language)]
        if rule is None:
            self.tally.counts[f"not examined: {language}"] += 1
            return None
        kept, reason = get_filter_result(rule.filter(document))
        return None if kept else reason


def _kind_of_language(language: str) -> str:
    if language in WITHOUT_SPACES:
        return "without spaces"
    if language in OTHER_FULL_STOP:
        return "other full stop"
    return "english" if language == "en" else "other"


def _filters(name: str) -> dict[str, BaseFilter | None]:
    """What examines each kind of language; None where the rules mean nothing."""
    if name == "gopher_quality":
        # At least 80 % of the words must have a letter: with punctuation among them, a tenth of Wikipedia's leads fail.
        english = QualityFilter(language=UNPUNCTUATED_WORDS)
        # The stop words are English.
        other = QualityFilter(language=UNPUNCTUATED_WORDS, min_stop_words=None)
        return {"english": english, "other": other, "other full stop": other, "without spaces": None}
    if name == "c4":
        rule = LineFilter(language=WORDS)
        return {"english": rule, "other": rule, "other full stop": None, "without spaces": None}
    if name == "gopher_repetition":
        rule = RepetitionFilter(language=WORDS)
        lines = GopherRepetitionFilter(language=WORDS, top_n_grams=(), dup_n_grams=())
        return {"english": rule, "other": rule, "other full stop": rule, "without spaces": lines}
    rule = FineWebQualityFilter(language=WORDS)
    return dict.fromkeys(("english", "other", "other full stop", "without spaces"), rule)


class LineFilter(C4QualityFilter):
    """datatrove's rules of C4, faster: words that are too long are looked for in the document before in each line."""

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        long_lines = (line for line in document.text.splitlines() if len(line) > TOO_LONG_WORD)
        longest = max((len(word) for line in long_lines for word in line.split()), default=0)
        self.max_word_length = TOO_LONG_WORD if longest > TOO_LONG_WORD else -1
        return super().filter(document)

    def stat_update(self, *names: str, **value: int) -> None:
        """Nothing: counting what becomes of each line took a fourth of the time, and nobody is told."""


class QualityFilter(GopherQualityFilter):
    """datatrove's rules of quality, faster, for words that begin with a letter or a digit: none of them is a symbol."""

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        text = document.text
        if FULL_WIDTH_ONE in text:
            return super().filter(document)
        words = split_into_words(text, self.language)
        if len(words) < self.min_doc_words:
            return False, "gopher_short_doc"
        if len(words) > self.max_doc_words:
            return False, "gopher_long_doc"
        mean_length = sum(map(len, words)) / len(words)
        if mean_length < self.min_avg_word_length:
            return False, "gopher_below_avg_threshold"
        if mean_length > self.max_avg_word_length:
            return False, "gopher_above_avg_threshold"
        if text.count("#") / len(words) > self.max_symbol_word_ratio:
            return False, "gopher_too_many_hashes"
        if (text.count("...") + text.count("…")) / len(words) > self.max_symbol_word_ratio:
            return False, "gopher_too_many_ellipsis"
        lines = text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > self.max_bullet_lines_ratio:
            return False, "gopher_too_many_bullets"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > self.max_ellipsis_lines_ratio:
            return False, "gopher_too_many_end_ellipsis"
        with_letters = sum(word[0].isalpha() or any(map(str.isalpha, word)) for word in words)
        if with_letters / len(words) < self.max_non_alpha_words_ratio:
            return False, "gopher_below_alpha_threshold"
        if self.min_stop_words and len(self.stop_words.intersection(words)) < self.min_stop_words:
            return False, "gopher_enough_stop_words"
        return True


class RepetitionFilter(GopherRepetitionFilter):
    """datatrove's rule of repeated lines, paragraphs and n-grams, faster.

    n-grams are first counted by a hash of their words' numbers, in arrays; where what that gives as an upper bound is
    within a limit, datatrove's slow count is not needed. Hashes that collide only make the bound higher.
    """

    def __init__(self, language):
        super().__init__(language=language)
        self.top_limits, self.repeated_limits = self.top_n_grams, self.dup_n_grams
        self.top_n_grams, self.dup_n_grams = (), ()  # what is left to the base class: lines and paragraphs

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        result = super().filter(document)
        if result is not True:
            return result
        characters = len(document.text)
        words = split_into_words(document.text, self.language)
        numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
        word_numbers = np.fromiter(map(numbers.__getitem__, words), np.uint64, len(words))
        # Of all words up to each place.
        lengths = np.cumsum([0, *map(len, words)])
        most = len(words)
        for n, limit in self.top_limits:
            longest = (lengths[n:] - lengths[:-n]).max(initial=0) + n - 1
            # No n-gram is more frequent than a shorter one: the occurrences of those hold for all.
            if most * longest > limit * characters:
                most = np.unique(n_gram_hashes(word_numbers, n), return_counts=True)[1].max(initial=0)
            if most * longest > limit * characters and _top_n_gram_characters(words, n) > limit * characters:
                return False, f"top_{n}_gram"
        bound = None
        for n, limit in self.repeated_limits:
            # What is in repeated n-grams is in shorter repeated ones too: the bound of the shortest holds for all.
            if bound is None or bound > limit * characters:
                bound = _characters_in_repeated_n_grams(n_gram_hashes(word_numbers, n), lengths, n)
            if bound > limit * characters and _repeated_n_gram_characters(words, n) > limit * characters:
                return False, f"duplicated_{n}_n_grams"
        return True


def _characters_in_repeated_n_grams(hashes: np.ndarray, lengths: np.ndarray, n: int) -> int:
    """No less than `_repeated_n_gram_characters`: all that is in an n-gram that occurred before."""
    _, first = np.unique(hashes, return_index=True)
    if len(first) == len(hashes):
        return 0
    repeated = np.ones(len(hashes), bool)
    repeated[first] = False
    starts = np.flatnonzero(repeated)
    # Where the next one begins before the end of this, it is counted up to there.
    ends = np.minimum(starts + n, np.append(starts[1:], len(lengths)))
    return int((lengths[ends] - lengths[starts]).sum())


def _top_n_gram_characters(words: list[str], n: int) -> int:
    """Characters in all occurrences of the most frequent n-gram, with the spaces between its words."""
    counts = Counter(_n_grams(words, n))
    if not counts:
        return 0
    top = max(counts, key=counts.get)  # the first of several, as `most_common`
    return (sum(map(len, top)) + n - 1) * counts[top]


def _repeated_n_gram_characters(words: list[str], n: int) -> int:
    """Characters in n-grams that occurred before, none counted twice: after one, the next begins behind it."""
    seen = set()
    characters, start = 0, 0
    n_grams = list(_n_grams(words, n))
    while start < len(n_grams):
        n_gram = n_grams[start]
        if n_gram in seen:
            characters += sum(map(len, n_gram))
            start += n
        else:
            seen.add(n_gram)
            start += 1
    return characters


def _n_grams(words: list[str], n: int):
    return zip(*(words[start:] for start in range(n)), strict=False)
