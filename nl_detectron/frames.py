"""Images, videos and webcams as one: frames to read, and pictures of what was found in them."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import Visualizer
from tqdm import tqdm

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class Frame(NamedTuple):
    """One image.

    Attributes:
        name: of the file that its picture goes into.
        image_id: of its objects in COCO's format.
        image: BGR, uint8, (H, W, 3).
    """

    name: str
    image_id: int | str
    image: np.ndarray


class Images:
    """An image, or the images of a folder, in the order of their names.

    Without ``known_ids``, the id of an image is its name before the suffix, as a number if it is
    one: 139 for 000000000139.jpg, as in COCO.

    Attributes:
        skipped: number of images that could not be used so far.
    """

    def __init__(
        self,
        path: Path,
        metadata: Metadata | None = None,
        known_ids: Mapping[Path, int] | None = None,
    ):
        """Find the files.

        Args:
            path: file or folder.
            metadata: names of classes and keypoints, for pictures.
            known_ids: by file, the ids of images; others will be skipped.

        Raises:
            ValueError: there is no image, or two would have the same id.
        """
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no image ({' '.join(IMAGE_SUFFIXES)})")
        self._ids: dict[Path, int | str | None] = {}
        for file in files:
            image_id = int(file.stem) if file.stem.isdecimal() else file.stem
            if known_ids is None and image_id in self._ids.values():
                raise ValueError(f"{path} holds several images of the id {image_id!r}")
            self._ids[file] = image_id if known_ids is None else known_ids.get(file)
        self._folder = path if path.is_dir() else path.parent
        self._metadata = metadata
        self.skipped = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Frame]:
        for file, image_id in self._ids.items():
            try:
                if image_id is None:
                    raise ValueError("the annotations do not have it")
                image = read_image(str(file), format="BGR")
            except Exception as error:  # decoders of broken files raise all sorts
                self.skip(file.name, error)
            else:
                yield Frame(file.name, image_id, image)

    def skip(self, name: str, error: Exception) -> None:
        """Count an image that cannot be used, and say which and why."""
        tqdm.write(f"skipped {self._folder / name}: {error}", file=sys.stderr)
        self.skipped += 1

    def draw(self, frame: Frame, found: Instances, folder: Path) -> None:
        """Write the picture of a frame."""
        picture = Visualizer(frame.image[:, :, ::-1], self._metadata)
        pixels = picture.draw_instance_predictions(found).get_image()
        if not cv2.imwrite(str(folder / frame.name), pixels[:, :, ::-1]):
            raise OSError(f"OpenCV cannot write {folder / frame.name}")

    def close(self) -> None:
        """Do nothing, for no file stays open."""


class Video:
    """A video, or a webcam ("webcam", "webcam:1"). A frame's id is its number, from 0."""

    skipped = 0

    def __init__(self, source: str, metadata: Metadata):
        """Open it.

        Args:
            source: path of a video, "webcam", or "webcam:" and its number.
            metadata: names of classes and keypoints, for pictures.

        Raises:
            ValueError: OpenCV cannot read it.
        """
        webcam = re.fullmatch(r"webcam(?::(\d+))?", source)
        self._capture = cv2.VideoCapture(int(webcam[1] or 0) if webcam else source)
        if not self._capture.isOpened():
            raise ValueError(
                f"{source} is no image ({' '.join(IMAGE_SUFFIXES)}), no folder, no video that "
                "OpenCV can read, and no webcam (webcam, webcam:1)"
            )
        self._name = (source.replace(":", "") if webcam else Path(source).stem) + ".mp4"
        self._visualizer = VideoVisualizer(metadata)
        self._writer: cv2.VideoWriter | None = None

    def __len__(self) -> int:
        """Number of frames; 0 if that is not known."""
        return max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[Frame]:
        for number in itertools.count():
            there, image = self._capture.read()
            if not there:
                return
            yield Frame(self._name, number, image)

    def draw(self, frame: Frame, found: Instances, folder: Path) -> None:
        """Add the picture of a frame to the video of pictures."""
        picture = self._visualizer.draw_instance_predictions(frame.image[:, :, ::-1], found)
        pixels = picture.get_image()[:, :, ::-1]
        if self._writer is None:
            fps = self._capture.get(cv2.CAP_PROP_FPS) or 25.0  # not every webcam tells
            size = (pixels.shape[1], pixels.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(folder / frame.name), codec, fps, size)
            if not self._writer.isOpened():
                raise OSError(f"OpenCV cannot write {folder / frame.name}")
        self._writer.write(pixels)

    def close(self) -> None:
        """Finish the video of pictures."""
        self._capture.release()
        if self._writer is not None:
            self._writer.release()


def open_frames(
    source: str, metadata: Metadata, known_ids: Mapping[Path, int] | None = None
) -> Images | Video:
    """Open what ``source`` names: an image, a folder of images, a video or a webcam."""
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return Images(path, metadata, known_ids)
    return Video(source, metadata)


def report_done(source: str | Path, done: int, skipped: int) -> None:
    """Print how many images of ``source`` were done.

    Raises:
        SystemExit: none was.
    """
    print(f"{done} images done, {skipped} skipped", flush=True)
    if not done:
        raise SystemExit(f"nothing could be done with {source}")
