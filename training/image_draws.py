"""Images as a training draws them: crop, flip and mask are a function of the seed and the draw's number alone.

So a run gives the same pixels in whichever process or worker an image is read, however a batch is split over processes
and accumulation, and after a resume. A draw's number is `epoch * images + index`: what the sampler hands out knows its
epoch even in a worker that was started in an earlier one.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Sampler

from .run_setup import examples_per_step

Item = dict[str, torch.Tensor]


def check_batch(images: Sized, batch: int) -> None:
    """Raises ValueError where the images do not fill one batch."""
    if len(images) < batch:
        raise ValueError(f"There are {len(images)} images and a batch takes {batch}: give more, or a smaller batch.")


class EpochSampler(Sampler[int]):
    """The numbers of an epoch's draws, in a new random order each epoch, as many as fill batches of `batch`.

    However a batch is made up of processes and accumulation, an uneven end would repeat images or be a smaller step:
    each epoch leaves out other images instead.

    Args:
        images: how many there are; a dataset, say.
        batch: images of an optimizer step, over all processes.
        seed: of the order.
        epoch: returns the current epoch when an iteration begins. (What accelerate tells its samplers does not reach
            them in a resumed epoch on several processes.)
    """

    def __init__(self, images: Sized, batch: int, seed: int, epoch: Callable[[], int]):
        self.images, self.batch, self.seed, self.epoch = images, batch, seed, epoch

    def __len__(self) -> int:
        return len(self.images) // self.batch * self.batch

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(_mixed(self.seed, "order", epoch))
        order = torch.randperm(len(self.images), generator=generator)[: len(self)]
        yield from (epoch * len(self.images) + order).tolist()


class DrawnImagesMixin:
    """Put before a trainer class whose training data is `DrawnImages`, or a `drawn_stream`, which needs no sampler."""

    def _get_train_sampler(self, train_dataset=None):
        images = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(images, DrawnImages):
            return None
        batch = examples_per_step(self.args)
        steps = len(images) // batch
        return EpochSampler(images, batch, self.args.seed, lambda: self.state.global_step // steps)

    def units_in_step(self, inputs, num_items_in_batch):
        return examples_per_step(self.args)


class DrawnImages(Dataset):
    """Makes the item of draw `number` from the image `number % len(images)`.

    Args:
        images: an `ImageDataset` without a transform, or any sequence of such rows.
        make_item: the row as the model's inputs; its random numbers are torch's.
        seed: of those random numbers.
    """

    def __init__(self, images: Any, make_item: Callable[[dict[str, Any]], Item], seed: int):
        self.images, self.make_item, self.seed = images, make_item, seed

    def __len__(self) -> int:
        return len(self.images)

    @property
    def skipped(self) -> list[str]:
        return self.images.skipped

    def __getitem__(self, number: int) -> Item:
        return _seeded(self.make_item, self.images[number % len(self.images)], self.seed, number)


def skipped_images(*read: Any) -> dict[str, Any]:
    """How many images could not be read, in all processes, and the names of the first twenty.

    A stream keeps no account of such images, it warns of each: `count` is None with one. Data that are None count as
    read without fault.
    """
    names = sorted(set(gather_object([name for images in read for name in getattr(images, "skipped", ())])))
    known = all(images is None or hasattr(images, "skipped") for images in read)
    return {"count": len(names) if known else None, "names": names[:20]}


def drawn_stream(
    images: datasets.IterableDataset, make_item: Callable[[dict[str, Any]], Item], seed: int, columns: list[str]
) -> datasets.IterableDataset:
    """The same of a stream with these `columns`, where the image's pixels and its place make up the draw's number.

    The place alone would not do: processes and workers count theirs each from zero.
    """

    # No function within this one: workers that are spawned, as on macOS, have to unpickle it.
    draw = partial(_drawn_by_place, make_item=make_item, seed=seed)
    return images.map(draw, with_indices=True, remove_columns=columns)


def _drawn_by_place(row: dict[str, Any], place: int, make_item: Callable[[dict[str, Any]], Item], seed: int) -> Item:
    return _seeded(make_item, row, seed, place, zlib.crc32(row["image"].tobytes()))


def _seeded(make_item: Callable[[dict[str, Any]], Item], row: dict[str, Any], *numbers: int) -> Item:
    # The CPU's generator only: torch.manual_seed would also set that of an accelerator, for nothing.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(_mixed(*numbers))
        return make_item(row)


def _mixed(*numbers: int | str) -> int:
    """One seed of several numbers, such that neighbours have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
