"""Scale a config's schedule linearly to another batch size."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

BATCH = "SOLVER.IMS_PER_BATCH"
PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
SCALED = ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", *PERIODS)


def scale_schedule(cfg: CfgNode, file_cfg: CfgNode, given: Collection[str]) -> None:
    """Scale the schedule of a config in place, as ``DefaultTrainer.auto_scale_workers`` does.

    Args:
        cfg: config with the new batch size.
        file_cfg: the config without command-line overrides, whose batch size matches its schedule.
        given: keys given on the command line, which keep their values.

    Raises:
        ValueError: the batch size is that of the file, or detectron2 scales the config itself.
    """
    batch, file_batch = cfg.SOLVER.IMS_PER_BATCH, file_cfg.SOLVER.IMS_PER_BATCH
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            "--scale-lr: SOLVER.REFERENCE_WORLD_SIZE must be 0, or detectron2 scales batch size "
            f"and schedule by the number of processes, got {cfg.SOLVER.REFERENCE_WORLD_SIZE}"
        )
    if batch == file_batch or batch < 1:
        raise ValueError(
            f"--scale-lr: {BATCH} must be given, and differ from the config's {file_batch}, as in "
            f"`{BATCH} {max(1, file_batch // 8)}`; got {batch}"
        )
    scaled = file_cfg.clone()
    scaled.SOLVER.REFERENCE_WORLD_SIZE = file_batch  # as if every process had one image
    scaled = DefaultTrainer.auto_scale_workers(scaled, batch)
    for key in set(SCALED) - set(given):
        value = _get(scaled, key)
        if key in PERIODS and _get(file_cfg, key):
            value = max(1, value)  # 0 disables it
        cfg.merge_from_list([key, value])


def schedule_table(cfg: CfgNode, file_cfg: CfgNode, given: Collection[str]) -> str:
    """Format the changes of :func:`scale_schedule` as a Markdown table."""
    lines = ["| key | config | yours | |", "|---|---:|---:|---|"]
    for key in (BATCH, *SCALED):
        note = " given" if key in given else ""
        lines.append(f"| {key} | {_get(file_cfg, key)} | {_get(cfg, key)} |{note} |")
    return "\n".join(lines)


def _get(cfg: CfgNode, key: str) -> Any:
    section, _, name = key.partition(".")
    return cfg[section][name]
