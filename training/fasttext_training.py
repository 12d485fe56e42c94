"""Trains fastText classifiers (arXiv 1607.01759) so that the same text gives the same bytes."""

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fasttext

from .text_pipeline.tally import partial_path

M_PERTURB = -6  # of glibc's mallopt: memory is handed out filled with the complement of the value
MIN_ROWS_QUANTISED = 256  # fastText's, words and n-gram buckets together


def train_classifier(lines: Path, seed: int, **options: Any) -> Any:
    """A supervised model of the labelled `lines`, a file as fastText reads it.

    On one thread, for several would add their steps in an order that changes from run to run.

    Args:
        options: of `fasttext.train_supervised`.

    Raises ValueError where training diverges.
    """
    try:
        with zeroed_memory():
            return fasttext.train_supervised(str(lines), seed=seed, thread=1, verbose=0, **options)
    except RuntimeError as error:  # "Encountered NaN."
        raise ValueError(
            f"fastText gave up ({error}) at a learning rate of {options.get('lr', 0.1)}: lower it."
        ) from error


def draw(text: str, seed: int) -> float:
    """A number in [0, 1) that is as good as random and belongs to the text: by it texts are put into a random order,
    or held out, wherever they stand in their data set and however often."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, salt=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest()[:6], "little") / 2**48


def save_classifier(model: Any, file: Path) -> None:
    """Writes the model beside its place first, as `text_pipeline.tally.replace_file` does."""
    partial = partial_path(file)
    model.save_model(str(partial))
    partial.replace(file)


@contextlib.contextmanager
def zeroed_memory() -> Iterator[None]:
    """Memory allocated within is zero, where the C library is glibc.

    fastText draws its first weights in ten blocks, one a thread: with one thread nine tenths of them are what the
    memory held before, other weights at every run, and often no number. As zeros they learn somewhat later than drawn
    ones: 92.2 % right against 92.9 % (softmax), 94.7 % against 95.2 % (hs), of 2,000 paragraphs in 26 languages after
    five epochs on 18,000.
    """
    allocator = ctypes.CDLL(None)
    if not hasattr(allocator, "mallopt"):
        yield
        return
    allocator.mallopt(M_PERTURB, 0xFF)
    try:
        yield
    finally:
        allocator.mallopt(M_PERTURB, 0)
