"""Find the keypoints to swap when an image is flipped, from their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

# Side markers are at the beginning or end of a word: "LShoulder" splits into L, Shoulder;
# "leftWrist_2" into left, Wrist, 2.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_MARKER = re.compile(r"^(?:left|right|l|r)|(?:left|right|l|r)$", re.IGNORECASE)
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


def flip_pairs(names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Find the pairs of left and right keypoints of a skeleton.

    Two names form a pair if they differ in a single side marker, "left" and "right" or "l" and "r",
    in any case, at the beginning or end of a word.

    Args:
        names: names of all keypoints.

    Returns:
        Pairs, each once, in the order of the names; and the unpaired names, which have a side
        marker but not exactly one partner. In an unpaired name, "l" or "r" is a marker only if it
        is a whole word.
    """
    partners = {name: set(_mirrored(name)) & set(names) for name in names}
    pairs, unpaired = [], []
    for name, found in partners.items():
        partner = next(iter(found), name)
        if len(found) == 1 and partners[partner] == {name}:
            if names.index(name) < names.index(partner):
                pairs.append((name, partner))
        elif found or _has_side(name):
            unpaired.append(name)
    return pairs, unpaired


def _mirrored(name: str) -> Iterator[str]:
    """Yield the names with one side marker swapped."""
    for word in _WORD.finditer(name):
        for marker in _MARKER.finditer(word[0]):
            first, last = word.start() + marker.start(), word.start() + marker.end()
            yield (
                name[:first] + _match_case(marker[0], _OTHER_SIDE[marker[0].lower()]) + name[last:]
            )


def _has_side(name: str) -> bool:
    return any(
        len(marker[0]) > 1 or marker[0] == word[0]
        for word in _WORD.finditer(name)
        for marker in _MARKER.finditer(word[0])
    )


def _match_case(given: str, word: str) -> str:
    if given.isupper():
        return word.upper()
    return word.capitalize() if given[0].isupper() else word
