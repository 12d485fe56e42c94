"""Words and sentences by two regular expressions, where datatrove's blocks would load spaCy.

A word is a run of letters, digits and marks, a single ideograph or kana (their languages put no spaces), or one
punctuation character. A sentence ends at `.`, `!`, `?`, their full-width forms or a line break.
"""

import re

import numpy as np
import regex
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[^\W\p{Han}\p{Hiragana}\p{Katakana}]+(?:['’]\w+)*|[^\w\s]")
# `re` takes half the time, but it has no scripts, and marks and fractions are no part of a word to it. Of other
# characters than these (the rest of Latin, Greek, Cyrillic, punctuation, currencies, arrows) they say the same.
UNFAMILIAR = re.compile(
    "[^\\t-\\r -\xb1\xb4-\xb8\xba\xbb\xbf-\u02ff\u0370-\u0482\u048a-\u0557"
    "\u2000-\u200b\u200e-\u203e\u20a0-\u20cf\u2100-\u214f\u2190-\u2426]"
)
FAMILIAR_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")
SENTENCE = regex.compile(r"[^\s.!?。！？][^\n.!?。！？]*(?:[.!?](?!\s|$)[^\n.!?。！？]*)*[.!?。！？]*[\"'”’)\]]*")
# An n-gram's hash is the sum of its words' hashes, each times the odd number of its place.
PLACES = np.random.default_rng(13).integers(2**64, size=100, dtype=np.uint64) | np.uint64(1)


class RegexWordTokenizer(WordTokenizer):
    """Given to datatrove's blocks as their `language`."""

    def word_tokenize(self, text: str) -> list[str]:
        return (WORD if UNFAMILIAR.search(text) else FAMILIAR_WORD).findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in SENTENCE.finditer(text)]


class UnpunctuatedWordTokenizer(RegexWordTokenizer):
    """The same words without the punctuation: where a share of all words is asked, or the same words differ in it."""

    def word_tokenize(self, text: str) -> list[str]:
        # datatrove keeps the words of the last texts.
        return [word for word in split_into_words(text, WORDS) if word[0].isalnum()]


WORDS = RegexWordTokenizer()
UNPUNCTUATED_WORDS = UnpunctuatedWordTokenizer()


def n_gram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """(words,) hashes of words to (words - n + 1,) hashes of n-grams, none where there are fewer than n words."""
    places = max(len(words) - n + 1, 0)
    hashes = np.zeros(places, np.uint64)
    for place in range(n):
        hashes += words[place : place + places] * PLACES[place]
    return hashes
