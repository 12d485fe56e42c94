"""Rules of thumb: clean text passes, planted bad text is dropped, and no text makes a rule fail."""

import pickle
import random
import re

import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import get_filter_result
from datatrove.utils.text import PUNCTUATION_SET

from training.dataset_source import SAMPLE_DATA
from training.text_pipeline.quality_rules import RULES, QualityRule, QualityRuleArguments, quality_rules
from training.text_pipeline.words import FAMILIAR_WORD, UNFAMILIAR, UNPUNCTUATED_WORDS, WORD, WORDS

DEFAULT_STAGES = quality_rules(QualityRuleArguments())


@pytest.fixture(scope="module")
def pages():
    """Wikipedia leads joined by fours: most of them alone are shorter than Gopher's 50 words."""
    leads = pq.read_table(SAMPLE_DATA / "wikipedia_leads/test.parquet")["text"].to_pylist()
    return ["\n".join(leads[start : start + 4]) for start in range(0, 400, 4)]


def kept_share(texts, stages=DEFAULT_STAGES, **metadata):
    documents = [Document(text=text, id=str(number), metadata=dict(metadata)) for number, text in enumerate(texts)]
    data = documents
    for stage in stages:
        data = stage.run(data)
    return len(list(data)) / len(documents)


def test_clean_pages_pass(pages):
    assert kept_share(pages) >= 0.98


def test_pages_of_shuffled_letters_are_dropped(pages):
    """Gibberish of the same words' lengths has no stop words, and hardly a line that ends in a full stop."""
    generator = random.Random(0)
    gibberish = []
    for page in pages:
        letters = [letter for letter in page if not letter.isspace()]
        generator.shuffle(letters)
        words = [len(word) for word in page.split()]
        gibberish.append(" ".join("".join(letters.pop() for _ in range(length)) for length in words))
    assert kept_share(gibberish) <= 0.02


def test_navigation_lists_are_dropped(pages):
    """Lines of one to three words without a full stop, as menus and tables of contents have them."""
    generator = random.Random(0)
    menus = []
    for page in pages:
        words = page.split()
        lines = [" ".join(generator.sample(words, generator.randint(1, 3))).rstrip('.!?"') for _ in range(80)]
        menus.append("\n".join(lines))
    assert kept_share(menus) == 0


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_repeated_text_is_dropped(pages, share):
    """A sentence repeated until it makes this share of the page's characters."""
    repeated = []
    for page in pages[:50]:
        sentence = page.split(". ")[0] + ". "
        copies = int(share * len(page) / (1 - share) / len(sentence)) + 2
        repeated.append(page + " " + sentence * copies)
    assert kept_share(repeated) == 0


def test_boilerplate_lines_are_dropped_and_the_rest_stays(pages):
    menu, policy = "Home | Products | About us", "This site uses cookies, read our policy for details."
    document = Document(text=f"{menu}\n{pages[0]}\n{policy}", id="0")
    assert [kept.text for kept in QualityRule("c4").run([document])] == [pages[0]]


def test_stop_words_are_asked_of_english_only(pages):
    """Pages without Gopher's eight English words, and otherwise as before."""
    foreign = [re.sub(r"\b(the|be|to|of|and|that|have|with)\b", "que", page) for page in pages]
    stage = QualityRule("gopher_quality")
    assert kept_share(foreign, [stage], language="es") == 1
    assert kept_share(foreign, [stage], language="en") == 0
    assert kept_share(foreign, [stage]) == 0


def test_languages_without_spaces_are_not_measured_in_words():
    text = "東京は日本の首都です。人口は千四百万人を超えます。" * 3
    stages = [QualityRule("c4"), QualityRule("gopher_quality")]
    assert kept_share([text], stages, language="ja") == 1
    assert stages[0].tally.counts == {"not examined: ja": 1}


def test_repetition_equals_datatrove(pages):
    """On clean pages, and on pages of which parts are copied so that every limit is crossed by some."""
    generator = random.Random(0)
    texts = pages[:25]
    for page in pages[:25]:
        words = page.split()
        for length in (2, 3, 5, 7, 12):
            start = generator.randrange(len(words) - length)
            part = words[start : start + length]
            texts.append(" ".join(words + (part + generator.sample(words, 3)) * generator.randint(1, 30)))
    texts += ["a", "a b", "!", "a\n\na\n\nb", "a " * 50, "\n\nx\n"]
    reference = GopherRepetitionFilter(language=WORDS)
    ours = QualityRule("gopher_repetition").filters["english"]
    results = [get_filter_result(ours.filter(Document(text=text, id=""))) for text in texts]
    assert results == [get_filter_result(reference.filter(Document(text=text, id=""))) for text in texts]
    assert len({reason for _, reason in results}) > 6


def test_quality_equals_datatrove(pages):
    """On clean pages, and on some that cross each limit."""
    texts = [
        *pages[:25],
        "word " * 49,
        "the and of ab " * 25_001,
        "a the of " * 40,
        "½²³ 1a _b " * 60,
        "\uff11 the and " * 30,
    ]
    for page in pages[:5]:
        words = page.split()
        texts += [
            page + " #" * len(words),
            " ... ".join(words),
            "…".join(words),
            "".join(f" - {word} the be of have\n" for word in words),
            "".join(f"{word} the be of have and that makes these lines longer ...\n" for word in words),
            "".join(f" {word} 1234" for word in words),
            "".join(f" {word}" * 3 for word in words if len(word) > 5),
            "".join(words),
            " ".join("pneumonoultramicroscopic" + word for word in words),
        ]
    reference = GopherQualityFilter(language=UNPUNCTUATED_WORDS)
    ours = QualityRule("gopher_quality").filters["english"]
    results = [get_filter_result(ours.filter(Document(text=text, id=""))) for text in texts]
    assert results == [get_filter_result(reference.filter(Document(text=text, id=""))) for text in texts]
    assert len({reason for _, reason in results}) == 11  # all, and None
    # What lets a word that begins with a letter or a digit be none of datatrove's symbols.
    assert [character for character in PUNCTUATION_SET if character.isalnum()] == ["\uff11"]


def test_words_of_familiar_characters_are_those_of_all():
    """`re` and `regex` find the same words in what has only characters that the one is used for."""
    characters = [character for character in map(chr, range(0x110000)) if not UNFAMILIAR.search(character)]
    assert {"a", "7", "\n", "é", "’", "я", "€"} <= set(characters)
    for character in characters:
        text = f"a{character}1'{character} ’{character}b{character}"
        assert FAMILIAR_WORD.findall(text) == WORD.findall(text), hex(ord(character))


def test_c4_equals_datatrove(pages):
    generator = random.Random(0)
    planted = ["x" * 1001 + " is a long word.", "y" * 1000 + " is not one.", "Only two.", "Without a full stop"]
    planted += [
        "We use cookies on this page.",
        "Switch on Javascript to see this.",
        "Lorem ipsum dolor sit amet.",
        "{ } ;.",
    ]
    texts = ["x" * 1001 + " is a long word.\nAnd this is not. Nor this."]
    for page in pages[:40]:
        lines = page.split("\n") + generator.sample(planted, 2)
        texts.append("\u2028".join(generator.sample(lines, len(lines))))
    documents = [[Document(text=text, id="") for text in texts] for _ in range(2)]
    rules = [QualityRule("c4").filters["english"], C4QualityFilter(language=WORDS)]
    ours, reference = (
        [(*get_filter_result(rule.filter(document)), document.text) for document in copies]
        for rule, copies in zip(rules, documents, strict=True)
    )
    assert ours == reference
    assert len({reason for _, reason, _ in ours}) > 2


@pytest.mark.parametrize("language", ["en", "fr", "hi", "zh"])
def test_no_text_makes_a_rule_fail(language):
    """Each is dropped or kept; none raises."""
    texts = ["", " \n\t ", "word", "!?… ...", "\0" * 100, "\ud800 the of " * 60, "\x1c\x1d\n" * 60, "\n" * 99]
    texts += [
        "\x85" * 99,
        "\u200b \u180e" * 60,
        "a" * 100_000,
        "word " * 20_000,
        "# " * 1000,
        "_ " * 100,
        "\u0301 " * 100,
    ]
    for rule in RULES:
        assert 0 <= kept_share(texts, [QualityRule(rule)], language=language) <= 1


def test_stages_are_those_asked_for_and_go_to_workers():
    names = [stage.name for stage in quality_rules(QualityRuleArguments(quality_rules=["fineweb", "gopher_quality"]))]
    assert names == ["fineweb", "gopher_quality"]
    assert quality_rules(QualityRuleArguments(quality_rules=["off"])) == []
    assert [stage.name for stage in pickle.loads(pickle.dumps(DEFAULT_STAGES))] == [
        "c4",
        "gopher_quality",
        "gopher_repetition",
    ]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"quality_rules.*'gophers'.*gopher_quality"):
        QualityRuleArguments(quality_rules=["gophers"])
