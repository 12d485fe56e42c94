"""Images as a training draws them: crop, flip and mask are a function of the seed and the draw's number alone.

So a run gives the same pixels in whichever process or worker an image is read, however a batch is split over processes
and accumulation, and after a resume. A draw's number is `epoch * images + index`: what the sampler hands out knows its
epoch even in a worker that was started in an earlier one.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sized
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Sampler

Item = dict[str, torch.Tensor]


def whole_batches(rows: datasets.Dataset, batch: int, seed: int) -> datasets.Dataset:
    """As many of the rows, drawn at random, as fill batches of `batch`; ValueError where they do not fill one.

    However a batch is made up of processes and accumulation, an uneven end would repeat images or be a smaller step.
    """
    if len(rows) < batch:
        raise ValueError(f"There are {len(rows)} images and a batch takes {batch}: give more, or a smaller batch.")
    # At random, because images often lie in the order of their classes: the last would lose the most.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(_mixed(seed, "left out")))
    return rows.select(order[len(rows) % batch :].sort().values.tolist())


class EpochSampler(Sampler[int]):
    """The numbers of an epoch's draws, in a new random order each epoch.

    Args:
        images: how many there are; a dataset, say.
        seed: of the order.
        epoch: returns the current epoch when an iteration begins. (What accelerate tells its samplers does not reach
            them in a resumed epoch on several processes.)
    """

    def __init__(self, images: Sized, seed: int, epoch: Callable[[], int]):
        self.images, self.seed, self.epoch = images, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(_mixed(self.seed, "order", epoch)))
        yield from (epoch * len(self) + order).tolist()


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

    def __getitem__(self, number: int) -> Item:
        return _seeded(self.make_item, self.images[number % len(self.images)], self.seed, number)


def skipped_images(*read: Any) -> dict[str, Any]:
    """How many images could not be read, in all processes, and the names of the first twenty.

    Of what is no `DrawnImages` (a stream, None) nothing is known; a stream warns of such images as it meets them.
    """
    names = [name for images in read if isinstance(images, DrawnImages) for name in images.images.skipped]
    names = sorted(set(gather_object(names)))
    return {"count": len(names), "names": names[:20]}


def drawn_stream(
    images: datasets.IterableDataset, make_item: Callable[[dict[str, Any]], Item], seed: int, columns: list[str]
) -> datasets.IterableDataset:
    """The same of a stream with these `columns`, where the image's pixels and its place make up the draw's number.

    The place alone would not do: processes and workers count theirs each from zero.
    """

    def draw(row: dict[str, Any], place: int) -> Item:
        return _seeded(make_item, row, seed, place, zlib.crc32(row["image"].tobytes()))

    return images.map(draw, with_indices=True, remove_columns=columns)


def _seeded(make_item: Callable[[dict[str, Any]], Item], row: dict[str, Any], *numbers: int) -> Item:
    # The CPU's generator only: torch.manual_seed would also set that of an accelerator, for nothing.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(_mixed(*numbers))
        return make_item(row)


def _mixed(*numbers: int | str) -> int:
    """One seed of several numbers, such that neighbours have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little")
