"""Which lines or documents of each task are to be dropped: written once for all tasks, read by each for itself.

`FOLDER/NAME.places.npy` has the places (counted from 0 within the task) of all tasks one after the other, and
`FOLDER/NAME.ends.npy` where each task's end. A task reads its own slice only.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .tally import partial_path

PLACE = np.dtype("<u4")
MAX_PLACES = 2**32  # of one task


def write_places(folder: Path, name: str, places: Sequence[np.ndarray]) -> None:
    """`places`: one array for each task, in the order of the tasks."""
    save_array(folder / f"{name}.places.npy", np.concatenate([np.empty(0, PLACE), *places]).astype(PLACE, copy=False))
    save_array(folder / f"{name}.ends.npy", np.cumsum([len(of_task) for of_task in places], dtype=np.int64))


def read_places(folder: Path, name: str, task: int) -> np.ndarray:
    """Shape: (places of the task,)."""
    ends = load_array(folder / f"{name}.ends.npy")
    if task >= len(ends):
        raise ValueError(f"{folder / name} is of {len(ends)} tasks, and this is task {task}: run all with as many.")
    places = load_array(folder / f"{name}.places.npy")
    return np.array(places[ends[task - 1] if task else 0 : ends[task]])


def save_array(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(file)
    with partial.open("wb") as target:
        np.save(target, array, allow_pickle=False)
    os.replace(partial, file)


def load_array(file: Path) -> np.ndarray:
    """Mapped, not read: what is not looked at costs nothing."""
    if not file.exists():
        raise ValueError(f"{file} is not there: run the step that writes it first, with the same folder and tasks.")
    return np.load(file, mmap_mode="r", allow_pickle=False)
