"""Scores of a test: top-k accuracy, average precision, and which classes are taken for which.

Shapes: N videos or views, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def top_classes(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the k classes with the highest scores, (N, k), best first; of equal ones, the first.

    Args:
        scores: (N, K).
        k: at most K.
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the mean, over all positives, of the precision at the score of each.

    Charades' definition; there, videos of equal score are ranked in any order, here together, as in
    scikit-learn.

    Args:
        scores: (N,).
        positive: (N,) booleans; at least one is true.
    """
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of videos with the same score
    found = np.cumsum(positive)[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def confusion_matrix(labels: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """Return the number of videos of each class (rows) by prediction (columns), (K, K)."""
    matrix = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (np.asarray(labels, int), np.asarray(predictions, int)), 1)
    return matrix
