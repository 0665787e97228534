"""Which keypoints swap when an image is flipped, told by their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# A mark of a side stands at the beginning or the end of a word: "LShoulder" is L, Shoulder;
# "leftWrist_2" is left, Wrist, 2.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_MARK = re.compile(r"^(?:left|right|l|r)|(?:left|right|l|r)$", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def flip_pairs(names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Find the left and right keypoints of a skeleton.

    Two names are a pair if they differ in one mark of a side alone: "left" and "right", or "l" and
    "r", in any case, at the beginning or the end of a word.

    Args:
        names: of all keypoints.

    Returns:
        Pairs, each once, in the order of the names; and the names that have a side but not exactly
        one partner. Without a partner, an "l" or "r" is a side only if it is a word of its own.
    """
    partners = {name: set(_mirrored(name)) & set(names) for name in names}
    pairs, alone = [], []
    for name, found in partners.items():
        partner = next(iter(found), name)
        if len(found) == 1 and partners[partner] == {name}:
            if names.index(name) < names.index(partner):
                pairs.append((name, partner))
        elif found or _has_side(name):
            alone.append(name)
    return pairs, alone


def _mirrored(name: str) -> Iterator[str]:
    """The names with one mark exchanged."""
    for word in _WORD.finditer(name):
        for mark in _MARK.finditer(word[0]):
            first, last = word.start() + mark.start(), word.start() + mark.end()
            yield name[:first] + _in_case_of(mark[0], _OTHER_SIDE[mark[0].lower()]) + name[last:]


def _has_side(name: str) -> bool:
    return any(
        len(mark[0]) > 1 or mark[0] == word[0]
        for word in _WORD.finditer(name)
        for mark in _MARK.finditer(word[0])
    )


def _in_case_of(given: str, word: str) -> str:
    if given.isupper():
        return word.upper()
    return word.capitalize() if given[0].isupper() else word
