"""The files that predictions are written to: top classes as JSON, features as NumPy arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import top_classes
from .predictor import Prediction

Top = list[tuple[str, float]]


class Results:
    """Collects what is found in videos, and writes it when the context is left, however it is.

    The JSON has for each video its "file_name", and either "top5" or "windows", each with "start",
    "end" and "top5". A video that cannot be read has an "error", and the windows before it.

    The features have a row for each view of a video, or for each window, the mean of its views:
    "features" (N, C), "file_names" (N,), and "seconds" (N, 2), its first and last frame, or start
    and end of the window.
    """

    def __init__(self, classes: Sequence[str], json_file: Path | None, features_file: Path | None):
        """Take the names of the classes, and of the files that are wanted."""
        self.classes = classes
        self._json_file, self._features_file = json_file, features_file
        self._videos: dict[str, dict[str, Any]] = {}
        self._features: list[np.ndarray] = []
        self._seconds: list[np.ndarray] = []
        self._names: list[str] = []

    def add(self, name: str, found: Prediction, span: tuple[float, float] | None = None) -> Top:
        """Add a video, or with ``span``, start and end in seconds, a window of it.

        Returns:
            Name and score of the five best classes, or of all, if there are fewer.
        """
        (best,) = top_classes(found.scores[None], 5)
        top = [(self.classes[k], float(found.scores[k])) for k in best]
        entry: dict[str, Any] = {"top5": [{"class": c, "score": score} for c, score in top]}
        features = found.features
        seconds = np.stack([found.times.min(1), found.times.max(1)], axis=1)
        if span is None:
            self._videos.setdefault(name, {}).update(entry)
        else:
            entry = {"start": span[0], "end": span[1], **entry}
            self._videos.setdefault(name, {}).setdefault("windows", []).append(entry)
            features, seconds = features.mean(0, keepdims=True), np.array([span])
        if self._features_file:
            self._features.append(features)
            self._seconds.append(seconds)
            self._names += [name] * len(features)
        return top

    def add_error(self, name: str, error: Exception) -> None:
        """Add the reason why a video cannot be read, or not to its end."""
        self._videos.setdefault(name, {})["error"] = str(error)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        if self._json_file:
            videos = [{"file_name": name, **entry} for name, entry in self._videos.items()]
            text = json.dumps({"videos": videos}, indent=1, ensure_ascii=False)
            self._json_file.write_text(text, encoding="utf-8")
        if self._features_file:
            features, seconds = (
                np.concatenate(rows) if rows else np.zeros((0, 0))
                for rows in (self._features, self._seconds)
            )
            names = np.array(self._names)
            np.savez(self._features_file, features=features, seconds=seconds, file_names=names)
