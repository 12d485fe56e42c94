"""Rebuild `emoji/` from the npm package that carries one vendor's images, or build the same of another vendor.

    npm pack emoji-datasource-google@16.0.0
    python training/sample_data/build_emoji.py emoji-datasource-google-16.0.0.tgz

An emoji goes to the test split when the hash of its code points says so: every vendor has the same split.
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as PillowImage

CATEGORIES = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]
TEST_PERCENT = 20


def split_of(code_points: str) -> str:
    return "test" if int(hashlib.sha1(code_points.encode()).hexdigest(), 16) % 100 < TEST_PERCENT else "train"


def lossless_webp(png: bytes) -> tuple[bytes, bytes]:
    """The pixels as RGBA, and a file of them that is a fifth smaller than the PNG."""
    image = PillowImage.open(io.BytesIO(png)).convert("RGBA")
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return image.tobytes(), buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tarball", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "emoji")
    arguments = parser.parse_args()
    images = {}
    with tarfile.open(arguments.tarball) as archive:
        for member in archive:
            if member.name == "package/emoji.json":
                emoji = json.load(archive.extractfile(member))
            elif found := re.fullmatch(r"package/img/\w+/64/(.+\.png)", member.name):
                images[found[1]] = archive.extractfile(member).read()

    rows: dict[str, list[dict]] = {"train": [], "test": []}
    seen = set()
    for entry in sorted(emoji, key=lambda entry: entry["sort_order"]):
        if entry["category"] not in CATEGORIES:  # "Component": five swatches of skin tones
            continue
        pixels, webp = lossless_webp(images[entry["image"]])
        # Norway's flag is also Svalbard's: one of the two could land in each split.
        if pixels not in seen:
            seen.add(pixels)
            name = entry["name"].lower() if entry["name"].isupper() else entry["name"]
            rows[split_of(entry["unified"])].append(
                {
                    "image": {"bytes": webp, "path": entry["image"].replace(".png", ".webp")},
                    "label": CATEGORIES.index(entry["category"]),
                    "name": name,
                }
            )

    schema = Features({"image": Image(), "label": ClassLabel(names=CATEGORIES), "name": Value("string")}).arrow_schema
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, records in rows.items():
        path = arguments.output_dir / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(records, schema=schema), path, compression="zstd", compression_level=19)
        print(f"{split}: {len(records)} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
