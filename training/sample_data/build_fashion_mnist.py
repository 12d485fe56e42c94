"""Make parquet files of Fashion-MNIST (arXiv 1708.07747, MIT licence) from the Debian package that carries it.

    apt-get download dataset-fashion-mnist
    dpkg-deb --extract dataset-fashion-mnist_*.deb downloads
    python training/sample_data/build_fashion_mnist.py downloads/usr/share/datasets/fashion-mnist

They take 32 MB, too much for this repository: they go to `downloads/fashion_mnist`, where the recipe expects them.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image
from PIL import Image as PillowImage

# The order of the labels, from the package's README.
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type (8: unsigned byte), the number of axes, their lengths, the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of unsigned bytes: give the package's folder as it is.")
    axes = content[3]
    lengths = np.frombuffer(content, ">i4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(lengths)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output_dir", type=Path, default=Path("downloads/fashion_mnist"))
    arguments = parser.parse_args()

    schema = Features({"image": Image(), "label": ClassLabel(names=CLASSES)}).arrow_schema
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, prefix in PREFIXES.items():
        images = read_idx(arguments.folder / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(arguments.folder / f"{prefix}-labels-idx1-ubyte.gz")
        rows = [
            {"image": {"bytes": png(image), "path": f"{split}_{number:05}.png"}, "label": int(label)}
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
        path = arguments.output_dir / f"{split}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd")
        print(f"{split}: {len(rows)} images, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
