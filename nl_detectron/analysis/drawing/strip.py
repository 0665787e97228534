"""Choose the frames of a clip to draw attention on.

A position of a map in time stands for several frames of the clip, as the network pools them. Of
each position that is drawn, one frame is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nl_detectron.analysis.geometry import middle_frame

MAX_FRAMES = 5  # so that frames side by side are not too small for a page


def choose_frames(
    positions: int, stride: int, clip: Sequence[int], query: int, wanted: Sequence[int] = ()
) -> dict[int, int]:
    """Choose positions of a map, and a frame for each; the query's is always among them.

    Args:
        positions: T of the map.
        stride: number of frames that a position stands for, see
            :class:`~nl_detectron.analysis.geometry.FeatureGrid`.
        clip: number of each frame of the clip in its video.
        query: index into ``clip`` of the frame of the query.
        wanted: numbers in the video of other frames to draw; default: those in the middle of
            positions that are spread evenly.

    Returns:
        A dict from indices into T to indices into ``clip``, in order.

    Raises:
        ValueError: a wanted frame is not in the clip, or shares its position with another.
    """
    missing = sorted(set(wanted) - set(clip))
    if missing:
        raise ValueError(
            f"--frames {missing[0]} is not in the clip, whose frames are "
            f"{', '.join(map(str, clip))}"
        )
    chosen: dict[int, int] = {min(query // stride, positions - 1): query}
    if not wanted:
        spread = np.linspace(0, positions - 1, min(positions, MAX_FRAMES)).round().astype(int)
        (own,) = chosen
        nearest = np.abs(spread - own).argmin()
        for t in {*spread.tolist()} - {spread[nearest]}:
            chosen[t] = middle_frame(t, stride, len(clip))
    for number in wanted:
        index = clip.index(number)
        t = min(index // stride, positions - 1)
        if clip[chosen.setdefault(t, index)] != number:
            raise ValueError(
                f"--frames {number} and {clip[chosen[t]]} are the same position of the map, which "
                f"stands for {stride} frames of the clip: give one of them"
            )
    return dict(sorted(chosen.items()))
