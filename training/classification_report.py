"""What a classifier got right: class by class, and which classes it took for which."""

from typing import Any

import numpy as np


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """`labels` and `predicted`, `(images,)` -> `(classes, classes)`: images of the row's class called the column's."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class_table(counts: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    """A row a class: its images, how many were recognised, precision and recall; None where there is nothing to divide.

    Precision is the share of right answers among the images called so, recall among the images that are so.
    """
    rows = []
    for index, name in enumerate(names):
        images, called, correct = int(counts[index].sum()), int(counts[:, index].sum()), int(counts[index, index])
        rows.append(
            {
                "label": name,
                "images": images,
                "correct": correct,
                "precision": round(correct / called, 4) if called else None,
                "recall": round(correct / images, 4) if images else None,
            }
        )
    return rows
