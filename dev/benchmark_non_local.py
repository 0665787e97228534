"""Compare time and memory of the block's paths with each other and with other libraries' blocks.

All blocks have the same weights and, within 1e-5, the same output; they alternate in one process.
A cell of the table shows the median ratio of the time to that of the "naive" path, and the memory:
the increase at the peak, in a separate process; on a CPU, of resident memory. mmcv, pytorchvideo
and timm take part if they are installed: `make peers` puts them into build/peers, for PYTHONPATH.

    python dev/benchmark_non_local.py                                        # takes an hour
    python dev/benchmark_non_local.py --shapes res4 --pairwise dot_product
    python dev/benchmark_non_local.py --passes forward --picture benchmark.png \\
        --shapes n196 n784 n1764 n4225 n8464 n16900

For a block within a detector see dev/benchmark_detector.py; for video networks,
dev/benchmark_video.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import in_new_process, increase_at_peak
from torch import Tensor, nn

from nl_detectron import NonLocalBlock, ops
from nl_detectron.non_local import SUBSAMPLE_POSITIONS
from nl_detectron.weights import convert


class Shape(NamedTuple):
    """An input (batch, channels, *size), and the subsampling of its keys."""

    batch: int
    channels: int
    size: tuple[int, ...]
    subsample: int = 1


SHAPES = {
    # An image of 800 x 1333, padded to a multiple of 32
    "res4": Shape(1, 1024, (50, 84)),
    "res4-pooled": Shape(1, 1024, (50, 84), 2),
    "res3": Shape(1, 512, (100, 168)),
    "res3-pooled": Shape(1, 512, (100, 168), 2),
    "roi1": Shape(1, 512, (14, 14)),
    "roi25": Shape(25, 512, (14, 14)),
    "roi100": Shape(100, 512, (14, 14)),
    "roi100-pooled": Shape(100, 512, (14, 14), 2),
    # Clips of 32 frames, and of 128
    "video-res4": Shape(1, 1024, (4, 14, 14), 2),
    "video-res3": Shape(1, 512, (4, 28, 28), 2),
    "long-video-res4": Shape(1, 1024, (16, 14, 14), 2),
    # Square maps for the plot over the number of positions
    **{f"n{side**2}": Shape(1, 512, (side, side)) for side in (14, 28, 42, 65, 92, 130)},
}


class Case(NamedTuple):
    """One configuration to measure."""

    shape: str
    pairwise: str
    subsample_position: str
    backward: bool
    device: str
    dtype: str


def mmcv_block(case: Case, shape: Shape) -> nn.Module:
    """Build mmcv's block, which applies the convolutions, then pools by 2."""
    from mmcv.cnn.bricks import non_local

    if case.subsample_position == "before_conv" and shape.subsample > 1:
        raise LookupError("mmcv pools after the convolutions only")
    cls = getattr(non_local, f"NonLocal{len(shape.size)}d")
    return cls(shape.channels, sub_sample=shape.subsample > 1, mode=case.pairwise)


def pytorchvideo_block(case: Case, shape: Shape) -> nn.Module:
    """Build pytorchvideo's block (as SlowFast's), which pools before the convolutions; 3-D only."""
    from pytorchvideo.layers.nonlocal_net import create_nonlocal

    forms = {"embedded_gaussian": "softmax", "dot_product": "dot_product"}
    if case.pairwise not in forms or (
        case.subsample_position == "after_conv" and shape.subsample > 1
    ):
        raise LookupError("pytorchvideo has two pairwise forms, and pools before the convolutions")
    return create_nonlocal(
        dim_in=shape.channels,
        dim_inner=shape.channels // 2,
        pool_size=(1, shape.subsample, shape.subsample),
        instantiation=forms[case.pairwise],
        norm=None,
    )


def timm_block(case: Case, shape: Shape) -> nn.Module:
    """Build timm's block: 2-D, embedded Gaussian, no pooling, batch norm."""
    from timm.layers import NonLocalAttn

    if case.pairwise != "embedded_gaussian" or shape.subsample > 1 or len(shape.size) != 2:
        raise LookupError("timm has one pairwise form, for images, without pooling")
    return NonLocalAttn(shape.channels, rd_ratio=1 / 2)


PEERS = {"mmcv": mmcv_block, "pytorchvideo": pytorchvideo_block, "timm": timm_block}
IMPLEMENTATIONS = [*dict.fromkeys(path for paths in ops.PATHS.values() for path in paths), *PEERS]


def build_block(case: Case, name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Build a block, by the name of one of our paths or of another library, and its input.

    Raises:
        ImportError: the library is not installed.
        LookupError: the library has no such block.
    """
    shape = SHAPES[case.shape]
    options: dict[str, Any] = {"pairwise": case.pairwise, "subsample": shape.subsample}
    options["subsample_position"] = case.subsample_position
    torch.manual_seed(0)
    ours = NonLocalBlock(shape.channels, dim=len(shape.size), **options)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=shape.channels**-0.5)
    x = torch.randn(shape.batch, shape.channels, *shape.size)
    block: nn.Module = ours
    if name in PEERS:
        block = PEERS[name](case, shape)
        weights = convert(ours.state_dict(), "nl_detectron", name, lambda _: options)
        block.load_state_dict(weights.state)
        if name == "pytorchvideo" and len(shape.size) == 2:
            x = x[:, :, None]
    else:
        ours.path = name
    dtype = getattr(torch, case.dtype)
    return block.to(case.device, dtype).eval(), x.to(case.device, dtype)


def run_pass(case: Case, block: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Run one pass; return its seconds and its output."""
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(case.backward):
        y = block(x.requires_grad_(case.backward))
    if case.backward:
        y.backward(torch.ones_like(y))
    synchronize()
    return time.perf_counter() - start, y.detach()


def peak_memory(case: Case, name: str) -> int:
    """Return the peak memory of a pass in bytes, without the block and its input."""
    block, x = build_block(case, name)
    run_pass(case, block, x[..., :8, :8].clone())  # load libraries
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_pass(case, block, x)
        return torch.cuda.max_memory_allocated() - before
    # Fail rather than swap.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (memory * 3 // 4, -1))
    return increase_at_peak(lambda: run_pass(case, block, x))


def time_rounds(case: Case, names: list[str], seconds: float) -> dict[str, list[float]]:
    """Time the blocks in turns, for at least five rounds; return seconds by name."""
    blocks = {name: build_block(case, name) for name in names}
    expected = run_pass(case, *blocks[names[0]])[1]
    for name, (block, x) in blocks.items():
        error = (run_pass(case, block, x)[1].view_as(expected) - expected).abs().max()
        tolerance = (1e-5 if case.dtype == "float32" else 2e-2) * expected.abs().max()
        assert error <= tolerance, f"the output of {name} differs by {error}"
    times: dict[str, list[float]] = {name: [] for name in names}
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - start < seconds:
        for name, (block, x) in blocks.items():
            times[name].append(run_pass(case, block, x)[0])
        rounds += 1
    return times


def chosen_path(case: Case) -> str:
    """Return the path that the block chooses by default."""
    block: Any
    block, x = build_block(case, "naive")
    block.path = None
    with torch.set_grad_enabled(case.backward):
        return block.path_for(x)


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Return time ratios and memory in bytes by name, and the path that the block chooses."""
    names = [
        *ops.PATHS[case.pairwise],
        *(name for name in PEERS if in_new_process(takes_part, case, name)),
    ]
    memory = {name: in_new_process(peak_memory, case, name) for name in names}
    times = in_new_process(time_rounds, case, [n for n in names if memory[n] is not None], seconds)
    if times is None:
        raise SystemExit(
            f"{case}: the outputs differ, or the blocks do not fit into memory together"
        )
    chosen = in_new_process(chosen_path, case)

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[base]))

    medians = {name: statistics.median(series) for name, series in times.items()}
    best = min((name for name in times if name in PEERS), key=lambda n: medians[n], default=None)
    return {
        "case": case._asdict(),
        "positions": prod(SHAPES[case.shape].size),
        "chosen": chosen,
        "ratios": {name: ratio(name, "naive") for name in times if "naive" in times},
        "memory": memory,
        "seconds": medians,
        "best_peer": best and (best, ratio(chosen, best)),
    }


def takes_part(case: Case, peer: str) -> bool:
    """Return whether another library is installed and has such a block."""
    try:
        PEERS[peer](case, SHAPES[case.shape])
    except (ImportError, LookupError):
        return False
    return True


def table_cells(result: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of a table row."""
    case = result["case"]
    pooled = case["subsample_position"].split("_")[0] if SHAPES[case["shape"]].subsample > 1 else ""
    yield f"{case['shape']} {pooled}".strip()
    yield case["pairwise"].replace("_", " ")
    yield "forward + backward" if case["backward"] else "forward"
    for name in IMPLEMENTATIONS:
        if name not in result["memory"]:
            yield ""
        elif result["memory"][name] is None:
            yield "fails"
        else:
            ratio = f"{result['ratios'][name]:.2f}" if result["ratios"] else "-"
            cell = f"{ratio}, {result['memory'][name] / 2**20:.0f} MB"
            yield f"**{cell}**" if name == result["chosen"] else cell
    best = result["best_peer"]
    yield f"{best[1]:.3f} ({best[0]})" if best else ""


def draw_curves(results: list[dict[str, Any]], path: Path) -> None:
    """Plot time and memory of the naive and the chosen path over N."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for i, pairwise in enumerate(ops.PAIRWISE):
        rows = [r for r in results if r["case"]["pairwise"] == pairwise]
        rows.sort(key=lambda r: r["positions"])
        for quantity, ax in zip(("seconds", "memory"), axes):
            for style, chosen in (("--", False), ("-", True)):
                names = [r["chosen"] if chosen else "naive" for r in rows]
                points = [
                    (r["positions"], r[quantity][n] * (1e3 if quantity == "seconds" else 2**-20))
                    for r, n in zip(rows, names)
                    if r["memory"].get(n)
                ]
                label = pairwise.replace("_", " ") if chosen else None
                ax.loglog(*zip(*points), style, color=f"C{i}", marker=".", label=label)
    for ax, title in zip(axes, ("time, ms", "memory, MB")):
        ax.set(title=title, xlabel="positions N, keys not subsampled")
        ax.grid(alpha=0.3, which="both")
    axes[0].plot([], [], "k-", label="chosen path")
    axes[0].plot([], [], "k--", label="naive")
    axes[0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    named = [name for name in SHAPES if not name.startswith("n")]
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=named,
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}; default: all except n...",
    )
    parser.add_argument("--pairwise", nargs="+", choices=ops.PAIRWISE, default=ops.PAIRWISE)
    parser.add_argument(
        "--passes", nargs="+", choices=("forward", "backward"), default=("forward", "backward")
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--seconds", type=float, default=10, help="minimum time per case")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--picture", type=Path, help="plot time and memory over N to this file")
    args = parser.parse_args()
    cases = [
        Case(shape, pairwise, position, p == "backward", args.device, args.dtype)
        for p in args.passes
        for shape in args.shapes
        for pairwise in args.pairwise
        for position in (SUBSAMPLE_POSITIONS[: 2 if SHAPES[shape].subsample > 1 else 1])
    ]
    header = ["shape", "form", "pass", *IMPLEMENTATIONS, "chosen / best peer"]
    print("", *header, "", sep=" | ")
    print("", *["---"] * len(header), "", sep="|", flush=True)
    results = []
    for case in cases:
        results.append(measure(case, args.seconds))
        print("", *table_cells(results[-1]), "", sep=" | ", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.picture:
        draw_curves(results, args.picture)


if __name__ == "__main__":
    main()
