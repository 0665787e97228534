"""Read frames from images, videos and webcams, and write the rendered frames."""

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

from nl_detectron.safety.folders import check_output_file, check_output_folder

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")


class Frame(NamedTuple):
    """One image.

    Attributes:
        name: file name; for a video, the number of the frame.
        image_id: id in COCO's format.
        image: BGR, uint8, (H, W, 3).
    """

    name: str
    image_id: int | str
    image: np.ndarray


class _FrameSource:
    """Base class of the sources of frames.

    Attributes:
        kind: what is counted, "image" or "video".
        skipped: number of frames skipped so far.
        endless: whether the stream ends only when the user stops it.
    """

    kind = "image"
    endless = False

    def __init__(self, path: Path):
        self._path = path
        self.skipped = 0

    def skip(self, name: str, error: Exception) -> None:
        """Count a frame as skipped, and print its name and the error."""
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        reason = str(error).removeprefix(f"{self._path / name}: ")
        tqdm.write(f"skipped {self._path / name}: {kind}{reason}", file=sys.stderr)
        self.skipped += 1


class _Files(_FrameSource):
    """A file, or the files of a kind in a folder, sorted by name."""

    suffixes: tuple[str, ...]

    def __init__(self, path: Path):
        super().__init__(path if path.is_dir() else path.parent)
        self._files = [path]
        if path.is_dir():
            entries = sorted(path.iterdir())
            self._files = [file for file in entries if file.suffix.lower() in self.suffixes]
            if folders := sum(entry.is_dir() for entry in entries):
                print(f"{path}: ignoring {folders} subfolder(s)")
        if not self._files:
            raise ValueError(f"{path} contains no {self.kind} ({' '.join(self.suffixes)})")
        self._stem_counts = Counter(file.stem for file in self._files)

    def __len__(self) -> int:
        return len(self._files)

    def stem(self, file: Frame | Path) -> str:
        """Return the file name without its suffix, or with it if another file has the same stem."""
        stem = Path(file.name).stem
        return file.name if self._stem_counts[stem] > 1 else stem


class Videos(_Files):
    """The files of videos, which are not opened here."""

    kind, suffixes = "video", VIDEO_SUFFIXES

    def __init__(self, path: Path):
        """Find the files; raise a ``ValueError`` if there are none."""
        if path.suffix.lower() in IMAGE_SUFFIXES:
            raise ValueError(
                f"the model needs a video ({' '.join(VIDEO_SUFFIXES)}) or a folder of videos, "
                f"got {path}"
            )
        super().__init__(path)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._files)


class Images(_Files):
    """An image, or the images in a folder, sorted by name.

    An image without a known id gets its name without the suffix, as a number if it is one: 139 for
    000000000139.jpg, as in COCO.
    """

    suffixes = IMAGE_SUFFIXES

    def __init__(
        self,
        path: Path,
        output: Path | None = None,
        image_ids: Mapping[Path, int] | None = None,
    ):
        """Find the files; print the number of subfolders that are ignored.

        Args:
            path: file or folder.
            output: folder for the rendered images.
            image_ids: known ids of images, by file.

        Raises:
            OSError: the output folder cannot be created.
            ValueError: there is no image, or ``output`` is not a usable folder.
        """
        super().__init__(path)
        if output is not None:
            if output.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES) and not output.is_dir():
                raise ValueError(f"--output must be a folder for image input, got {output}")
            if output.resolve() == self._path.resolve():
                raise ValueError(f"--output {output} would overwrite the input")
            make_output_folder(output)
            check_output_folder(output)
        self._output, self._image_ids = output, image_ids or {}

    def __iter__(self) -> Iterator[Frame]:
        for file in self._files:
            try:
                image = _read_image(file)
            except Exception as error:  # broken files raise many kinds of errors
                self.skip(file.name, error)
            else:
                yield Frame(file.name, self._id(file), image)

    def check_ids(self) -> None:
        """Require unique ids.

        Raises:
            ValueError: two images have the same id.
        """
        first: dict[int | str, Path] = {}
        for file in self._files:
            other = first.setdefault(self._id(file), file)
            if other != file:
                raise ValueError(
                    f"--json needs a unique id for every image in {self._path}, but "
                    f"{other.name} and {file.name} both have the id {self._id(file)!r}"
                )

    def write(self, frame: Frame, rendered: np.ndarray) -> None:
        """Write the rendered image of a frame, BGR."""
        assert self._output is not None
        if not cv2.imwrite(str(self._output / frame.name), rendered):
            raise OSError(f"OpenCV cannot write {self._output / frame.name}")

    def close(self) -> None:
        """Do nothing; no file is kept open."""

    def _id(self, file: Path) -> int | str:
        by_name = int(file.stem) if file.stem.isdecimal() else file.stem
        return self._image_ids.get(file, by_name)


class Video(_FrameSource):
    """A video, or a webcam ("webcam", "webcam:1"). A frame's id is its number, from 0."""

    def __init__(self, source: str, output: Path | None = None):
        """Open the video or webcam.

        Args:
            source: path of a video, "webcam", or "webcam:" and its number.
            output: .mp4 file for the rendered video, or a folder for it.

        Raises:
            OSError: the output folder cannot be created.
            ValueError: OpenCV cannot read the source, or ``output`` is not a usable file or folder.
        """
        super().__init__(Path(source))
        webcam = re.fullmatch(r"webcam(?::(\d+))?", source)
        self.endless = webcam is not None
        self._capture = cv2.VideoCapture(int(webcam[1] or 0) if webcam else source)
        if not self._capture.isOpened():
            raise ValueError(
                f"--input must be an image ({' '.join(IMAGE_SUFFIXES)}), a folder, a video that "
                f"OpenCV can read, or a webcam (webcam, webcam:1), got {source}"
            )
        if output is not None:
            if output.suffix.lower() != ".mp4" or output.is_dir():
                if output.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
                    raise ValueError(
                        f"--output must be a folder or an .mp4 file for video input, got {output}"
                    )
                output /= (source.replace(":", "") if webcam else Path(source).stem) + ".mp4"
            if output.resolve() == Path(source).resolve():
                raise ValueError(f"--output {output} would overwrite the input")
            make_output_folder(output.parent)
            check_output_file(output)
        self._output = output
        self._writer: cv2.VideoWriter | None = None

    def __len__(self) -> int:
        """Return the number of frames, or 0 if it is unknown."""
        return max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[Frame]:
        for number in itertools.count():
            ok, image = self._capture.read()
            if not ok:
                return
            yield Frame(str(number), number, image)

    def write(self, frame: Frame, rendered: np.ndarray) -> None:
        """Append the rendered image of a frame, BGR, to the output video."""
        if self._writer is None:
            fps = self._capture.get(cv2.CAP_PROP_FPS) or 25.0  # unknown for some webcams
            size = (rendered.shape[1], rendered.shape[0])
            codec = cv2.VideoWriter.fourcc(*"mp4v")
            self._writer = cv2.VideoWriter(str(self._output), codec, fps, size)
            if not self._writer.isOpened():
                raise OSError(f"OpenCV cannot write {self._output}")
            tqdm.write(
                f"{self._output} is MPEG-4 Part 2, which browsers do not play; to convert it: "
                f"ffmpeg -i {self._output} -pix_fmt yuv420p h264.mp4",
                file=sys.stderr,
            )
        self._writer.write(rendered)

    def close(self) -> None:
        """Finish the output video."""
        self._capture.release()
        if self._writer is not None:
            self._writer.release()


def open_frames(
    source: str,
    output: Path | None = None,
    image_ids: Mapping[Path, int] | None = None,
) -> Images | Video:
    """Open an image, a folder of images, a video or a webcam."""
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return Images(path, output, image_ids)
    return Video(source, output)


def make_output_folder(path: Path) -> None:
    """Create a folder for results.

    Raises:
        OSError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder {path} cannot be created: {error.strerror}") from error


def print_summary(source: str | Path, done: int, skipped: int, kind: str = "image") -> None:
    """Print how many images, or videos, of ``source`` were processed and skipped.

    Raises:
        SystemExit: none was processed.
    """
    print(f"{done} {kind}s done, {skipped} skipped", flush=True)
    if not done:
        raise SystemExit(f"no {kind} of {source} could be processed")


def _read_image(file: Path) -> np.ndarray:
    """Read an image as BGR, uint8; scale 16-bit images, which Pillow would clip at 255.

    Raises:
        ValueError: the range of the pixel values is unknown.
    """
    with Image.open(file) as image:
        mode = image.mode
    if not mode.startswith(("I", "F")):
        return read_image(str(file), format="BGR")
    if not mode.startswith("I;16") and file.suffix.lower() != ".png":
        raise ValueError(f"the range of its pixel values is unknown (mode {mode})")
    gray = read_image(str(file)) / 65535 * 255
    return np.repeat(gray.round().astype(np.uint8)[..., None], 3, axis=2)
