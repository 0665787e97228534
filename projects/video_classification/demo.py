"""Show what C2D, I3D, TSM and their non-local versions can see, before training and by training.

Generates videos whose class depends on the order of frames, or on two squares that are far apart;
computes which networks can see that; trains all of them, and compares accuracies and
cross-entropies with what is possible. What was done before it was interrupted is not done again.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from nl_detectron_cli.arguments import add_integer, command_parser
from nl_detectron_cli.threads import limit_thread_spinning

TASKS = ("order", "near", "space", "time", "spacetime")
NETWORKS = ("C2D", "I3D", "TSM", "NL-space", "NL-time", "NL-spacetime", "NL-I3D")
NOTE = """\
These networks were made small so that they cannot see everything. A ResNet-50 sees more than 224
pixels, and as I3D more than 32 frames: at the scale of the paper, reach is not the limit.
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=TASKS,
        default=["order", "spacetime"],
        help="tasks to train for (default: order spacetime)",
    )
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=NETWORKS,
        default=NETWORKS,
        help="networks to train (default: %(default)s)",
    )
    add_integer(parser, "--seeds", 3, "trainings of each network")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        help="multiple of the config's iterations (default: %(default)g)",
    )
    parser.add_argument(
        "--longer",
        type=float,
        default=3.0,
        help="what cannot see a task is also trained for so many times the budget, with one seed; "
        "0: not at all (default: %(default)g)",
    )
    add_integer(parser, "--videos", 1024, "for training; there are a quarter as many for testing")
    add_integer(parser, "--jobs", os.cpu_count() or 1, "trainings at a time, each in one thread")
    parser.add_argument(
        "--output", type=Path, default=Path("output/video"), help="folder (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    limit_thread_spinning()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings

    with suppress_detectron2_warnings():
        from video_classification.demo import report
        from video_classification.demo.dataset import write_dataset
        from video_classification.demo.networks import SEEN, random_network, visibility
        from video_classification.demo.training import Run, run_all

    measured = {name: visibility(random_network(name), TASKS) for name in args.networks}
    print(f"What the networks see, with random weights:\n\n{report.visibility_table(measured)}\n")

    folder = args.output / f"{args.videos}_videos"
    for task in args.tasks:
        for split, size in (("train", args.videos), ("test", args.videos // 4)):
            data = folder / f"{task}_{split}"
            print(f"data: {data}", flush=True)
            with errors_without_traceback():
                write_dataset(data, task, split, seed=0, size=size)

    runs = [
        Run(task, network, seed, args.budget)
        for task in args.tasks
        for seed in range(args.seeds)
        for network in args.networks
    ]
    if args.longer:
        runs += [
            run._replace(budget=args.budget * args.longer)
            for run in runs
            if run.seed == 0 and measured[run.network][run.task] < SEEN
        ]
    runs.sort(key=lambda run: args.tasks.index(run.task))
    results, start = {}, time.monotonic()
    for run, result in run_all(runs, folder, folder, args.jobs):
        results[run] = result
        print(f"[{len(results)}/{len(runs)}] {run}: {result}", flush=True)
    print(f"trained in {(time.monotonic() - start) / 60:.1f} min\n")

    ordered = {run: results[run] for run in runs}
    print(report.results_table(ordered, measured) + "\n")
    print(NOTE)
    picture = args.output / "video.png"
    report.draw_results(picture, ordered, measured, folder)
    print(picture)
    if wrong := report.impossible(ordered, measured):
        raise SystemExit(f"Impossible results, so there is a mistake: {', '.join(map(str, wrong))}")


if __name__ == "__main__":
    main()
