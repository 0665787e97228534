"""Images, videos and webcams alike: frames to read, and pictures of them to write."""

from __future__ import annotations

import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from tqdm import tqdm

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")


class Frame(NamedTuple):
    """One image.

    Attributes:
        name: of its file; of a video, the number of the frame.
        image_id: of its objects in COCO's format.
        image: BGR, uint8, (H, W, 3).
    """

    name: str
    image_id: int | str
    image: np.ndarray


class _Source:
    """Where frames come from.

    Attributes:
        skipped: number of frames that could not be used so far.
        endless: whether only the user ends it.
    """

    endless = False

    def __init__(self, path: Path):
        self._path = path
        self.skipped = 0

    def skip(self, name: str, error: Exception) -> None:
        """Count a frame that cannot be used, and say which and why."""
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        tqdm.write(f"skipped {self._path / name}: {kind}{error}", file=sys.stderr)
        self.skipped += 1


class Images(_Source):
    """An image, or the images of a folder, in the order of their names.

    The id of an image that is not known is its name before the suffix, as a number if it is one:
    139 for 000000000139.jpg, as in COCO.
    """

    def __init__(
        self,
        path: Path,
        output: Path | None = None,
        known_ids: Mapping[Path, int] | None = None,
    ):
        """Find the files; print how many subfolders are left out.

        Args:
            path: file or folder.
            output: folder for pictures.
            known_ids: by file, the ids of images.

        Raises:
            OSError: the folder for pictures cannot be made.
            ValueError: there is no image, or no folder can be called ``output``.
        """
        super().__init__(path if path.is_dir() else path.parent)
        self._files = [path]
        if path.is_dir():
            entries = sorted(path.iterdir())
            self._files = [file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES]
            if folders := sum(entry.is_dir() for entry in entries):
                print(f"{path}: images are read, but not those of its {folders} subfolder(s)")
        if not self._files:
            raise ValueError(f"{path} holds no image ({' '.join(IMAGE_SUFFIXES)})")
        if output is not None:
            if output.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and not output.is_dir():
                raise ValueError(f"--output {output}: pictures of images need a folder, not a file")
            if output.resolve() == self._path.resolve():
                raise ValueError(f"--output {output}: pictures there would replace what is read")
            make_folder(output)
        self._output, self._known_ids = output, known_ids or {}
        self._same_stem = Counter(file.stem for file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Frame]:
        for file in self._files:
            try:
                image = _read(file)
            except Exception as error:  # decoders of broken files raise all sorts
                self.skip(file.name, error)
            else:
                yield Frame(file.name, self._id(file), image)

    def check_ids(self) -> None:
        """Refuse images of one id.

        Raises:
            ValueError: there are some.
        """
        first: dict[int | str, Path] = {}
        for file in self._files:
            other = first.setdefault(self._id(file), file)
            if other != file:
                raise ValueError(
                    f"{self._path} holds several images of the id {self._id(file)!r} for --json: "
                    f"{other.name} and {file.name}"
                )

    def stem(self, frame: Frame) -> str:
        """The name of a frame's file before its suffix, or all of it if another's begins alike."""
        stem = Path(frame.name).stem
        return frame.name if self._same_stem[stem] > 1 else stem

    def write(self, frame: Frame, picture: np.ndarray) -> None:
        """Write the picture of a frame, BGR."""
        assert self._output is not None
        if not cv2.imwrite(str(self._output / frame.name), picture):
            raise OSError(f"OpenCV cannot write {self._output / frame.name}")

    def close(self) -> None:
        """Do nothing, for no file stays open."""

    def _id(self, file: Path) -> int | str:
        by_name = int(file.stem) if file.stem.isdecimal() else file.stem
        return self._known_ids.get(file, by_name)


class Video(_Source):
    """A video, or a webcam ("webcam", "webcam:1"). A frame's id is its number, from 0."""

    def __init__(self, source: str, output: Path | None = None):
        """Open it.

        Args:
            source: path of a video, "webcam", or "webcam:" and its number.
            output: .mp4 file for the pictures, or the folder for one.

        Raises:
            OSError: the folder for the video cannot be made.
            ValueError: OpenCV cannot read it, or ``output`` is no name for a video.
        """
        super().__init__(Path(source))
        webcam = re.fullmatch(r"webcam(?::(\d+))?", source)
        self.endless = webcam is not None
        self._capture = cv2.VideoCapture(int(webcam[1] or 0) if webcam else source)
        if not self._capture.isOpened():
            raise ValueError(
                f"{source} is no image ({' '.join(IMAGE_SUFFIXES)}), no folder, no video that "
                "OpenCV can read, and no webcam (webcam, webcam:1)"
            )
        if output is not None:
            if output.suffix.lower() != ".mp4" or output.is_dir():
                if output.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
                    raise ValueError(f"--output {output}: videos are written as .mp4 alone")
                output /= (source.replace(":", "") if webcam else Path(source).stem) + ".mp4"
            if output.resolve() == Path(source).resolve():
                raise ValueError(f"--output {output}: the video there would replace what is read")
            make_folder(output.parent)
        self._output = output
        self._writer: cv2.VideoWriter | None = None

    def __len__(self) -> int:
        """Number of frames; 0 if that is not known."""
        return max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[Frame]:
        for number in itertools.count():
            there, image = self._capture.read()
            if not there:
                return
            yield Frame(str(number), number, image)

    def write(self, frame: Frame, picture: np.ndarray) -> None:
        """Add the picture of a frame, BGR, to the video of pictures."""
        if self._writer is None:
            fps = self._capture.get(cv2.CAP_PROP_FPS) or 25.0  # not every webcam tells
            size = (picture.shape[1], picture.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._output), codec, fps, size)
            if not self._writer.isOpened():
                raise OSError(f"OpenCV cannot write {self._output}")
            tqdm.write(
                f"{self._output} is MPEG-4 part 2, which browsers do not play; for one that they "
                f"do: ffmpeg -i {self._output} -pix_fmt yuv420p h264.mp4",
                file=sys.stderr,
            )
        self._writer.write(picture)

    def close(self) -> None:
        """Finish the video of pictures."""
        self._capture.release()
        if self._writer is not None:
            self._writer.release()


def open_frames(
    source: str,
    output: Path | None = None,
    known_ids: Mapping[Path, int] | None = None,
) -> Images | Video:
    """Open what ``source`` names: an image, a folder of images, a video or a webcam."""
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return Images(path, output, known_ids)
    return Video(source, output)


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder {path} cannot be made: {error.strerror}") from error


def report_done(source: str | Path, done: int, skipped: int) -> None:
    """Print how many images of ``source`` were done.

    Raises:
        SystemExit: none was.
    """
    print(f"{done} images done, {skipped} skipped", flush=True)
    if not done:
        raise SystemExit(f"nothing could be done with {source}")


def _read(file: Path) -> np.ndarray:
    """An image as BGR, uint8; one of 16 bits is scaled, where Pillow would cut it off at 255.

    Raises:
        ValueError: pixels without a known range.
    """
    with Image.open(file) as image:
        mode = image.mode
    if not mode.startswith(("I", "F")):
        return read_image(str(file), format="BGR")
    if not mode.startswith("I;16") and file.suffix.lower() != ".png":
        raise ValueError(f"its pixels are numbers without a known range (mode {mode})")
    grey = read_image(str(file)) / 65535 * 255
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)
