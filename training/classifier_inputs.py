"""Images and labels as a classifier is trained and judged on them.

Training images are cropped, flipped, recoloured, erased and mixed by timm's parts, in the order of DeiT (arXiv
2012.12877); held-out ones go one by one through the image processor that is saved with the model, so that the accuracy
is the one that `pipeline("image-classification")` has on the published folder.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from timm.data import Mixup, create_transform
from timm.data.mixup import mixup_target
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from .classifier_models import ImageFormat
from .image_data import UNREADABLE_SHARE, TooManyUnreadableError, UnreadableImageError, decode_image, image_name

UNREADABLE = -100  # a label that torch's and Trainer's losses leave out
Item = dict[str, torch.Tensor]


@dataclass
class AugmentationArguments:
    """The defaults of ConvNeXt's fine-tuning (arXiv 2301.00808, appendix), where all sizes agree."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata={"help": "Smallest and largest share of an image's area that a random crop keeps."},
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Share of images that are flipped left to right."})
    auto_augment: str = field(
        default="rand-m9-mstd0.5-inc1", metadata={"help": "timm's RandAugment or AutoAugment policy; '' for none."}
    )
    random_erasing: float = field(default=0.25, metadata={"help": "Share of the images in which a rectangle is noise."})
    mixup: float = field(default=0.0, metadata={"help": "Mixup's alpha (arXiv 1710.09412); 0 for none."})
    cutmix: float = field(default=0.0, metadata={"help": "CutMix's alpha (arXiv 1905.04899); 0 for none."})

    def __post_init__(self):
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"--crop_scale is {self.crop_scale}: give two shares above 0 and up to 1, smaller first.")
        for name in ("horizontal_flip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give a share from 0 to 1.")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}: give 0 (none) or more.")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class TrainingItem:
    """Makes a row of the data an augmented item; its random numbers are torch's."""

    def __init__(self, arguments: AugmentationArguments, images: ImageFormat):
        try:
            self.transform = create_transform(
                (images.channels, *images.size),
                is_training=True,
                scale=tuple(arguments.crop_scale),
                hflip=arguments.horizontal_flip,
                color_jitter=0.0,
                auto_augment=arguments.auto_augment or None,
                interpolation="bicubic",
                mean=tuple(images.mean),
                std=tuple(images.std),
                re_prob=arguments.random_erasing,
                re_mode="pixel",
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"--auto_augment {arguments.auto_augment!r} is not known to timm: give a policy such as "
                "rand-m9-mstd0.5-inc1, or ''."
            ) from error

    def __call__(self, row: dict[str, Any]) -> Item:
        draw = torch.randint(2**32, ())
        with _timm_draws(int(draw)):
            pixels = self.transform(row["image"])
        return {"pixel_values": pixels, "labels": torch.tensor(row["label"]), "draw": draw}


@contextmanager
def _timm_draws(seed: int) -> Iterator[None]:
    """Within, Python's and numpy's generators, from which timm's transforms draw beside torch's, begin at `seed`."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class HeldOutImages(Dataset):
    """Held-out images by index; one that cannot be read has the label `UNREADABLE`, so that it does not count.

    (In training the next readable image stands in for it, which would here count twice.)

    Args:
        rows: what `load_image_dataset` returned.
    """

    def __init__(self, rows: datasets.Dataset, processor: BaseImageProcessor, images: ImageFormat):
        self.rows, self.processor, self.images = rows, processor, images
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        try:
            image = decode_image(row["image"], self.images.channels, image_name(row["image"], index))
        except UnreadableImageError:
            return {
                "pixel_values": torch.zeros(self.images.channels, *self.images.size),
                "labels": torch.tensor(UNREADABLE),
            }
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": torch.tensor(row["label"])}

    def check_unreadable(self, indices: np.ndarray) -> None:
        """Notes the names of `indices` as skipped; TooManyUnreadableError where they are more than one in a hundred."""
        self.skipped = [image_name(self.rows[int(index)]["image"], int(index)) for index in indices]
        if len(indices) > UNREADABLE_SHARE * len(self):
            raise TooManyUnreadableError(
                f"{len(indices)} of {len(self)} held-out images cannot be read ({', '.join(self.skipped[:5])}), more "
                "than one in a hundred: mend or remove them."
            )


class ClassifierCollator:
    """Batches: for training with `labels (batch, classes)`, smoothed and mixed; held-out ones with `labels (batch,)`.

    Which images are mixed, and how, is drawn by the batch's first item, which knows the run's seed and its epoch.
    """

    def __init__(self, arguments: AugmentationArguments, classes: int, label_smoothing: float):
        self.classes, self.label_smoothing = classes, label_smoothing
        self.mix = None
        if arguments.mixes:
            self.mix = Mixup(arguments.mixup, arguments.cutmix, label_smoothing=label_smoothing, num_classes=classes)

    def __call__(self, items: list[Item]) -> Item:
        pixels = torch.stack([item["pixel_values"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        if "draw" not in items[0]:
            return {"pixel_values": pixels, "labels": labels}
        if self.mix is None:
            return {"pixel_values": pixels, "labels": mixup_target(labels, self.classes, 1.0, self.label_smoothing)}
        with _timm_draws(int(items[0]["draw"])):
            pixels, labels = self.mix(pixels, labels)
        return {"pixel_values": pixels, "labels": labels}
