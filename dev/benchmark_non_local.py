"""Compare time and memory of the block's paths with each other and with other libraries' blocks.

All blocks of a case have the same weights and the same input tensor, and take turns in one process;
the one that begins changes from round to round. No keys are masked, because other libraries have no
masks. Before they are timed, the output and the gradient of the input are compared with a float64
reference, from the definition, by the largest error in relation to the largest value
(`TOLERANCES`); a block that is not as exact "differs" and is not timed.

A row of the table is a case, with these columns:

- chosen: the path that the block chooses by default, and the median of its times
- / best peer, / best path: medians of the ratios of its times to those of the fastest block of
  another library, and of the fastest other path
- efficiency: the time that the multiplications of the case would take at the rate of a large matrix
  product of the same dtype, divided by the time of the chosen path. The rate is measured in the
  same rounds: 2048 x 2048 x 2048, as a product by BLAS or as a convolution (oneDNN), whichever is
  faster. Counted are the convolutions and matrix products of a forward pass by the chosen path:
  with sizes of `Shapes` below, 2 Q K D for pairs and Q C D for each convolution of queries, for
  instance; a path that avoids products is held to what it does. A backward pass has two products
  for each, so both passes count three times as much; what a path computes again is not counted.
- memory: of the chosen path and of the leanest peer, the increase at the peak, each in a process
  of its own; on a CPU, of resident memory
- others: the ratios of the times of all others to that of the chosen path. "fails": it needs more
  memory than there is, or PyTorch refuses its backward pass (mmcv's concatenation).

mmcv, pytorchvideo and timm take part if they are installed: `make peers` puts them into
build/peers, for PYTHONPATH.

    python dev/benchmark_non_local.py --dtype float32 bfloat16 --worst 20    # takes an hour
    python dev/benchmark_non_local.py --shapes res4 --pairwise dot_product
    python dev/benchmark_non_local.py --passes forward --picture benchmark.png \\
        --shapes n196 n784 n1764 n4225 n8464 n16900

For a block within a detector see dev/benchmark_detector.py; for video networks,
dev/benchmark_video.py.

Shapes: N batch, C in, D inner, P positions, Q queries, K keys.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from measure import in_new_process, increase_at_peak
from torch import Tensor, nn

from nl_detectron import NonLocalBlock, ops
from nl_detectron.analysis.cost import block_cost
from nl_detectron.non_local import SUBSAMPLE_POSITIONS
from nl_detectron.weights import convert

# Of the output and of the gradient
TOLERANCES = {"float32": (1e-5, 1e-4), "float16": (4e-3, 4e-3), "bfloat16": (2e-2, 2e-2)}
PRODUCT_SIZE = 2048
CHECKED_QUERIES = 64
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4


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
    channels_last: bool


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


def new_block(case: Case) -> NonLocalBlock:
    """Build our block, with weights of which a response has the size of x."""
    shape = SHAPES[case.shape]
    torch.manual_seed(0)
    block = NonLocalBlock(
        shape.channels,
        dim=len(shape.size),
        pairwise=case.pairwise,
        subsample=shape.subsample,
        subsample_position=case.subsample_position,
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=shape.channels**-0.5)
    return block.to(case.device, getattr(torch, case.dtype)).eval()


def new_input(case: Case) -> Tensor:
    """Return the input that all blocks get."""
    shape = SHAPES[case.shape]
    torch.manual_seed(1)
    x = torch.randn(shape.batch, shape.channels, *shape.size)
    if case.channels_last:
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        x = x.to(memory_format=layouts[len(shape.size)])
    return x.to(case.device, getattr(torch, case.dtype))


def build_block(case: Case, name: str) -> nn.Module:
    """Build a block by the name of one of our paths or of another library.

    Raises:
        ImportError: the library is not installed.
        LookupError: the library has no such block.
    """
    ours = new_block(case)
    if name not in PEERS:
        ours.path = name
        return ours
    shape = SHAPES[case.shape]
    theirs = PEERS[name](case, shape).to(case.device, getattr(torch, case.dtype)).eval()
    options = {key: getattr(ours, key) for key in ("pairwise", "subsample", "subsample_position")}
    weights = convert(ours.state_dict(), "nl_detectron", name, lambda _: options)
    theirs.load_state_dict(weights.state)
    if name == "pytorchvideo" and len(shape.size) == 2:
        return nn.Sequential(nn.Unflatten(2, (1, -1)), theirs, nn.Flatten(2, 3))
    return theirs


def timed(case: Case, function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Call a function; return the seconds it takes, and its result."""
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    result = function()
    synchronize()
    return time.perf_counter() - start, result


def run_pass(
    case: Case, block: nn.Module, x: Tensor, dy: Tensor | None = None
) -> tuple[float, Tensor, Tensor | None]:
    """Run one pass; return its seconds, its output, and the gradient of x."""
    block.zero_grad()
    x = x.detach().requires_grad_(case.backward)
    if dy is None:
        dy = torch.ones_like(x)

    def run() -> Tensor:
        y = block(x)
        if case.backward:
            y.backward(dy)
        return y.detach()

    with torch.set_grad_enabled(case.backward):
        seconds, y = timed(case, run)
    return seconds, y, x.grad


def peak_memory(case: Case, name: str) -> int:
    """Return the peak memory of a pass in bytes, without the block and its input."""
    block, x = build_block(case, name), new_input(case)
    run_pass(case, block, x[..., :8, :8].clone())  # load libraries
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_pass(case, block, x)
        return torch.cuda.max_memory_allocated() - before
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, -1))  # Fail rather than swap.
    return increase_at_peak(lambda: run_pass(case, block, x))


def fits(case: Case, name: str) -> bool:
    """Return whether it is worth a try: mmcv's concatenation builds (N, 2 D, Q, K) three times."""
    if (name, case.pairwise) != ("mmcv", "concatenation"):
        return True
    shape = SHAPES[case.shape]
    positions = prod(shape.size)
    pairs = positions * positions // shape.subsample**2
    width = getattr(torch, case.dtype).itemsize
    memory = 3 * width * shape.batch * shape.channels * pairs
    return not case.backward and memory < MEMORY


def reference(case: Case, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute z at some positions in float64, from the definition (Eqs. 1 to 6 of the paper).

    Returns:
        z (N, C, Q), a gradient of z (N, C, Q), and with it that of x (N, C, P), if the case has
        a backward pass.
    """
    block: Any = new_block(case).double()
    x = new_input(case).double().requires_grad_(case.backward)

    def pool(map: Tensor) -> Tensor:
        window = ([1] * (block.dim - 2) + [block.subsample] * 2)[-block.dim :]
        return (F.max_pool2d, F.max_pool3d)[block.dim - 2](map, window)

    if block.subsample_position == "before_conv":
        keys = pool(x)
        phi, g = block.phi(keys).flatten(2), block.g(keys).flatten(2)
    else:
        phi, g = pool(block.phi(x)).flatten(2), pool(block.g(x)).flatten(2)
    theta = block.theta(x).flatten(2)[:, :, queries]
    if block.pairwise == "concatenation":
        w_theta, w_phi = block.concat_project.weight.flatten().chunk(2)
        f = ((w_theta @ theta)[:, :, None] + (w_phi @ phi)[:, None, :]).relu()
    else:
        f = theta.mT @ phi
    if block.pairwise == "embedded_gaussian":
        f = f * block.inner_channels**-0.5
    f = f.softmax(-1) if block.pairwise.endswith("gaussian") else f / f.shape[-1]
    out = block.conv_out
    z = x.flatten(2)[:, :, queries] + out.weight.flatten(1) @ (g @ f.mT) + out.bias[:, None]
    dz = torch.randn_like(z).to(getattr(torch, case.dtype))
    if not case.backward:
        return z.detach(), dz, None
    z.backward(dz.double())
    return z.detach(), dz, x.grad.flatten(2)  # type: ignore[union-attr]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error in relation to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def exact(case: Case, blocks: dict[str, nn.Module], x: Tensor) -> list[str]:
    """Return the names of the blocks whose output and gradient are those of the reference."""
    queries = torch.linspace(0, prod(x.shape[2:]) - 1, CHECKED_QUERIES).long().to(x.device)
    expected_z, dz, expected_gradient = reference(case, queries)
    dy = torch.zeros_like(x).flatten(2)
    dy[:, :, queries] = dz
    found = []
    for name, block in blocks.items():
        _, z, gradient = run_pass(case, block, x, dy.view_as(x))
        errors = [relative_error(z.flatten(2)[:, :, queries], expected_z)]
        if gradient is not None and expected_gradient is not None:
            errors.append(relative_error(gradient.flatten(2), expected_gradient))
        if all(error <= most for error, most in zip(errors, TOLERANCES[case.dtype])):
            found.append(name)
        else:
            print(f"{name} differs by {errors}: {case}", file=sys.stderr)
    return found


def large_product(case: Case) -> Callable[[], Tensor]:
    """Return a function that computes a large matrix product in the dtype of a case, and fast."""
    side = PRODUCT_SIZE
    a, b = torch.randn(2, side, side, device=case.device, dtype=getattr(torch, case.dtype))
    pixels = a.view(1, side, -1, 32).contiguous(memory_format=torch.channels_last)
    weight = b[:, :, None, None]
    ways = (lambda: a @ b, lambda: F.conv2d(pixels, weight))
    return min(ways, key=lambda way: min(timed(case, way)[0] for _ in range(2)))


def time_rounds(case: Case, names: list[str], seconds: float) -> dict[str, list[float]]:
    """Time the blocks that are exact, and a large product, in turns; return seconds by name.

    There are at least five rounds, or three where a pass takes more than two seconds.
    """
    x = new_input(case)
    blocks = {name: build_block(case, name) for name in names}
    runs: dict[str, Callable[[], float]] = {
        name: functools.partial(lambda block: run_pass(case, block, x)[0], blocks[name])
        for name in exact(case, blocks, x)
    }
    product = large_product(case)
    runs["product"] = lambda: timed(case, product)[0]
    times: dict[str, list[float]] = {name: [] for name in runs}
    start, rounds, least = time.perf_counter(), 0, 5
    while rounds < least or time.perf_counter() - start < seconds:
        first = rounds % len(runs)
        for name in [*runs, *runs][first : first + len(runs)]:
            times[name].append(runs[name]())
        rounds += 1
        least = 3 if max(map(min, times.values())) > 2 else 5
    return times


def chosen_path(case: Case) -> tuple[str, int]:
    """Return the path that the block chooses by default, and its multiplications."""
    block = new_block(case)
    with torch.set_grad_enabled(case.backward):
        path = block.path = block.path_for(new_input(case).requires_grad_(case.backward))
    shape = SHAPES[case.shape]
    macs = block_cost(block.float(), (shape.batch, shape.channels, *shape.size)).macs
    return path, macs * (3 if case.backward else 1)


def measure(case: Case, seconds: float, plot: bool) -> dict[str, Any]:
    """Return what the table, and optionally the plot, show of a case."""
    peers = in_new_process(find_peers, case)
    paths = list(ops.PATHS[case.pairwise])
    chosen, multiplications = in_new_process(chosen_path, case)
    memory = {
        name: in_new_process(peak_memory, case, name) if fits(case, name) else None
        for name in dict.fromkeys([chosen, *peers, *["naive"] * plot])
    }
    names = [name for name in [*paths, *peers] if memory.get(name, 0) is not None]
    times = in_new_process(time_rounds, case, names, seconds) or {}
    product = times.pop("product", [])
    medians = {name: statistics.median(series) for name, series in times.items()}
    result = {
        "case": case._asdict(),
        "positions": prod(SHAPES[case.shape].size),
        "chosen": chosen,
        "multiplications": multiplications,
        "memory": memory,
        "seconds": medians,
        "others": {name: "fails" for name in [*paths, *peers] if name not in names},
    }
    reason = "differs" if product else "fails"  # all of them together
    result["others"] |= {name: reason for name in names if name not in times}
    if chosen not in times:
        return result

    def ratio(name: str, base: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[base]))

    def to_best(names: list[str]) -> tuple[float, str] | None:
        found = [name for name in names if name in times and name != chosen]
        best = min(found, key=lambda name: medians[name], default="")
        return (ratio(chosen, best), best) if best else None

    share = multiplications / PRODUCT_SIZE**3
    result |= {
        "rounds": len(product),
        "rate": 2 * PRODUCT_SIZE**3 / statistics.median(product),
        "efficiency": statistics.median(share * a / b for a, b in zip(product, times[chosen])),
        "best_peer": to_best(peers),
        "best_path": to_best(paths),
    }
    result["others"] |= {name: ratio(name, chosen) for name in times if name != chosen}
    return result


def find_peers(case: Case) -> list[str]:
    """Return the other libraries that are installed and have such a block."""
    found = []
    for name, build in PEERS.items():
        with contextlib.suppress(ImportError, LookupError):
            build(case, SHAPES[case.shape])
            found.append(name)
    return found


HEADER = (
    *("shape", "form", "pass", "dtype", "chosen", "/ best peer", "/ best path", "efficiency"),
    *("memory", "leanest peer", "others"),
)


def print_row(cells: Iterable[str]) -> None:
    """Print a row of a table."""
    print("", *cells, "", sep=" | ", flush=True)


def table_cells(result: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of a table row."""
    case, chosen, memory = result["case"], result["chosen"], result["memory"]
    pooled = case["subsample_position"].split("_")[0] if SHAPES[case["shape"]].subsample > 1 else ""
    yield f"{case['shape']} {pooled}".strip()
    yield case["pairwise"].replace("_", " ")
    yield "forward + backward" if case["backward"] else "forward"
    yield case["dtype"]
    timed = chosen in result["seconds"]
    yield f"{chosen}, {1000 * result['seconds'][chosen]:.1f} ms" if timed else chosen
    for best in ("best_peer", "best_path"):
        yield f"{result[best][0]:.2f} ({result[best][1]})" if result.get(best) else ""
    yield f"{result['efficiency']:.2f}" if timed else ""
    yield "fails" if memory[chosen] is None else f"{memory[chosen] / 2**20:.0f} MB"
    leanest = min(((memory[n], n) for n in PEERS if memory.get(n) is not None), default=None)
    yield f"{leanest[0] / 2**20:.0f} MB ({leanest[1]})" if leanest else ""
    yield ", ".join(
        f"{name} {other}" if isinstance(other, str) else f"{name} {other:.2f}"
        for name, other in result["others"].items()
    )


def loss(result: dict[str, Any]) -> float:
    """Return the ratio of the time of the chosen path to that of the fastest block of all."""
    return max(best[0] for best in (result.get("best_peer"), result.get("best_path"), (0,)) if best)


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
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=TOLERANCES)
    parser.add_argument(
        "--channels-last",
        action="store_true",
        help="have the input in the channels-last layout, as in a detector that is optimized; "
        "otherwise it is contiguous, as in a stock one",
    )
    parser.add_argument("--seconds", type=float, default=2, help="minimum time per case")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--picture", type=Path, help="plot time and memory over N to this file")
    parser.add_argument(
        "--worst",
        type=int,
        default=0,
        metavar="N",
        help="repeat the N rows at the end where the chosen path loses most to another one or to "
        "another library",
    )
    args = parser.parse_args()
    if args.picture and len(args.dtype) + len(args.passes) > 2:
        parser.error("--picture is for one dtype and one of --passes")
    cases = [
        Case(shape, pairwise, position, p == "backward", args.device, dtype, args.channels_last)
        for dtype in args.dtype
        for p in args.passes
        for shape in args.shapes
        for pairwise in args.pairwise
        for position in (SUBSAMPLE_POSITIONS[: 2 if SHAPES[shape].subsample > 1 else 1])
    ]
    print_row(HEADER)
    print_row(["---"] * len(HEADER))
    results = []
    for case in cases:
        results.append(measure(case, args.seconds, bool(args.picture)))
        print_row(table_cells(results[-1]))
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    results.sort(key=loss, reverse=True)
    if args.worst:
        print("\nThe rows with the largest ratios:\n")
    for result in results[: args.worst]:
        print_row(table_cells(result))
    if args.picture:
        draw_curves(results, args.picture)


if __name__ == "__main__":
    main()
