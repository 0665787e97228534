"""Compare C2D, I3D and I3D with five blocks, all R50, with pytorchvideo's networks.

Both have the same weights and the same logits, in evaluation and in training, and take turns in one
process; the clip has 8 frames of 224 x 224. A row shows the median and quartiles of the ratios of
their times, and the memory of each: the increase at the peak, in a process of its own.
pytorchvideo's I3D has blocks of its own at the same places. `make peers` installs it.

    PYTHONPATH=build/peers python dev/benchmark_video.py
    PYTHONPATH=build/peers python dev/benchmark_video.py --models i3d --passes training --rounds 5
    python dev/benchmark_video.py --long    # a training step on 128 frames, ours alone
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from measure import in_new_process, increase_at_peak, process_memory, return_freed_memory
from torch import Tensor, nn

from nl_detectron.config import load_config
from nl_detectron.non_local import NonLocalBlock, find_blocks
from nl_detectron.weights import convert

PROJECT = Path(__file__).resolve().parents[1] / "projects" / "video_classification"
sys.path.insert(0, str(PROJECT))
# Config, and pytorchvideo's network
MODELS = {
    "c2d": ("c2d_R_50_32x2", "c2d_r50"),
    "i3d": ("i3d_R_50_32x2", "i3d_r50"),
    "nl_i3d": ("i3d_R_50_NL5_32x2", "i3d_r50"),
}
PASSES = ("inference", "training")


class Peer(nn.Module):
    """pytorchvideo's network for pixels from 0 to 255, as ours."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> Tensor:
        """Classify clips (N, 3, T, H, W)."""
        return self.network((clips - 114.75) / 57.375)


def load(name: str) -> CfgNode:
    """Load a config of the project, for the CPU and without dropout."""
    from video_classification.config import default_video_config

    cfg = load_config(
        PROJECT / "configs" / "Kinetics" / f"{name}.yaml",
        ["MODEL.DEVICE", "cpu"],
        default_video_config,
    )
    cfg.MODEL.VIDEO.HEAD.DROPOUT = 0.0
    return cfg


def peer_block(block: NonLocalBlock) -> nn.Module:
    """Build pytorchvideo's block with the same weights."""
    from pytorchvideo.layers.nonlocal_net import create_nonlocal

    theirs = create_nonlocal(
        dim_in=block.g.in_channels,
        dim_inner=block.g.out_channels,
        pool_size=(1, block.subsample, block.subsample),
    )
    options = {"pairwise": block.pairwise, "subsample": block.subsample}
    weights = convert(block.state_dict(), "nl_detectron", "pytorchvideo", lambda _: options)
    theirs.load_state_dict(weights.state)
    return theirs


def build_pair(model: str) -> tuple[nn.Module, nn.Module]:
    """Build our network and pytorchvideo's with the same random weights."""
    from pytorchvideo.models import hub

    config, builder = MODELS[model]
    cfg = load(config)
    cfg.MODEL.VIDEO.POOLING = "slowfast"
    torch.manual_seed(0)
    ours = build_model(cfg)
    for name, parameter in ours.named_parameters():
        if name.endswith("norm.weight"):  # some start at zero
            nn.init.uniform_(parameter, 0.2, 0.4)
    trunk = {key: value for key, value in ours.state_dict().items() if ".non_local" not in key}
    network = getattr(hub, builder)(dropout_rate=0)
    network.load_state_dict(convert(trunk, "nl_detectron", "pytorchvideo").state)
    # From the back, since numbers change behind a block.
    for name, block in reversed(find_blocks(ours).items()):
        stage, place = name.removeprefix("backbone.res").split(".non_local")
        network.blocks[int(stage)].res_blocks.insert(int(place) + 1, peer_block(block))
    return ours, Peer(network)


def run_pass(model: nn.Module, clips: Tensor) -> tuple[float, Tensor]:
    """Run a forward pass, in training also a backward pass; return the seconds and the logits."""
    model.zero_grad()
    start = time.perf_counter()
    with torch.set_grad_enabled(model.training):
        logits = model(clips)
    if model.training:
        F.cross_entropy(logits, torch.arange(len(clips))).backward()
    return time.perf_counter() - start, logits.detach()


def make_clips(frames: int = 8, size: int = 224) -> Tensor:
    """Create a batch of one clip."""
    torch.manual_seed(0)
    return 255 * torch.rand(1, 3, frames, size, size)


def time_ratios(model: str, training: bool, rounds: int) -> list[float]:
    """Time both networks in turns; return our times, divided by theirs."""
    ours, theirs = (network.train(training) for network in build_pair(model))
    clips, ratios = make_clips(), []
    (_, logits), (_, expected) = run_pass(ours, clips), run_pass(theirs, clips)
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"the logits of {model} differ by {error}"
    for i in range(rounds):
        turns = (ours, theirs) if i % 2 else (theirs, ours)
        seconds = {network: run_pass(network, clips)[0] for network in turns}
        ratios.append(seconds[ours] / seconds[theirs])
    return ratios


def peak_memory(model: str, training: bool, index: int) -> int:
    """Return the peak memory of a pass of our network (0) or theirs (1), in bytes."""
    return_freed_memory()
    network, clips = build_pair(model)[index].train(training), make_clips()
    run_pass(nn.Sequential(nn.Conv3d(3, 8, 3), nn.Flatten(), nn.LazyLinear(3)), make_clips(8, 16))
    return increase_at_peak(lambda: run_pass(network, clips))


def long_step() -> tuple[float, int]:
    """Train NL I3D R50 for one step on a clip of 128 frames; return seconds, and bytes in all."""
    return_freed_memory()
    torch.manual_seed(0)
    model, clips = build_model(load("i3d_R_50_NL5_128x1")).train(), make_clips(128)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True)
    start = time.perf_counter()
    run_pass(model, clips)
    optimizer.step()
    return time.perf_counter() - start, process_memory("VmHWM")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--long", action="store_true", help="a training step on 128 frames instead")
    args = parser.parse_args()
    if args.long:
        seconds, peak = in_new_process(long_step)
        print(f"NL I3D R50, one clip of 128 frames: one step {seconds:.1f} s, {peak / 1e9:.2f} GB")
        return
    print("| network | pass | time / pytorchvideo's | quartiles | memory | pytorchvideo's |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    for name in args.passes:
        for model in args.models:
            training = name == "training"
            ratios = in_new_process(time_ratios, model, training, args.rounds)
            low, median, high = statistics.quantiles(ratios)
            memory = [in_new_process(peak_memory, model, training, i) for i in (0, 1)]
            cells = [f"{peak / 2**20:.0f} MB" for peak in memory]
            print(
                f"| {model} | {name} | {median:.3f} | {low:.3f} to {high:.3f} "
                f"| {' | '.join(cells)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
