"""Extraction: the text of a page in whatever charset, without what surrounds it; and pages that cannot be read."""

import codecs
import random

import pytest
from datatrove.data import Document

from training.text_pipeline.extraction import ExtractionArguments, ExtractText

SENTENCES = {
    "utf-8": "Größe, 日本語, ½ und 👍",
    "windows-1252": "Größe “in Anführungszeichen” – naïve café",
    "windows-1251": "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "koi8-r": "Съешь же ещё этих мягких французских булок, да выпей чаю",
    "shift_jis": "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "euc-jp": "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "gbk": "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。",
    "euc-kr": "다람쥐 헌 쳇바퀴에 타고파",
}


def page(text, head="", attributes=""):
    return f"<!DOCTYPE html><html{attributes}><head>{head}</head><body><p>{text}</p></body></html>"


def extract(raw, stage=None, **metadata):
    """(document, reason, stage) of a page."""
    stage = stage or ExtractText(ExtractionArguments())
    document = Document(text="", id="1", metadata={"raw": raw, "file": "a.warc", "offset": 7} | metadata)
    return document, stage.process(document), stage


@pytest.mark.parametrize("charset", SENTENCES)
def test_charset_of_the_header_or_of_the_page_is_used(charset):
    text = SENTENCES[charset]
    for head, metadata in (
        ("", {"charset": charset}),
        (f'<meta charset="{charset}">', {}),
        (f'<meta http-equiv="Content-Type" content="text/html; charset={charset}">', {}),
    ):
        document, reason, _ = extract(page(text, head).encode(charset), **metadata)
        assert (reason, document.text) == (None, text)


@pytest.mark.parametrize(
    ("charset", "codec", "text"),
    [("shift_jis", "cp932", "①から⑳まで"), ("euc-kr", "cp949", "똠방각하 펲시콜라"), ("gb2312", "gb18030", "镕基 €")],
)
def test_names_of_charsets_mean_what_browsers_read(charset, codec, text):
    document, _, _ = extract(page(text).encode(codec), charset=charset)
    assert document.text == text


def test_charset_that_is_named_by_nobody_is_detected():
    for charset in ("utf-8", "windows-1251", "koi8-r", "shift_jis", "euc-jp", "euc-kr"):
        document, _, _ = extract(page((SENTENCES[charset] + " ") * 20).encode(charset))
        assert SENTENCES[charset] in document.text


def test_wrong_charset_of_the_header_does_not_spoil_valid_text():
    document, _, _ = extract(page(SENTENCES["utf-8"]).encode(), charset="iso-8859-1")
    assert document.text == SENTENCES["utf-8"]
    text = SENTENCES["windows-1251"]
    document, _, _ = extract(page(text, '<meta charset="windows-1251">').encode("windows-1251"), charset="utf-8")
    assert document.text == text
    document, _, _ = extract(page(text, '<meta charset="windows-1251">').encode("windows-1251"), charset="no-such")
    assert document.text == text


@pytest.mark.parametrize(
    ("mark", "charset"),
    [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")],
)
def test_byte_order_mark_comes_first(mark, charset):
    document, _, _ = extract(mark + page(SENTENCES["utf-8"]).encode(charset), charset="windows-1251")
    assert document.text == SENTENCES["utf-8"]


def test_one_broken_byte_is_replaced():
    raw = page("Größe " * 1000).encode()
    document, reason, _ = extract(raw[:200] + b"\xff" + raw[200:], charset="utf-8")
    assert reason is None
    assert document.text.count("Größe") >= 998


def test_what_is_no_text_of_any_charset_is_counted():
    noise = random.Random(0).randbytes(5000).replace(b"\0", b"")
    _, reason, stage = extract(codecs.BOM_UTF8 + noise)
    assert reason == "undecodable"
    assert stage.tally.bad_inputs == [{"file": "a.warc", "offset": 7, "reason": "undecodable"}]
    _, reason, stage = extract(page("one \0 two").encode())
    assert reason == "NUL bytes"
    assert stage.tally.bad_inputs == [{"file": "a.warc", "offset": 7, "reason": "NUL bytes"}]


PARAGRAPHS = [
    f"Paragraph {number} says something of {word}, at some length, so that it is text."
    for number, word in enumerate(["rivers", "mountains", "cities", "harbours"])
]
ARTICLE = f"""<!DOCTYPE html><html lang="de-AT"><head><title> On \n rivers </title>
<link rel="canonical" href="https://example.org/rivers"><style>p {{ color: red }}</style></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>
<main><article><h1>Rivers</h1>{"".join(f"<p>{text}</p>" for text in PARAGRAPHS)}</article></main>
<script>var tracking = 1;</script><footer>All rights reserved, 2024</footer></body></html>"""


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_main_text_title_language_and_address(extractor):
    if extractor == "trafilatura":
        pytest.importorskip("lxml_html_clean")  # without it, trafilatura cannot be imported
    stage = ExtractText(ExtractionArguments(extractor=extractor))
    document, reason, _ = extract(ARTICLE.encode(), stage, language_hint="en")
    assert reason is None
    lines = [line for line in document.text.splitlines() if line.strip()]
    assert lines[-4:] == PARAGRAPHS
    for surrounding in ("Home", "About us", "tracking", "rights reserved", "color"):
        assert surrounding not in document.text
    assert document.metadata == {
        "file": "a.warc",
        "title": "On rivers",
        "language_hint": "de-AT",
        "url": "https://example.org/rivers",
    }


def test_address_of_the_archive_is_kept():
    document, _, _ = extract(ARTICLE.encode(), url="http://example.org/r?x=1")
    assert document.metadata["url"] == "http://example.org/r?x=1"
    document, _, _ = extract(page("text", '<link rel="canonical" href="/relative">').encode())
    assert "url" not in document.metadata


def test_texts_pass_through_as_they_are():
    document = Document(text="<p>a text", id="1", metadata={"title": "t"})
    assert ExtractText(ExtractionArguments()).process(document) is None
    assert (document.text, document.metadata) == ("<p>a text", {"title": "t"})


@pytest.mark.parametrize("raw", [b"", b" \n", b"<html><body></body></html>", b"<script>x = 1</script>"])
def test_pages_without_text_are_dropped(raw):
    assert extract(raw)[1] == "no text"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("<div>" * 100_000 + "text", "nested too deep"),
        ("<div>" * 600 + "text" + "</div>" * 600, "nested too deep"),
        ("<div>" * 400 + "text", None),
        ("<table><tr><td>" * 100_000, "nested too deep"),
        ("<b>" * 100_000 + "text", "nested too deep"),
        ("<p " + " ".join(f"a{number}=1" for number in range(100_000)) + ">text", "too many attributes"),
        ("<p " + "<a x=1 " * 20_000 + ">text", "too many attributes"),
        (f'<img src="data:image/png;base64,{"A" * 100_000}"><p>text</p>', None),
        ("<p>some words</p>" * 10_000, None),
        ("<" * 1_000_000, None),
    ],
    ids=range(10),
)
def test_monstrous_pages_neither_crash_nor_hang(body, reason):
    assert extract(f"<html><body>{body}".encode())[1] == reason


def test_stage_keeps_its_tally():
    documents = [
        Document(text="", id=str(i), metadata={"raw": page(text).encode()}) for i, text in enumerate(["a", ""])
    ]
    stage = ExtractText(ExtractionArguments())
    assert [document.text for document in stage.run(iter(documents))] == ["a"]
    assert (stage.tally.documents_in, stage.tally.documents_out) == (2, 1)
    assert stage.tally.bytes_in == len(page("a")) + len(page(""))
    assert (stage.tally.bytes_out, stage.tally.dropped) == (1, {"no text": 1})


def test_unknown_extractor_is_refused():
    with pytest.raises(ValueError, match="--extractor is 'boilerpipe': take resiliparse or trafilatura"):
        ExtractionArguments(extractor="boilerpipe")
