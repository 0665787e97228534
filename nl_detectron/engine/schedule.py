"""A config's schedule for another batch size: learning rate, iterations and periods, linearly."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

BATCH = "SOLVER.IMS_PER_BATCH"
PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")
SCALED = ("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", *PERIODS)


def scale_schedule(cfg: CfgNode, file_cfg: CfgNode, given: Collection[str]) -> None:
    """Scale the schedule of a config in place, as ``DefaultTrainer.auto_scale_workers`` would.

    Args:
        cfg: the config with the new batch size.
        file_cfg: the same without what the command line changes; its batch size is the one that
            its schedule was made for.
        given: keys on the command line, which keep their values.

    Raises:
        ValueError: the batch size is that of the file, or detectron2 scales the config itself.
    """
    batch, file_batch = cfg.SOLVER.IMS_PER_BATCH, file_cfg.SOLVER.IMS_PER_BATCH
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise ValueError(
            "--scale-lr: SOLVER.REFERENCE_WORLD_SIZE is "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE}, with which detectron2 scales batch and schedule "
            "by the number of processes; set it to 0"
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
            value = max(1, value)  # 0 would mean never
        cfg.merge_from_list([key, value])


def schedule_table(cfg: CfgNode, file_cfg: CfgNode, given: Collection[str]) -> str:
    """Lay out what :func:`scale_schedule` did, key by key."""
    lines = ["| key | config | yours | |", "|---|---:|---:|---|"]
    for key in (BATCH, *SCALED):
        note = " given" if key in given else ""
        lines.append(f"| {key} | {_get(file_cfg, key)} | {_get(cfg, key)} |{note} |")
    return "\n".join(lines)


def _get(cfg: CfgNode, key: str) -> Any:
    section, _, name = key.partition(".")
    return cfg[section][name]
