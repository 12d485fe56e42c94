"""The one way in which images are read: a sample, local files or the Hub, reduced to columns `image` and `label`.

`--dataset` is, in this order: the name of a folder of `training/sample_data`, a local file or folder, a Hub id. What is
wrong with columns and labels is said before any work is spent on them. Whether an image can be read is known only when
it is decoded: one that cannot is left out and counted, and more than one in a hundred stop the run.
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image, ImageOps

from .dataset_source import asked_splits, describe_source, load_from_hub, local_path, refuse_sliced_stream

SUFFIXES = {".parquet", *ImageFolder.EXTENSIONS}
UNREADABLE_SHARE = 0.01
# A stream's share of unreadable images is judged once so many were read.
JUDGED_IMAGES = 1000
# Of each image that a table holds, its first and last so many bytes are part of the fingerprint.
FINGERPRINT_BYTES = 1024
DEFAULT_LABELS = "label"
SLICED_SEED = 0
# Larger integers are no numbers of classes but, say, identifiers: a head of so many outputs is no one's wish.
MOST_CLASSES = 1_000_000


@dataclass
class ImageDataArguments:
    dataset: str = field(
        default="emoji",
        metadata={
            "help": "Images to read: a sample's name, a local folder of images (one folder a class, if there are "
            "classes) or of parquet files, a parquet file, or a Hub id."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a Hub data set that has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; slices: train[:95%%]."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str | None = field(
        default=DEFAULT_LABELS, metadata={"help": "Column that holds the classes; none for images without."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training instead of preparing everything on disk first."}
    )

    def __post_init__(self):
        if self.label_column in ("", "none", "None"):  # the command line knows no other null
            self.label_column = None


class UnreadableImageError(ValueError):
    """An image's bytes are missing, damaged, or those of no image."""


class TooManyUnreadableError(ValueError):
    """More than one in a hundred images cannot be read."""

    def __init__(self, message: str):
        # A DataLoader's worker hands over its traceback, which ends with the sentence.
        super().__init__(message.rsplit(f"{type(self).__name__}: ", 1)[-1].strip())


def load_image_dataset(
    dataset: str,
    split: str,
    image_column: str = "image",
    label_column: str | None = DEFAULT_LABELS,
    require_labels: bool = False,
    class_names: list[str] | None = None,
    config: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset | datasets.IterableDataset:
    """One row an image: `image`, undecoded as `{"bytes", "path"}`, and where there are classes `label`, a ClassLabel.

    A folder of images has as many classes as it has folders with images, all at one depth and beneath `train` and
    `test` if there are such; a `metadata.csv` or `metadata.jsonl` may give columns instead. Strings become classes in
    alphabetical order, integers from 0 are classes of that number. A label that is null or -1 is missing. `split` may
    be a slice, such as "train[:95%]", unless streaming: of the rows in an order drawn once for all, because images
    mostly lie in the order of their classes, and the end would hold the last class alone.

    Args:
        label_column: None leaves the labels out; the default may be absent unless `require_labels`.
        class_names: the classes to number by, those of the training data for held-out data; matched by name.

    Raises:
        FileNotFoundError: nothing of that name, here or (unless HF_HUB_OFFLINE is set) on the Hub, or an empty folder.
        ValueError: no rows, no such split or column, no images in it, labels that are missing or outside the classes.
    """
    if require_labels and label_column is None:
        raise ValueError("Labels are needed here and --label_column is none: name the column that holds the classes.")
    local = local_path(dataset, "image", SUFFIXES)
    if streaming:
        refuse_sliced_stream(split)

    def load(split: str) -> datasets.Dataset | datasets.IterableDataset:
        if local is None:
            return load_from_hub(dataset, split, config, streaming, "image")
        return _load_local(local, split, config, streaming)

    rows = _sliced(load, split) if "[" in split else load(split)
    name = f"{dataset} ({split})"
    first = _first_row(rows, name)
    columns = list(first)
    if image_column not in columns:
        raise ValueError(
            f"{name} has no column {image_column!r}, only {', '.join(columns)}: set --image_column to one."
        )
    if label_column is not None and label_column not in columns:
        if require_labels or label_column != DEFAULT_LABELS:
            raise ValueError(
                f"{name} has no column {label_column!r}, only {', '.join(columns)}: set --label_column to the one that "
                "holds the classes, or put the images of each class into a folder of its own, two or more at one depth."
            )
        label_column = None
    rows = rows if rows.features is not None else rows._resolve_features()  # a stream may have to look at its rows
    _check_images(rows.features[image_column], image_column, name)
    # First of all: other operations on a stream would decode images and encode them again, with loss.
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    names = {image_column: "image"} | ({} if label_column is None else {label_column: "label"})
    rows = rows.select_columns(list(names))
    if renamed := {old: new for old, new in names.items() if old != new}:
        rows = rows.rename_columns(renamed)
    if label_column is None:
        return rows
    if streaming:
        return _check_streamed_labels(rows, name, first[label_column], require_labels, class_names)
    return _as_classes(rows, name, require_labels, class_names)


def _sliced(load: Callable[[str], datasets.Dataset], split: str) -> datasets.Dataset:
    """The slices of whole splits that were shuffled, each in the same way every time."""
    whole = {
        name: load(name).shuffle(seed=SLICED_SEED) for name in {part.split("[")[0].strip() for part in split.split("+")}
    }
    try:
        slices = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in whole.items()}
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"The split {split!r} cannot be read: {error} Give slices such as train[:95%].") from error
    return datasets.concatenate_datasets([whole[part.splitname].select(range(part.from_, part.to)) for part in slices])


def _load_local(
    path: Path, split: str, config: str | None, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{path} is no data set of images: give a folder of images, or parquet files.")
    try:
        if path.is_file():
            builder = datasets.load_dataset_builder("parquet", data_files=str(path.absolute()))
        else:
            builder = datasets.load_dataset_builder(str(path), config)
    except FileNotFoundError as error:  # datasets.exceptions.EmptyDatasetError, DataFilesNotFoundError
        raise FileNotFoundError(f"{path} holds no data files: put images or .parquet files there.") from error
    splits = [str(name) for name in builder.config.data_files]
    files = [file for name in asked_splits(path, split, splits) for file in builder.config.data_files[name]]
    try:
        for file in files:
            if file.endswith(".parquet") and pyarrow.parquet.read_metadata(file).num_rows == 0:
                raise ValueError(f"{file} has no rows: remove it, or give data with at least one image.")
        if streaming:
            rows = builder.as_streaming_dataset(split=split)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=split)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}.") from error
    # Images that lie in train/ and test/ without folders of classes have the splits for classes otherwise.
    label = (rows.features or {}).get("label")
    if isinstance(builder, ImageFolder) and isinstance(label, datasets.ClassLabel) and set(label.names) <= {*splits}:
        rows = rows.remove_columns("label")
    return rows


def _first_row(rows: datasets.Dataset | datasets.IterableDataset, name: str) -> dict[str, Any]:
    """The first row of a stream, its image undecoded, or a table's columns; an error where there is no row."""
    try:
        if isinstance(rows, datasets.IterableDataset):
            first = next(iter(rows.decode(False)), None)
        else:
            first = dict.fromkeys(rows.column_names) if len(rows) else None
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException) as error:
        raise ValueError(f"{name} cannot be read: {error.__cause__ or error}.") from error
    if first is None:
        raise ValueError(f"{name} has no rows: give data with at least one image.")
    return first


def _check_images(feature: Any, column: str, name: str) -> None:
    embedded = isinstance(feature, dict) and getattr(feature.get("bytes"), "dtype", None) in ("binary", "large_binary")
    plain = getattr(feature, "dtype", None) in ("binary", "large_binary")
    if not (isinstance(feature, datasets.Image) or embedded or plain):
        raise ValueError(f"The column {column!r} of {name} holds {feature} where images are expected.")


def _check_streamed_labels(
    rows: datasets.IterableDataset, name: str, first: Any, required: bool, class_names: list[str] | None
) -> datasets.IterableDataset:
    """`rows`, without labels where there are none that a stream can number. The labels are checked as they come."""
    feature = rows.features["label"]
    if isinstance(feature, datasets.ClassLabel) and first not in (None, -1):
        if class_names not in (None, feature.names):
            raise ValueError(f"{name} has other classes than the training data: read it without --streaming.")
        return rows
    if required:
        found = f"holds {feature} without names of classes" if first not in (None, -1) else "begins without labels"
        raise ValueError(f"{name} {found}, from which a stream cannot number its classes: read it without --streaming.")
    return rows.remove_columns("label")


def _as_classes(rows: datasets.Dataset, name: str, required: bool, class_names: list[str] | None) -> datasets.Dataset:
    """`rows` with `label` as a ClassLabel (of `class_names`, where given); without, where labels are not `required`
    and there are none."""
    feature = rows.features["label"]
    kind = getattr(feature, "dtype", "")
    is_class = isinstance(feature, datasets.ClassLabel)
    is_integer = kind.startswith(("int", "uint", "bool"))
    if not (is_class or is_integer or kind in ("string", "large_string")):
        if required:
            raise ValueError(f"The labels of {name} are {feature}: give classes as integers from 0 or as strings.")
        return rows.remove_columns("label")
    labels = rows.select_columns("label").with_format("arrow")[:].column("label").to_pylist()
    missing = [i for i, label in enumerate(labels) if label is None or (is_integer and label == -1)]
    if len(missing) == len(labels):
        if required:
            raise ValueError(f"{name} has no labels, every one is null or -1: name another split or --label_column.")
        return rows.remove_columns("label")
    if missing:
        raise ValueError(
            f"{name} has no label in {len(missing)} rows, the first is row {missing[0]}: remove those, or set "
            "--label_column none to read it without labels."
        )
    if is_class:
        own_names = feature.names
    elif is_integer:
        if max(labels) >= MOST_CLASSES and class_names is None:
            raise ValueError(
                f"Row {labels.index(max(labels))} of {name} has the label {max(labels)}, and integers are numbers of "
                "classes from 0: give those, or strings."
            )
        own_names = class_names or [str(label) for label in range(max(labels) + 1)]
    else:
        own_names = sorted(set(labels))
        numbers = {class_name: number for number, class_name in enumerate(own_names)}
        labels = [numbers[label] for label in labels]
    for row, label in enumerate(labels):
        if not 0 <= label < len(own_names):
            raise ValueError(_label_outside(f"Row {row} of {name}", label, len(own_names)))
    names = class_names or own_names
    if is_class and names == own_names:
        return rows
    numbers = {class_name: number for number, class_name in enumerate(names)}
    for row, label in enumerate(labels):
        if own_names[label] not in numbers:
            raise ValueError(
                f"Row {row} of {name} is of the class {own_names[label]!r}, which is none of the {len(names)} that the "
                f"training data have ({', '.join(names[:5])}, ...): name a split with the same classes."
            )
    labels = [numbers[own_names[label]] for label in labels]
    return rows.remove_columns("label").add_column("label", labels, feature=datasets.ClassLabel(names=names))


def _label_outside(place: str, label: int, classes: int) -> str:
    return f"{place} has the label {label}, outside the {classes} classes 0 to {classes - 1}: mend or remove it."


def decode_image(record: dict[str, Any] | None, num_channels: int = 3, name: str | None = None) -> Image.Image:
    """A `{"bytes", "path"}` as a Pillow image of mode "RGB" (3 channels) or "L" (1), upright.

    Of an animation it is the first frame. What is transparent becomes white. 16-bit images are scaled to 8 bits; so are
    floating-point ones, from 0..1, 0..255 or 0..65535, the smallest of these that holds the values. Values outside of
    all these are stretched between their own least and greatest.

    Raises UnreadableImageError, which begins with `name`, for an image that is missing, empty, cut short, otherwise
    damaged, or larger than Pillow reads (a decompression bomb: more than 179 million pixels).
    """
    mode = {1: "L", 3: "RGB"}.get(num_channels)
    if mode is None:
        raise ValueError(f"Images can be read with 1 channel or 3, not with num_channels = {num_channels}.")
    name = name or image_name(record)
    content = _image_bytes(record, name)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        image = _upright(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders let through whatever their parsing stumbled over
        raise UnreadableImageError(f"{name} cannot be read as an image: {_reason(error)}.") from error


def image_name(record: dict[str, Any] | None, row: int | None = None) -> str:
    """The image's path, from the working folder, or else its row."""
    path = (record or {}).get("path")
    if path:
        return os.path.relpath(path) if os.path.isabs(path) else path
    return "an image without a name" if row is None else f"row {row}"


def _image_bytes(record: dict[str, Any] | None, name: str) -> bytes:
    content, path = (record or {}).get("bytes"), (record or {}).get("path")
    if content is None and path:
        try:
            # Disks and networks that fail are no fault of the image: their errors are let through.
            with fsspec.open(path, "rb") as file:  # also one inside an archive, or on the Hub
                content = file.read()
        except FileNotFoundError as error:
            raise UnreadableImageError(f"{name} cannot be read as an image: there is no such file.") from error
    if not content:
        raise UnreadableImageError(f"{name} cannot be read as an image: it is empty (0 bytes).")
    return content


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata do not damage the picture
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("it holds values that are not finite")
    ranges = (1, 255, 65535) if image.mode == "F" else (65535,)
    top = next((top for top in ranges if high <= top), None) if low >= 0 else None
    bottom, top = (low, high) if top is None else (0, top)
    scaled = (values - bottom) * (255 / ((top - bottom) or 1))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "its format is unknown"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


class ImageDataset(torch.utils.data.Dataset):
    """Decoded images by index; for one that cannot be read, the next that can, with its label.

    An item is `{"pixel_values": transform(image), "labels": int}`, or without a `transform` the row,
    `{"image": Pillow image, "label": int}`; the label is there where the rows have one. Which images could not be read
    is kept in memory that the workers of a DataLoader share.

    Raises (from an item) TooManyUnreadableError once more than one in a hundred of all images proved unreadable.

    Args:
        rows: what `load_image_dataset` returned.
        transform: from a Pillow image (of mode "RGB", or "L" with `num_channels=1`) to the model's input.
    """

    def __init__(
        self, rows: datasets.Dataset, transform: Callable[[Image.Image], Any] | None = None, num_channels: int = 3
    ):
        self.rows, self.transform, self.num_channels = rows, transform, num_channels
        self._unreadable = torch.zeros(len(rows), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        while True:  # ends: the share of unreadable images is bounded
            if not self._unreadable[index]:
                row = self.rows[index]
                try:
                    image = decode_image(row["image"], self.num_channels, image_name(row["image"], index))
                    return _item(row, image, self.transform)
                except UnreadableImageError as error:
                    self._set_aside(index, error)
            index = (index + 1) % len(self)

    @property
    def skipped(self) -> list[str]:
        """The names of the images that could not be read so far, in this process and its DataLoaders' workers."""
        indices = self._unreadable.nonzero().flatten().tolist()
        return [image_name(self.rows[index]["image"], index) for index in indices]

    def _set_aside(self, index: int, error: UnreadableImageError) -> None:
        self._unreadable[index] = 1
        unreadable = int(self._unreadable.sum())
        if unreadable > UNREADABLE_SHARE * len(self):
            raise _too_many(unreadable, f"{len(self)} images", self.skipped, error)


def decode_stream(
    rows: datasets.IterableDataset, transform: Callable[[Image.Image], Any] | None = None, num_channels: int = 3
) -> datasets.IterableDataset:
    """`rows` as the items of an `ImageDataset`, without the images that cannot be read, each of which is warned of.

    Repeat and shuffle before it, so that the buffer holds compressed images. Every process counts for itself, and
    raises TooManyUnreadableError where more than one in a hundred of at least 1,000 images were unreadable.
    """
    label = rows.features.get("label")
    decode = _StreamDecoder(transform, num_channels, None if label is None else label.num_classes)
    # In batches of one, because a batch may return fewer rows than it got.
    return rows.map(decode, batched=True, batch_size=1, remove_columns=list(rows.features))


class _StreamDecoder:
    def __init__(self, transform: Callable[[Image.Image], Any] | None, num_channels: int, classes: int | None):
        self.transform, self.num_channels, self.classes = transform, num_channels, classes
        self.read, self.unreadable, self.names = 0, 0, []

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        row = {column: values[0] for column, values in batch.items()}
        self.read += 1
        named = (row["image"] or {}).get("path")
        name = image_name(row["image"]) if named else f"the image that was read as number {self.read}"
        if self.classes is not None and (row["label"] is None or not 0 <= row["label"] < self.classes):
            raise ValueError(_label_outside(name, row["label"], self.classes))
        try:
            item = _item(row, decode_image(row["image"], self.num_channels, name), self.transform)
        except UnreadableImageError as error:
            self.unreadable += 1
            self.names.append(name)
            if self.read >= JUDGED_IMAGES and self.unreadable > UNREADABLE_SHARE * self.read:
                raise _too_many(self.unreadable, f"the first {self.read} images", self.names, error) from error
            warnings.warn(f"Left out: {error}", stacklevel=1)
            return {}
        return {column: [value] for column, value in item.items()}


def _item(row: dict[str, Any], image: Image.Image, transform: Callable[[Image.Image], Any] | None) -> dict[str, Any]:
    names = ("image", "label") if transform is None else ("pixel_values", "labels")
    item = {names[0]: image if transform is None else transform(image)}
    return item | ({names[1]: row["label"]} if "label" in row else {})


def _too_many(unreadable: int, of: str, names: list[str], last: UnreadableImageError) -> TooManyUnreadableError:
    return TooManyUnreadableError(
        f"{unreadable} of {of} cannot be read ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}), more than "
        f"one in a hundred: mend or remove them. The last: {last}"
    )


def describe_images(rows: datasets.Dataset | datasets.IterableDataset, dataset: str, split: str) -> dict[str, Any]:
    """What a run records of its data: `images`, `classes` where they are labelled, a fingerprint.

    The fingerprint is a hash of the classes' names and of every image's label and size in bytes, in order, with the
    first and last KiB of an image that a table holds and the file name of one that lies in a folder: all of ImageNet
    need not be read for it. A stream has neither size nor end: of it, the first 100 images count. A sample brings its
    `info`: name, licence, origin.
    """
    streaming = isinstance(rows, datasets.IterableDataset)
    label = rows.features.get("label")
    digest = hashlib.sha256("\n".join(label.names if label else []).encode())
    images = 0
    for content, path, number in _stream_parts(rows.take(100)) if streaming else _table_parts(rows):
        if content is None:
            size = os.path.getsize(path) if path and os.path.isfile(path) else -1
            content = os.path.basename(path or "").encode()
        else:
            size = len(content)
            content = content[:FINGERPRINT_BYTES].tobytes() + content[-FINGERPRINT_BYTES:].tobytes()
        digest.update(f"{size} {number} {len(content)} ".encode() + content)
        images += 1
    description = {"dataset": dataset, "split": split, "fingerprint": digest.hexdigest()[:16]}
    description |= describe_source(local_path(dataset, "image", SUFFIXES))
    description |= {"streaming": True} if streaming else {"images": images}
    return description | ({"classes": label.num_classes} if label else {})


Part = tuple[memoryview | None, str | None, int | None]


def _stream_parts(rows: datasets.IterableDataset) -> Iterator[Part]:
    for row in rows:
        image = row["image"] or {}
        content = image.get("bytes")
        yield None if content is None else memoryview(content), image.get("path"), row.get("label")


def _table_parts(rows: datasets.Dataset) -> Iterator[Part]:
    """Bytes, path and label of every image, the bytes where they lie: of a large image only the ends are touched."""
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for batch in table.to_batches():
            images = batch.column("image")
            labels = batch.column("label").to_pylist() if "label" in batch.schema.names else [None] * len(batch)
            paths = images.field("path").to_pylist()
            for content, path, label in zip(images.field("bytes"), paths, labels, strict=True):
                yield memoryview(content.as_buffer()) if content.is_valid else None, path, label
