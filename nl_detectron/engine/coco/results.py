"""Outputs of a detector: visualizations, and a file in COCO's results format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np
from detectron2.data import Metadata
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer

from nl_detectron.safety.folders import check_output_file


class ResultsFile:
    """A JSON array on disk that is valid after every :meth:`add`."""

    def __init__(self, path: Path, metadata: Metadata):
        """Create the file with an empty array.

        Args:
            path: file to write.
            metadata: maps classes to category ids; otherwise the ids are class indices, from 1.

        Raises:
            OSError: the file cannot be written.
            ValueError: it is a symbolic link to a file elsewhere.
        """
        check_output_file(path)
        category_ids = metadata.get("thing_dataset_id_to_contiguous_id", {})
        self._id_of_class = {class_id: id_ for id_, class_id in category_ids.items()}
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        self._file.write(b"[]")

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, found: Instances, image_id: int | str) -> None:
        """Append the detections of an image; shifts their keypoints in place, so call it last."""
        results = instances_to_coco_json(found, image_id)
        for result in results:
            class_id = result["category_id"]
            result["category_id"] = self._id_of_class.get(class_id, class_id + 1)
        if results:
            first = self._file.tell() == len(b"[]")
            text = ",\n".join(json.dumps(result) for result in results)
            # A single write replaces the closing bracket, so the file is valid at any time.
            self._file.seek(-1, 2)
            self._file.write(f"{'' if first else ','}\n{text}\n]".encode())


def build_visualizer(
    metadata: Metadata, video: bool
) -> Callable[[np.ndarray, Instances], np.ndarray]:
    """Return a function that draws detections on a BGR image.

    Args:
        metadata: names of classes and keypoints.
        video: whether images are consecutive frames, in which an object keeps its color.
    """
    tracker = VideoVisualizer(metadata)

    def draw(image: np.ndarray, found: Instances) -> np.ndarray:
        rgb = image[:, :, ::-1]
        if video:
            drawn = tracker.draw_instance_predictions(rgb, found)
        else:
            drawn = Visualizer(rgb, metadata).draw_instance_predictions(found)
        return drawn.get_image()[:, :, ::-1]

    return draw
