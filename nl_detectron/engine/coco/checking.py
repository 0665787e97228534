"""Check data sets in COCO's format before a training or evaluation starts."""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from nl_detectron import __version__
from nl_detectron.engine.coco.annotations import check_annotations, check_images
from nl_detectron.engine.coco.files import coco_metadata, read_coco_json
from nl_detectron.engine.coco.findings import Findings
from nl_detectron.engine.coco.image_files import check_image_files


@dataclass(frozen=True)
class Source:
    """A data set to check.

    Attributes:
        json_file: the annotations.
        image_dir: folder that the names of its images are relative to.
        splits: what it is for, "train", "test" or both.
        required_keys: keys that a model needs in every annotation, besides those of detectron2.
        mask_format: "polygon" if a model is trained on polygons alone.
    """

    json_file: str
    image_dir: str
    splits: tuple[str, ...]
    required_keys: tuple[str, ...] = ()
    mask_format: str = ""


def check_sources(sources: Sequence[Source], time_limit: float = 0.0) -> list[Findings]:
    """Check data sets, or return what an earlier check of the same files found.

    Args:
        sources: the data sets of a run.
        time_limit: seconds to spend on the image files of each, and on comparing them; 0: no limit.

    Returns:
        The findings of each data set, and those between them.

    Raises:
        OSError: a file or folder does not exist.
    """
    cache = _cache_file(sources)
    known = _read_cache(cache)
    if known and (time_limit or not any(findings.unchecked for findings in known)):
        return known
    images = {}
    found = []
    for source in sources:
        findings = Findings(source.json_file)
        images[source] = check_source(source, findings, time_limit)
        found.append(findings)
    found.append(check_overlap(images, time_limit))
    _write_cache(cache, found)
    return found


def check_source(
    source: Source, findings: Findings, time_limit: float = 0.0
) -> list[dict[str, Any]]:
    """Check one data set, and return its valid images.

    Args:
        source: the data set.
        findings: receives the problems.
        time_limit: seconds to spend on the image files; 0: no limit.
    """
    try:
        content = read_coco_json(source.json_file)
        coco_metadata(content["categories"])
    except ValueError as error:
        findings.add("json", str(error))
        return []
    images, annotations = content.get("images", []), content.get("annotations", [])
    findings.notes.append(f"{len(images)} images, {len(annotations)} annotations")
    valid = check_images(images, findings)
    check_annotations(
        annotations,
        valid,
        content["categories"],
        source.required_keys,
        source.mask_format,
        findings,
    )
    del content, annotations  # gigabytes, while the files take minutes
    check_image_files(valid, source.image_dir, findings, time_limit)
    return valid


def check_overlap(images: dict[Source, list[dict[str, Any]]], time_limit: float = 0.0) -> Findings:
    """Find images that are both trained and tested on, under one name or as copies."""
    findings = Findings("training and test data")
    start = time.monotonic()
    for train, test in product(images, images):
        if "train" not in train.splits or "test" not in test.splits:
            continue
        if train is test or os.path.samefile(train.json_file, test.json_file):
            findings.add("train-is-test", f"{test.json_file} is for both")
            continue
        trained: dict[int, list[str]] = {}
        for path in _paths(train, images[train]):
            trained.setdefault(_size(path), []).append(path)
        for path in _paths(test, images[test]):
            if time_limit and time.monotonic() - start > time_limit:
                findings.unchecked = True
                findings.notes.append(f"not compared to the end, within {time_limit:g} seconds")
                return findings
            size = _size(path)
            copies = trained.get(size, ()) if size else ()
            same = next((other for other in copies if filecmp.cmp(path, other, False)), None)
            if same:
                findings.add("shared-images", f"{path} is {same}")
        compared = f"{len(images[test])} images to test on with {len(images[train])} to train on"
        findings.notes.append(f"compared {compared}")
    return findings


def _paths(source: Source, images: list[dict[str, Any]]) -> list[str]:
    return [os.path.join(source.image_dir, image["file_name"]) for image in images]


def _size(path: str) -> int:
    """Return the size of a regular file, or 0."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _cache_file(sources: Sequence[Source]) -> Path:
    """Return where the findings are kept, by what they depend on except for the image files."""
    key = hashlib.sha256(__version__.encode())
    for source in sources:
        with open(source.json_file, "rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
        folder = Path(source.image_dir).resolve()
        key.update(repr((source, folder, folder.stat().st_mtime_ns)).encode())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "nl_detectron", "checked_data", f"{key.hexdigest()}.json")


def _read_cache(path: Path) -> list[Findings] | None:
    try:
        return [Findings(**entry) for entry in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError):  # none, or not ours
        return None


def _write_cache(path: Path, found: Sequence[Findings]) -> None:
    """Keep the findings; a check that cannot be kept is repeated."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([asdict(findings) for findings in found]), "utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
