"""Launch a command: validate its input without training, then start its processes."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from nl_detectron.engine.console import errors_without_traceback, suppress_detectron2_warnings
from nl_detectron.engine.lock import run_lock
from nl_detectron.engine.signals import forward_signals
from nl_detectron.safety.folders import check_output_folder

Main = Callable[[argparse.Namespace], Any]


def launch(
    main: Main,
    args: argparse.Namespace,
    read_config: Callable[[argparse.Namespace], CfgNode],
    check: Callable[[argparse.Namespace, CfgNode], None],
) -> None:
    """Run ``main(args)`` in as many processes as the arguments ask for, on GPUs or on the CPU.

    Under ``torchrun``, this is one of the processes already. Otherwise the launcher passes signals
    on to the processes, and exits with the code of the first that failed.

    Invalid arguments, configs, data sets and weights end the program with a one-line message before
    anything else is printed, as does another run in the same ``OUTPUT_DIR``.

    Args:
        main: runs in every process.
        args: from :func:`nl_detectron_cli.arguments.training_parser`.
        read_config: builds the config from the arguments.
        check: raises ``ValueError`` if ``main`` cannot run with the config.
    """
    with suppress_detectron2_warnings():
        if dist.is_torchelastic_launched():
            _run_under_torchrun(main, args, read_config, check)
            return
        cfg = _checked_config(args, read_config, check)
        processes, cpu = _processes(args), cfg.MODEL.DEVICE == "cpu"
        main = functools.partial(_run_locked, main, cfg.OUTPUT_DIR)
        if processes * args.num_machines == 1:
            main(args)
            return
        with tempfile.TemporaryDirectory() as folder:
            url = f"file://{folder}/store" if args.dist_url == "auto" else args.dist_url
            _start_processes(processes, (main, args, cpu, url))


def _checked_config(
    args: argparse.Namespace,
    read_config: Callable[[argparse.Namespace], CfgNode],
    check: Callable[[argparse.Namespace, CfgNode], None],
) -> CfgNode:
    """Return the config of a run that nothing is known to be wrong with."""
    with errors_without_traceback():
        cfg = read_config(args)
        _check_processes(args, cfg)
        _check_output(cfg)
        with ExitStack() as stack:
            if args.machine_rank == 0:
                stack.enter_context(run_lock(cfg.OUTPUT_DIR))
            check(args, cfg)
    return cfg


def _run_under_torchrun(
    main: Main,
    args: argparse.Namespace,
    read_config: Callable[[argparse.Namespace], CfgNode],
    check: Callable[[argparse.Namespace, CfgNode], None],
) -> None:
    """Run ``main`` in this process, one of those that PyTorch's launcher has started.

    The first process checks the input, and tells the others when they may begin.
    """
    with errors_without_traceback():
        _take_processes_of_torchrun(args)
    store, rank, world_size = next(dist.rendezvous("env://"))
    # Without a prefix, processes that are restarted find the addresses of those before them.
    store = dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    if rank == 0:
        cfg = _checked_config(args, read_config, check)
        store.set("device", cfg.MODEL.DEVICE)
        main = functools.partial(_run_locked, main, cfg.OUTPUT_DIR)
    cpu = store.get("device") == b"cpu"  # waits for it
    _run_in_group(main, args, cpu, rank, world_size, store=store)


def _take_processes_of_torchrun(args: argparse.Namespace) -> None:
    defaults = {"num_gpus": 1, "num_processes": None, "num_machines": 1, "machine_rank": 0}
    for option, default in defaults.items():
        if getattr(args, option) != default:
            raise ValueError(
                f"--{option.replace('_', '-')} must not be given under torchrun, which has "
                f"--nproc-per-node and --nnodes for it; got {getattr(args, option)}"
            )
    args.num_processes = int(os.environ["LOCAL_WORLD_SIZE"])
    args.num_machines = int(os.environ["WORLD_SIZE"]) // args.num_processes
    args.machine_rank = int(os.environ["GROUP_RANK"])


def _start_processes(count: int, worker_args: tuple) -> None:
    """Start the processes of this machine, wait for them, and exit as the first that failed."""
    context = mp.start_processes(_worker, worker_args, count, join=False)
    with forward_signals(context.processes):
        try:
            while not context.join():
                pass
        except mp.ProcessExitedException as error:
            if error.exit_code < 0:
                name = signal.Signals(-error.exit_code).name
                print(f"Process {error.error_index} was killed by {name}.", file=sys.stderr)
            code = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
            raise SystemExit(code) from None
        except mp.ProcessRaisedException as error:
            raise SystemExit(str(error)) from None


def _run_locked(main: Main, folder: str, args: argparse.Namespace) -> None:
    """Run ``main`` while the main process holds the lock of the output folder.

    It is not the process that starts the others, because they may outlive that one.
    """
    with ExitStack() as stack:
        if comm.is_main_process():
            with errors_without_traceback():
                stack.enter_context(run_lock(folder))
        main(args)


def _processes(args: argparse.Namespace) -> int:
    """Return the number of processes on this machine."""
    return args.num_processes or args.num_gpus


def _check_processes(args: argparse.Namespace, cfg: CfgNode) -> None:
    processes = _processes(args)
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


def _worker(local_rank: int, main: Main, args: argparse.Namespace, cpu: bool, url: str) -> None:
    processes = _processes(args)
    if cpu:
        limit_threads(processes)
    rank = args.machine_rank * processes + local_rank
    try:
        _run_in_group(main, args, cpu, rank, processes * args.num_machines, init_method=url)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _run_in_group(
    main: Main, args: argparse.Namespace, cpu: bool, rank: int, world_size: int, **where: Any
) -> None:
    """Run ``main`` as one of several processes, which detectron2 0.6 can do with CUDA only.

    Args:
        main: runs in every process.
        args: passed to ``main``.
        cpu: whether the processes train on the CPU.
        rank: of this process among those of all machines.
        world_size: their number.
        where: the processes meet: options of ``init_process_group``.
    """
    local_size = _processes(args)
    if not cpu:
        torch.cuda.set_device(rank % local_size)
    backend = "gloo" if cpu else "nccl"
    dist.init_process_group(backend, rank=rank, world_size=world_size, **where)
    for first in range(0, world_size, local_size):
        ranks = list(range(first, first + local_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    comm.synchronize()
    with suppress_detectron2_warnings():
        main(args)
    comm.synchronize()  # a process that ends while another still waits for it makes that one fail
    dist.destroy_process_group()
