"""Launch a command: validate its input without training, then start its processes."""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2 import engine
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
from nl_detectron.engine.lock import run_lock
from nl_detectron.safety.folders import check_output_folder

Main = Callable[[argparse.Namespace], Any]


def launch(
    main: Main,
    args: argparse.Namespace,
    read_config: Callable[[argparse.Namespace], CfgNode],
    check: Callable[[argparse.Namespace, CfgNode], None],
) -> None:
    """Run ``main(args)`` in as many processes as the arguments ask for, on GPUs or on the CPU.

    Invalid arguments, configs, data sets and weights end the program with a one-line message before
    anything else is printed, as does another run in the same ``OUTPUT_DIR``.

    Args:
        main: runs in every process.
        args: from :func:`nl_detectron_cli.arguments.training_parser`.
        read_config: builds the config from the arguments.
        check: raises ``ValueError`` if ``main`` cannot run with the config.
    """
    with suppress_detectron2_warnings():
        with errors_without_traceback():
            cfg = read_config(args)
            processes = _number_of_processes(args, cfg)
            _check_output(cfg)
            with ExitStack() as stack:
                if args.machine_rank == 0:
                    stack.enter_context(run_lock(cfg.OUTPUT_DIR))
                check(args, cfg)
        main = functools.partial(_run_locked, main, cfg.OUTPUT_DIR)
        world_size = processes * args.num_machines
        if world_size == 1:
            main(args)
        elif cfg.MODEL.DEVICE == "cpu":
            with tempfile.TemporaryDirectory() as folder:
                url = f"file://{folder}/store" if args.dist_url == "auto" else args.dist_url
                mp.start_processes(_cpu_worker, (main, args, processes, url), processes)
        else:
            machines = (args.num_machines, args.machine_rank, args.dist_url)
            engine.launch(main, processes, *machines, args=(args,))


def _run_locked(main: Main, folder: str, args: argparse.Namespace) -> None:
    """Run ``main`` while the main process holds the lock of the output folder.

    It is not the process that starts the others, because they may outlive that one.
    """
    with ExitStack() as stack:
        if comm.is_main_process():
            with errors_without_traceback():
                stack.enter_context(run_lock(folder))
        main(args)


def _number_of_processes(args: argparse.Namespace, cfg: CfgNode) -> int:
    """Return the number of processes on this machine."""
    processes = args.num_processes or args.num_gpus
    if cfg.MODEL.DEVICE == "cpu":
        if args.num_gpus > 1:
            raise ValueError(
                f"--num-gpus {args.num_gpus} needs CUDA devices, but there is none or MODEL.DEVICE "
                f"is 'cpu'; use --num-processes {args.num_gpus} to train on the CPU"
            )
    elif processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus must be at most the number of CUDA devices, {torch.cuda.device_count()}, "
            f"got {processes}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise ValueError(
            f"--dist-url auto works on one machine only, got --num-machines {args.num_machines}"
        )
    world_size, batch_size = processes * args.num_machines, cfg.SOLVER.IMS_PER_BATCH
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE and batch_size % world_size and not args.eval_only:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the number of processes, {world_size}; "
            f"got {batch_size}"
        )
    return processes


def _check_output(cfg: CfgNode) -> None:
    try:
        PathManager.mkdirs(cfg.OUTPUT_DIR)
        with tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR):
            pass
    except OSError as error:
        raise ValueError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to: {error.strerror}"
        ) from error
    check_output_folder(cfg.OUTPUT_DIR, ("inference", "stock", "non_local"))


def limit_threads(processes: int) -> None:
    """Divide the CPU cores among the processes, unless the environment sets a number of threads.

    Otherwise each process uses as many threads as there are cores, and every parallel section waits
    for threads that wait for a core.
    """
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _cpu_worker(rank: int, main: Main, args: argparse.Namespace, processes: int, url: str) -> None:
    """Replace detectron2's worker, which requires CUDA in version 0.6."""
    limit_threads(processes)
    dist.init_process_group(
        "gloo",
        url,
        rank=args.machine_rank * processes + rank,
        world_size=args.num_machines * processes,
    )
    for machine in range(args.num_machines):
        group = dist.new_group(list(range(machine * processes, (machine + 1) * processes)))
        if machine == args.machine_rank:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()
    with suppress_detectron2_warnings():
        main(args)
    comm.synchronize()  # a process that ends while another still waits for it makes that one fail
    dist.destroy_process_group()
