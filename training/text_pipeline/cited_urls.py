"""Collects the addresses that Wikipedia cites, the positives of LLaMA's quality classifier (arXiv 2302.13971, 2.1).

    python -m training.text_pipeline.cited_urls enwiki-latest-pages-articles.xml.bz2 --output cited_urls.txt

Reads a MediaWiki XML dump, plain or packed with bz2, as a stream. Cited is what stands in a `<ref>` of an article; of
an archived copy it is the page itself. The addresses come in the dump's order, each once: their hashes are kept in
memory, some 60 bytes each.
"""

import argparse
import bz2
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from .tally import partial_path

REF = re.compile(r"<ref\b[^>]*(?<!/)>(.*?)</ref\s*>", re.IGNORECASE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
# Up to what ends an address in wikitext: white space, a template's | and }, a link's ], markup, quotes.
URL = re.compile(r"https?://[^\s|\[\]{}<>\"]+", re.IGNORECASE)
ARCHIVED = re.compile(r"https?://(?:web\.)?archive\.org/web/\w+/(https?://.+)", re.IGNORECASE)
ARTICLES = "0"  # MediaWiki's number of their namespace


def cited_urls(wikitext: str) -> list[str]:
    """The http addresses in the `<ref>` elements of a page's source, each once, in their order."""
    found = {}
    for reference in REF.finditer(COMMENT.sub("", wikitext)):
        for match in URL.finditer(reference[1]):
            url = match[0].split("''")[0].rstrip(".,;:!?'")
            if url.endswith(")") and "(" not in url:
                url = url[:-1]
            archived = ARCHIVED.fullmatch(url)
            found[archived[1] if archived else url] = None
    return list(found)


def article_texts(dump: Path) -> Iterator[str]:
    """The source of each article. Raises ValueError where the dump is no MediaWiki XML, or ends too early."""
    with (bz2.open if dump.suffix == ".bz2" else open)(dump, "rb") as stream:
        try:
            namespace, text, root = None, None, None
            for event, element in ElementTree.iterparse(stream, ("start", "end")):
                name = element.tag.rpartition("}")[2]
                if root is None:
                    root = element
                    if name != "mediawiki":
                        raise ValueError(f"{dump} is no MediaWiki dump: it is XML that begins with <{name}>.")
                elif event == "start":
                    continue
                elif name == "ns":
                    namespace = element.text
                elif name == "text":
                    text = element.text
                elif name == "page":
                    if namespace == ARTICLES and text:
                        yield text
                    namespace = text = None
                    root.clear()  # or the whole dump would stay in memory
        except (ElementTree.ParseError, EOFError, OSError) as error:
            raise ValueError(f"{dump} cannot be read as a MediaWiki dump ({error}): fetch it again.") from error


def write_cited_urls(dump: Path, output: Path) -> int:
    """Writes the addresses, one a line; returns how many."""
    seen: set[bytes] = set()
    partial = partial_path(output)
    with partial.open("w", encoding="utf-8") as target:
        for text in article_texts(dump):
            for url in cited_urls(text):
                digest = hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=8).digest()
                if digest not in seen:
                    seen.add(digest)
                    target.write(url + "\n")
    os.replace(partial, output)
    return len(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, help="pages-articles.xml.bz2 of a wiki, or the XML in it.")
    parser.add_argument("--output", type=Path, required=True, help="Text file to write, one address a line.")
    arguments = parser.parse_args()
    try:
        print(f"{write_cited_urls(arguments.dump, arguments.output)} addresses in {arguments.output}.")
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
