"""Everything that can be wrong with a data set, and the count of what was found."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEVERITIES = ("error", "warning", "off")
MAX_EXAMPLES = 3

Problem = tuple[str, str]
"""Kind and description."""


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
        severity: "error" or "warning".
        meaning: what is wrong.
        fixed: whether the severity cannot be changed, because nothing can go on, or go on safely.
    """

    severity: str
    meaning: str
    fixed: bool = False


KINDS = {
    "json": Kind("error", "the file is not UTF-8 JSON in COCO's format", True),
    "no-images": Kind("error", "no image is listed", True),
    "no-objects": Kind("error", "no object to learn or find: nothing, or nothing but crowds"),
    "missing-key": Kind("error", "an image or annotation lacks a key that is needed"),
    "image-record": Kind("error", "the id, name or size of an image is not valid"),
    "file-name": Kind("error", "a file name leads out of the image folder", True),
    "duplicate-image": Kind("error", "two images have the same id"),
    "duplicate-file": Kind("warning", "two images have the same file"),
    "annotation-record": Kind("error", "an annotation is not an object"),
    "annotation-id": Kind("error", "the id of an annotation is not a positive integer"),
    "duplicate-annotation": Kind("error", "two annotations have the same id"),
    "image-id": Kind("error", "the image_id of an annotation is not an integer or a string"),
    "unknown-image": Kind("warning", "an annotation belongs to no image"),
    "unknown-category": Kind("error", "an annotation belongs to no category"),
    "box": Kind("error", "a box is not four finite numbers, or has a negative size"),
    "box-empty": Kind("warning", "a box has no width or no height"),
    "box-outside": Kind("error", "a box is outside the image, or many times larger"),
    "box-beyond": Kind("warning", "a box extends beyond the image by more than a pixel"),
    "area": Kind("error", "an area is not a finite number of 0 or more"),
    "iscrowd": Kind("error", "iscrowd is not 0 or 1"),
    "ignore": Kind("error", "the key 'ignore', which detectron2 does not support, is set"),
    "keypoints": Kind("error", "keypoints are not a list of finite numbers"),
    "keypoints-length": Kind("error", "keypoints are not three numbers for each of the category"),
    "keypoint-outside": Kind("warning", "a labeled keypoint is outside the image"),
    "keypoint-visibility": Kind("warning", "the visibility of a keypoint is not 0, 1 or 2"),
    "num-keypoints": Kind("warning", "num_keypoints is not the number of labeled keypoints"),
    "polygon": Kind("error", "a mask has no polygon of three or more points"),
    "polygon-values": Kind(
        "error", "a mask is not a list of polygons of finite numbers, up to a million", True
    ),
    "polygon-part": Kind("warning", "a mask has a polygon of fewer points, among valid ones"),
    "polygon-outside": Kind("error", "a polygon is far outside the image"),
    "rle": Kind(
        "error", "a run-length encoded mask is not valid, or not of the image's size", True
    ),
    "mask-format": Kind("error", "a mask is run-length encoded, but INPUT.MASK_FORMAT is polygon"),
    "image-missing": Kind("error", "an image file does not exist"),
    "image-empty": Kind("error", "an image file has 0 bytes"),
    "image-broken": Kind("error", "an image file is truncated or not an image"),
    "image-size": Kind("error", "an image file has another size than the JSON file says"),
    "image-turned": Kind("error", "the JSON file's size ignores an image's EXIF orientation"),
    "image-orientation": Kind(
        "warning", "an image has an EXIF orientation that detectron2 applies, as annotators may not"
    ),
    "image-shape": Kind("error", "an image is more than 100 times as long as it is wide"),
    "image-huge": Kind("error", "an image has more pixels than Pillow reads", True),
    "image-depth": Kind("error", "an image has 16 or more bits per pixel, which become white"),
    "train-is-test": Kind("warning", "the test data are the training data"),
    "shared-images": Kind("warning", "images to test on are also trained on"),
}

UNREADABLE = ("image-missing", "image-empty", "image-broken")
"""The kinds that a training may skip image by image."""


def short(value: Any) -> str:
    """Return a value as it is shown in a description, however long it is."""
    return reprlib.repr(value)


@dataclass
class Findings:
    """What was found in a data set, or in several.

    Attributes:
        title: what was checked.
        counts: number of problems by their kind.
        examples: descriptions of the first ones of each kind.
        notes: what else to say, such as what was not checked.
        files: number of image files checked.
        unchecked: whether the time was too short to check everything.
    """

    title: str
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    unchecked: bool = False

    def add(self, kind: str, description: str, where: str = "") -> None:
        """Count a problem."""
        number = self.counts[kind] = self.counts.get(kind, 0) + 1
        if number <= MAX_EXAMPLES:
            example = f"{where}: {description}" if where else description
            self.examples.setdefault(kind, []).append(example)

    def of_severity(self, severity: str, treat: Mapping[str, str]) -> list[str]:
        """Return the kinds found that have a severity.

        Args:
            severity: "error" or "warning".
            treat: severities that differ from those of ``KINDS``.
        """
        found = [kind for kind in KINDS if kind in self.counts]
        return [kind for kind in found if treat.get(kind, KINDS[kind].severity) == severity]

    def sentence(self, kinds: Iterable[str]) -> str:
        """Return the first problem of each kind in one sentence."""
        parts = [f"{kind} ({self.counts[kind]}): {self.examples[kind][0]}" for kind in kinds]
        return f"{self.title}: {'; '.join(parts)}"

    def lines(self, treat: Mapping[str, str]) -> list[str]:
        """Return the whole report; none if nothing was checked."""
        if not (self.notes or self.counts):
            return []
        lines = [self.title, *(f"  {note}" for note in self.notes)]
        if not self.counts:
            lines.append("  no problems")
        for severity in SEVERITIES[:2]:
            for kind in self.of_severity(severity, treat):
                lines.append(f"  {severity} {kind} ({self.counts[kind]}): {KINDS[kind].meaning}")
                lines += [f"    {example}" for example in self.examples[kind]]
                if self.counts[kind] > MAX_EXAMPLES:
                    lines.append("    ...")
        return lines


def parse_treat(words: Iterable[str]) -> dict[str, str]:
    """Parse the words of ``--treat``, KIND=SEVERITY.

    Raises:
        ValueError: a kind or severity is not known, or the kind's severity is fixed.
    """
    treat = {}
    for word in words:
        kind, _, severity = word.partition("=")
        if kind not in KINDS or severity not in SEVERITIES:
            raise ValueError(
                f"--treat must be KIND=SEVERITY with a KIND of {', '.join(KINDS)}, and a SEVERITY "
                f"of {', '.join(SEVERITIES)}; got {word!r}"
            )
        if KINDS[kind].fixed:
            raise ValueError(f"--treat {word}: {kind} is always an error ({KINDS[kind].meaning})")
        treat[kind] = severity
    return treat
