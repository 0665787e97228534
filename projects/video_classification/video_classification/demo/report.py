"""The demo's tables and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from ..data import VideoReader
from .clips import CLASSES
from .networks import SEEN
from .training import Result, Run

Visibility = Mapping[str, Mapping[str, float]]
"""By network and task, from `networks.visibility`."""
TITLES = {
    "order": "order: does the square drift left or right?",
    "near": "near: are two adjacent squares of one color?",
    "space": "space: are two distant squares of one color?",
    "time": "time: are an early and a late square of one color?",
    "spacetime": "spacetime: are both squares of one color?",
}
LN2 = math.log(2)
"""The lowest cross-entropy without seeing what a task is about."""
SHOWN_FRAMES = 5
_SEES, _BLIND, _EXCLUDED = "#1f77b4", "#d62728", "#eeeeee"


def visibility_table(measured: Visibility) -> str:
    """Format what each network sees as a Markdown table."""
    tasks = list(next(iter(measured.values())))
    lines = ["| network | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
    for network, values in measured.items():
        cells = [f"**yes** {v:.0e}" if v > SEEN else f"no {v:.0e}" for v in values.values()]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accuracy_bounds(task: str) -> tuple[int, int]:
    """Return the lowest and highest accuracy, in percent, without seeing what a task is about."""
    return (50, 50) if task == "order" else (25, 75)


def impossible(results: Mapping[Run, Result], measured: Visibility) -> list[Run]:
    """Find runs that break the bounds, although the network cannot see what the task is about."""
    found = []
    for run, result in results.items():
        lowest, highest = accuracy_bounds(run.task)
        kept = lowest <= result.accuracy <= highest and result.cross_entropy > LN2 - 1e-4
        if measured[run.network][run.task] < SEEN and not kept:
            found.append(run)
    return found


def results_table(results: Mapping[Run, Result], measured: Visibility) -> str:
    """Format accuracies and cross-entropies as a Markdown table, beside their bounds."""
    lines = [
        "| task | network | sees it | accuracy must be | accuracy | cross-entropy must be "
        "| cross-entropy | longer training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, network in dict.fromkeys((run.task, run.network) for run in results):
        sees, bounds = measured[network][task] > SEEN, dict.fromkeys(accuracy_bounds(task))
        shorter, longer = _by_budget(results, task, network)
        cells = [
            task,
            network,
            "yes" if sees else "no",
            "" if sees else " to ".join(map(str, bounds)),
            _spread([result.accuracy for result in shorter], 1),
            "" if sees else f"≥ {LN2:.3f}",
            _spread([result.cross_entropy for result in shorter], 3),
            "; ".join(f"{r.accuracy:.1f}, {r.cross_entropy:.3f}" for r in longer),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_results(
    path: Path, results: Mapping[Run, Result], measured: Visibility, data: Path
) -> None:
    """Draw two test videos of each task, and below them the accuracies of all networks.

    Args:
        path: PNG file to write.
        results: of all trainings.
        measured: what each network sees.
        data: folder of the data sets.
    """
    tasks = list(dict.fromkeys(run.task for run in results))
    networks = list(dict.fromkeys(run.network for run in results))
    chart_height = 0.9 + 0.3 * len(networks)
    figure = Figure(figsize=(4.9 * len(tasks), 1.9 + chart_height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.02, hspace=0.02)
    strips, charts = figure.subfigures(2, 1, height_ratios=(1.9, chart_height))
    for part, task in zip(np.atleast_1d(strips.subfigures(1, len(tasks))), tasks):
        _draw_videos(part, task, data / f"{task}_test")
    panels = charts.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        for row, network in enumerate(networks):
            _draw_row(axes, row, _by_budget(results, task, network), measured[network], task)
        axes.set(xlim=(20, 103), xlabel="accuracy on unseen videos (%)")
        axes.set_yticks(range(len(networks)), networks)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    entries = {
        "sees what the class depends on": {"color": _SEES, "marker": "o"},
        "cannot see it": {"color": _BLIND, "marker": "o"},
        "the same, longer training": {"color": _BLIND, "marker": "D", "facecolor": "none"},
    }
    handles = [panels[0].scatter([], [], label=label, **look) for label, look in entries.items()]
    handles.append(panels[0].barh(0, 0, color=_EXCLUDED, label="impossible without seeing it"))
    charts.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)


def _draw_videos(figure: SubFigure, task: str, folder: Path) -> None:
    """Draw frames of the first video of each class, one row for each; both are of one group."""
    figure.suptitle(TITLES[task], fontsize=11)
    classes = CLASSES[task]
    for axes, name in zip(figure.subplots(len(classes), 1), classes):
        video = VideoReader(min((folder / name).iterdir()))
        frames = video.read(range(video.num_frames))
        # From the first to the last frame that has a color.
        colored = np.flatnonzero(np.ptp(frames.astype(int), axis=3).max((1, 2)) > 60)
        numbers = np.unique(np.linspace(*colored[[0, -1]], SHOWN_FRAMES).round().astype(int))
        framed = np.pad(frames[numbers], ((0, 0), (0, 0), (1, 1), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(framed, axis=1), interpolation="nearest")
        width = framed.shape[2]
        centers = width * np.arange(len(numbers)) + width / 2
        axes.set_xticks(centers, [f"frame {number}" for number in numbers], fontsize=7)
        axes.set_yticks([framed.shape[1] / 2], [name], fontsize=9)
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)


def _draw_row(
    axes: Axes,
    row: int,
    results: tuple[Sequence[Result], Sequence[Result]],
    sees: Mapping[str, float],
    task: str,
) -> None:
    color = _SEES if sees[task] > SEEN else _BLIND
    if color == _BLIND:
        for left, right in zip((0, accuracy_bounds(task)[1]), (accuracy_bounds(task)[0], 110)):
            axes.barh(row, right - left, left=left, height=0.9, color=_EXCLUDED, zorder=0)
    places = iter(np.linspace(-0.3, 0.3, sum(map(len, results))))
    for found, marker, face in zip(results, ("o", "D"), (color, "none")):
        for result in found:
            place = (result.accuracy, row + next(places))
            axes.scatter(*place, 20, facecolor=face, edgecolor=color, marker=marker, zorder=3)


def _by_budget(
    results: Mapping[Run, Result], task: str, network: str
) -> tuple[list[Result], list[Result]]:
    """Results of the shortest trainings, and of all others."""
    mine = {run: r for run, r in results.items() if (run.task, run.network) == (task, network)}
    shortest = min(run.budget for run in results)
    return (
        [result for run, result in mine.items() if run.budget == shortest],
        [result for run, result in mine.items() if run.budget > shortest],
    )


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
