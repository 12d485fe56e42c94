"""The main text of a page, by resiliparse (or trafilatura), with its title and the language that it names.

The bytes are decoded by the first of these that they are valid in: a byte order mark, UTF-8 (text of another charset is
practically never valid UTF-8, whatever the page says of itself), the charset of the HTTP header, that of the page's
`<meta>`, the one that resiliparse detects. Both extractors need time that grows with the square of a page's depth, or
of a tag's attributes; pages beyond what a browser shows are dropped.
"""

import codecs
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from datatrove.data import Document
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
from resiliparse.parse.html import HTMLTree

from .stage import RAW, DocumentStage

BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
# Python's codecs for what these names mean in pages (WHATWG Encoding Standard): with the additions of vendors.
WIDER_CHARSETS = {"shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs", "gbk": "gb18030"}
# Of characters that had to be replaced, where no charset fits: one in so many makes a page undecodable.
CHARACTERS_A_REPLACEMENT = 1000
MAX_DEPTH = 512  # of elements: Blink's kMaximumHTMLParserDOMTreeDepth
# Most pages are not even deep, and the short selector takes half the time.
DEEP, TOO_DEEP = (" > ".join(["*"] * depth) for depth in (MAX_DEPTH // 10, MAX_DEPTH))
MAX_ATTRIBUTES = 10_000  # of a tag: 0.3 s
TAG = re.compile(r"<[a-zA-Z]")


@dataclass
class ExtractionArguments:
    extractor: str = field(
        default="resiliparse",
        metadata={
            "help": "What finds the main text of a page: resiliparse, or trafilatura, which leaves out more and takes "
            "some ten times as long."
        },
    )

    def __post_init__(self):
        if self.extractor not in ("resiliparse", "trafilatura"):
            raise ValueError(f"--extractor is {self.extractor!r}: take resiliparse or trafilatura.")


class ExtractText(DocumentStage):
    """Turns pages into texts; documents that have their text already pass through as they are."""

    name = "extract"

    def __init__(self, arguments: ExtractionArguments):
        super().__init__()
        self.extractor = arguments.extractor
        if self.extractor == "trafilatura":
            import trafilatura  # noqa: F401 (what is missing is told before any work)

    def begin(self, rank: int, world_size: int) -> None:
        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it tells of every page without text

    def process(self, document: Document) -> str | None:
        metadata = document.metadata
        if RAW not in metadata:
            return None
        offset, charset = metadata.pop("offset", 0), metadata.pop("charset", None)
        html = decode_page(metadata.pop(RAW), charset)
        reason = "undecodable" if html is None else "NUL bytes" if "\0" in html else None
        if reason is not None:
            self.tally.bad(metadata.get("file", document.id), offset, reason)
            return reason
        if has_too_many_attributes(html):
            return "too many attributes"
        tree = HTMLTree.parse(html)
        if tree.body is None or all(tree.body.query_selector(depth) is not None for depth in (DEEP, TOO_DEEP)):
            return "nested too deep"
        describe(tree, metadata)
        document.text = self.main_text(tree, html)
        return None if document.text else "no text"

    def main_text(self, tree: HTMLTree, html: str) -> str:
        if self.extractor == "resiliparse":
            return extract_plain_text(tree, main_content=True).strip()
        import trafilatura

        return (trafilatura.extract(html, include_comments=False) or "").strip()


def has_too_many_attributes(html: str) -> bool:
    tags = (part[tag.start() :] for part in long_parts(html) if (tag := TAG.search(part)))
    return any(len(tag.split()) > MAX_ATTRIBUTES for tag in tags)


def long_parts(html: str) -> Iterator[str]:
    """What is between one > and the next, where it is long enough for that many attributes.

    A long one may also be an image as a data URL, which has no white space.
    """
    length, start = 2 * MAX_ATTRIBUTES + 1, 0
    while start + length <= len(html):
        end = html.rfind(">", start, start + length)
        if end < 0:
            end = html.find(">", start + length)
            end = len(html) if end < 0 else end
            yield html[start:end]
        start = end + 1


def decode_page(raw: bytes, http_charset: str | None) -> str | None:
    """The page as text; None where no charset fits it."""
    for mark, charset in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            return decode(raw.removeprefix(mark), charset)
    if not raw.isascii() and (text := decode(raw, "utf-8")) is not None:
        return text
    named = map_encoding_to_html5(http_charset, fallback_utf8=False) if http_charset else None
    if named is not None and (text := decode(raw, named)) is not None:
        return text
    in_page = detect_encoding(raw, from_html_meta=True)  # detected, too, where there is none
    if (text := decode(raw, in_page)) is not None:
        return text
    detected = detect_encoding(raw, html5_compatible=False) or "utf-8"
    detected = map_encoding_to_html5(detected, fallback_utf8=False) or detected
    if (text := decode(raw, detected)) is not None:
        return text
    text = raw.decode(in_page, "replace")
    return None if text.count("\N{REPLACEMENT CHARACTER}") * CHARACTERS_A_REPLACEMENT > len(text) else text


def decode(raw: bytes, charset: str) -> str | None:
    try:
        return raw.decode(WIDER_CHARSETS.get(charset, charset))
    except (UnicodeDecodeError, LookupError):  # of those that may be detected, Python does not know all
        return None


def describe(tree: HTMLTree, metadata: dict[str, str]) -> None:
    """Adds the page's title and language, and the address that it names where none is known."""
    if title := tree.title:
        metadata["title"] = title
    if language := (tree.document.query_selector("html") or tree.body).getattr("lang"):
        metadata["language_hint"] = language.strip()
    if "url" not in metadata and tree.head is not None:
        link = tree.head.query_selector("link[rel~=canonical][href]")
        address = link.getattr("href").strip() if link is not None else ""
        if address.startswith(("http://", "https://")):
            metadata["url"] = address
