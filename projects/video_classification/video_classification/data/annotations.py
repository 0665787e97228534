"""Read lists of videos and their labels; refuse what is wrong in them, naming file and line.

Every reader returns records and the names of the classes. A record is a dict with "file_name" and
"label", a number, or for multi-label data a sorted tuple of them. It may have

* "start" and "end": which part of the file is the video, in seconds;
* "actions": (class, first second, last second) of each action in the video.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nl_detectron.engine.frames import VIDEO_SUFFIXES

Records = list[dict[str, Any]]
Row = tuple[int, list[str]]
"""Number of a line, from 1, and its fields."""
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")

_COLUMNS = ["path", "label", "start", "end"]
_SHOWN_ERRORS = 5


def read_folder(root: Path, classes: Sequence[str] | None = None) -> tuple[Records, list[str]]:
    """Read a folder that has a subfolder of videos for each class.

    Args:
        root: the folder.
        classes: names of the classes; the sorted names of the subfolders if not given.

    Raises:
        ValueError: there are no subfolders, or one has no videos or an unknown name.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise ValueError(f"{root}: no subfolders; there must be one for each class")
    names = list(classes or [folder.name for folder in folders])
    numbers = _numbers(names)

    def read(folder: Path) -> Records:
        label = _class_number(folder.name, numbers)
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in VIDEO_SUFFIXES)
        if not files:
            raise ValueError(f"no videos in this folder ({' '.join(VIDEO_SUFFIXES)})")
        return [{"file_name": str(file), "label": label} for file in files]

    lists = _convert(root, [(folder.name, folder) for folder in folders], read)
    return [record for records in lists for record in records], names


def read_csv(
    file: Path,
    root: Path | None = None,
    classes: Sequence[str] | None = None,
    multi_label: bool = False,
) -> tuple[Records, list[str]]:
    """Read a list of videos: a path, a label, and optionally start and end in seconds on each line.

    Fields are separated by commas, and quoted where needed. The lists of path and label that are
    common for Kinetics have spaces instead. The first line may name the columns.

    Args:
        file: the list.
        root: where relative paths begin; the folder of ``file`` if not given.
        classes: names of the classes. Labels are these names, or numbers from 0. If not given,
            the classes are the labels, sorted.
        multi_label: a video has any number of labels, separated by semicolons.

    Raises:
        ValueError: the list is empty, or lines are wrong.
    """
    rows, columns = _read_rows(file), _COLUMNS
    if rows and {"path", "label"} <= {name.lower() for name in rows[0][1]}:
        columns = [name.lower() for name in rows.pop(0)[1]]
        if unknown := set(columns) - set(_COLUMNS):
            raise ValueError(f"{file}, line 1: columns must be among {_COLUMNS}, got {unknown}")
    if not rows:
        raise ValueError(f"{file}: no videos in it")

    def read(row: Row) -> dict[str, Any]:
        return _csv_record(row[1], columns, root or file.parent, multi_label)

    records = _convert(file, [(f"line {row[0]}", row) for row in rows], read)
    lines = [f"line {line}" for line, _ in rows]
    names = list(classes or _classes_of(file, lines, [record["label"] for record in records]))
    numbers = _numbers(names)

    def number(record: dict[str, Any]) -> dict[str, Any]:
        label = tuple(sorted({_class_number(text, numbers) for text in record["label"]}))
        return {**record, "label": label if multi_label else label[0]}

    return _convert(file, zip(lines, records), number), names


def read_charades(
    file: Path, root: Path, classes: Sequence[str] | None = None
) -> tuple[Records, list[str]]:
    """Read an official csv file of Charades, of which columns "id" and "actions" are used.

    The label has all actions of the video. Some of the official actions end before they start:
    they are in the label, but no frame belongs to them.

    Args:
        file: such as ``Charades_v1_train.csv``.
        root: folder of the videos, ``<id>.mp4``.
        classes: names of the 157 classes; "c000" to "c156" if not given.

    Raises:
        ValueError: the file is no such csv file, or lines are wrong.
    """
    rows = _read_rows(file)
    if not rows or not {"id", "actions"} <= set(rows[0][1]):
        raise ValueError(f"{file}, line 1: there must be columns 'id' and 'actions'")
    column = {name: rows[0][1].index(name) for name in ("id", "actions")}
    codes = [f"c{number:03}" for number in range(157)]
    numbers = _numbers(codes)

    def read(row: Row) -> dict[str, Any]:
        actions = []
        for text in filter(None, row[1][column["actions"]].split(";")):
            code, start, end = text.split()
            actions.append((_class_number(code, numbers), _seconds(start), _seconds(end)))
        return {
            "file_name": _existing(root / f"{row[1][column['id']]}.mp4"),
            "label": tuple(sorted({action[0] for action in actions})),
            "actions": tuple(actions),
        }

    records = _convert(file, [(f"line {row[0]}", row) for row in rows[1:]], read)
    return records, list(classes or codes)


def read_classes(file: Path) -> list[str]:
    """Read the names of classes, one on each line.

    Raises:
        ValueError: there is no such file, or a name occurs twice.
    """
    names = [line.strip() for line in Path(_existing(file)).read_text().splitlines()]
    names = [name for name in names if name]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{file}: names of classes occur twice: {', '.join(sorted(repeated))}")
    return names


def _read_rows(file: Path) -> list[Row]:
    """Return the lines that are not empty."""
    lines = Path(_existing(file)).read_text(encoding="utf-8-sig").splitlines(keepends=True)
    if lines and "," in lines[0]:
        reader = csv.reader(lines, skipinitialspace=True)
        rows = [(reader.line_num, [field.strip() for field in fields]) for fields in reader]
    else:
        rows = [(number, line.split()) for number, line in enumerate(lines, start=1)]
        if spaces := [row for row in rows if len(row[1]) > 2]:
            raise ValueError(
                f"{file}, line {spaces[0][0]}: {len(spaces[0][1])} fields; where fields are "
                "separated by spaces, paths cannot contain any: use commas"
            )
    return [row for row in rows if any(row[1])]


def _csv_record(
    fields: list[str], columns: list[str], root: Path, multi_label: bool
) -> dict[str, Any]:
    """Return a record whose label still is a list of texts."""
    if not 2 <= len(fields) <= len(columns):
        raise ValueError(f"{len(fields)} fields, expected {', '.join(columns)}")
    row = {name: text for name, text in zip(columns, fields) if text}
    labels = [text.strip() for text in row.get("label", "").split(";") if text.strip()]
    if not multi_label and len(labels) != 1:
        raise ValueError(
            f"{len(labels)} labels; only with MODEL.VIDEO.HEAD.MULTI_LABEL is a video free to have "
            "more or less than one"
        )
    times = {name: _seconds(row[name]) for name in ("start", "end") if name in row}
    if times.get("end", math.inf) <= times.get("start", 0.0):
        raise ValueError(f"end {times['end']} is not after start {times.get('start', 0.0)}")
    return {"file_name": _existing(root / row.get("path", "")), "label": labels, **times}


def _classes_of(file: Path, lines: list[str], labels: list[list[str]]) -> list[str]:
    """Return the classes that occur: from "0" to the highest number, or the sorted names."""
    where = {text: line for line, texts in zip(lines, labels) for text in texts}
    numbers = {int(text) for text in where if text.isdecimal()}
    names = [text for text in where if not text.isdecimal()]
    if numbers and names:
        number = next(text for text in where if text.isdecimal())
        raise ValueError(
            f"{file}: some labels are numbers ({where[number]}: {number}), some are names "
            f"({where[names[0]]}: {names[0]})"
        )
    if numbers and numbers == set(range(1, len(numbers) + 1)):
        raise ValueError(f"{file}: labels are 1 to {len(numbers)}, but they must begin with 0")
    return sorted(names) or [str(number) for number in range(max(numbers, default=-1) + 1)]


def _class_number(text: str, numbers: Mapping[str, int]) -> int:
    """Return the number of a class, given by name or number.

    Args:
        text: name or number.
        numbers: of the classes, by name.

    Raises:
        ValueError: there is no such class.
    """
    if text in numbers:
        return numbers[text]
    if text.isdecimal() and int(text) < len(numbers):
        return int(text)
    raise ValueError(
        f"label {text!r} is not one of the {len(numbers)} classes ({', '.join([*numbers][:3])}, "
        f"...), and not a number from 0 to {len(numbers) - 1}"
    )


def _numbers(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{text!r} is not a number of seconds")
    return seconds


def _existing(file: Path) -> str:
    if not file.is_file():
        raise ValueError(f"no such file: {file}")
    return str(file)


def _convert(
    source: Path,
    items: Iterable[tuple[str, _Item]],
    function: Callable[[_Item], _Result],
) -> list[_Result]:
    """Apply a function to items that have a name; report all that are wrong at once.

    Raises:
        ValueError: the function raised it for some items; the message shows the first few.
    """
    results, errors = [], []
    for name, item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            errors.append(f"{name}: {error}")
    if errors:
        more = [f"and {len(errors) - _SHOWN_ERRORS} more"] * (len(errors) > _SHOWN_ERRORS)
        total = len(errors) + len(results)
        summary = f"{source}: {len(errors)} of {total} entries are wrong:"
        raise ValueError("\n  ".join([summary, *errors[:_SHOWN_ERRORS], *more]))
    return results
