"""Training batches: their order, what is random about them, and files that cannot be read."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm
from PIL import Image

from nl_detectron.engine.coco.files import register_coco_files
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.loader import TrainLoader, UnreadableFile
from nl_detectron.engine.randomness import seed_generators, seeded_generators
from tests.generated_coco import write_coco

SIZES = [(7, 5), (5, 7), (6, 6), (9, 4), (3, 8), (8, 3), (4, 9), (9, 9), (9, 8), (2, 3), (3, 2)]
RECORDS = [
    {"file_name": f"{i}.png", "width": width, "height": height}
    for i, (width, height) in enumerate(SIZES)
]


def draw(record):
    """A mapper that draws from every generator."""
    numbers = random.random(), float(np.random.rand()), float(torch.rand(1))
    return {"file_name": record["file_name"], "numbers": numbers}


def sampler(records, seed):
    return TrainingSampler(len(records), seed=seed)


def loader(mapper=draw, make_sampler=sampler, records=RECORDS, **options):
    options = {"batch_size": 2, "seed": 5, "aspect_ratio_grouping": True, **options}
    return TrainLoader(records, mapper, make_sampler, **options)


def take(loader, count, start=0):
    if start:
        loader.start = start
    return list(itertools.islice(loader, count))


def names(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    "make_sampler",
    [
        sampler,
        lambda records, seed: RepeatFactorTrainingSampler(
            torch.linspace(1, 3, len(records)), seed=seed
        ),
        lambda records, seed: RandomSubsetTrainingSampler(
            len(records), 0.6, seed_shuffle=seed, seed_subset=seed
        ),
    ],
)
def test_batches_are_those_of_detectron2(make_sampler, grouped):
    order = (RECORDS[i] for i in make_sampler(RECORDS, 5))
    if grouped:
        expected = itertools.islice(AspectRatioGroupedDataset(order, 3), 12)
    else:
        expected = ([next(order) for _ in range(3)] for _ in range(12))
    ours = loader(make_sampler=make_sampler, batch_size=3, aspect_ratio_grouping=grouped)
    assert names(take(ours, 12)) == names(expected)


def test_processes_share_the_order(monkeypatch):
    """Two processes see every sample of one process once, each the same as there."""
    whole = take(loader(batch_size=1, aspect_ratio_grouping=False), 20)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        part = take(loader(batch_size=1, aspect_ratio_grouping=False), 10)
        assert part == whole[rank::2]


def test_seed_and_number_decide_a_batch():
    expected = take(loader(), 9)
    assert expected != take(loader(seed=6), 9)
    drawn = [number for batch in expected for sample in batch for number in sample["numbers"]]
    assert len(set(drawn)) == 9 * 2 * 3
    assert abs(np.mean(drawn) - 0.5) < 0.15  # 4 standard deviations
    seed_generators(1)
    assert take(loader(), 9) == expected
    seed_generators(2)
    for workers, start in itertools.product((1, 2), (0, 1, 4)):
        found = take(loader(num_workers=workers), 9 - start, start)
        assert found == expected[start:], (workers, start)


def test_other_random_numbers_stay_as_they_are():
    """Those of an iteration are no others because its batch was read by the same process."""
    for workers in (0, 1):
        seed_generators(1, 2, 3)
        expected = draw(RECORDS[0])
        seed_generators(1, 2, 3)
        take(loader(num_workers=workers), 3)
        with seeded_generators(9):
            draw(RECORDS[0])
        assert draw(RECORDS[0]) == expected


def test_purposes_have_numbers_of_their_own():
    found = set()
    for key in itertools.chain([()], itertools.product((0, 1)), itertools.product((0, 1), (0, 1))):
        with seeded_generators(3, *key):
            found.update(draw(RECORDS[0])["numbers"])
    assert len(found) == 3 * (1 + 2 + 4)


def test_going_on_late_takes_no_time():
    """The last iteration of a training on COCO, 16 images at a time."""
    records = [{"file_name": "", "width": 1 + i % 3, "height": 2} for i in range(118_000)]
    late = loader(records=records, batch_size=16)
    start = time.perf_counter()
    take(late, 1, start=90_000)
    assert time.perf_counter() - start < 3


def test_sizes_must_be_known():
    with pytest.raises(ValueError, match=r"GROUPING must be False .*: a\.png has no 'height'$"):
        loader(records=[{"file_name": "a.png", "width": 3}])


def test_detector_gets_its_batches(small_cfg, custom_data_name):
    """Those of the config's sampler, augmented, whatever the number of workers."""
    small_cfg.DATASETS.TRAIN = (custom_data_name,)
    small_cfg.SOLVER.IMS_PER_BATCH, small_cfg.SEED = 2, 4
    small_cfg.INPUT.MIN_SIZE_TRAIN = (40, 50, 60)
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 2
    for name in ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"):
        small_cfg.DATALOADER.SAMPLER_TRAIN = name
        small_cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
        seen = []
        for small_cfg.DATALOADER.NUM_WORKERS in (0, 2):
            seed_generators(small_cfg.DATALOADER.NUM_WORKERS)
            batches = take(CocoTrainer.build_train_loader(small_cfg), 6)
            seen.append([(sample["file_name"], sample["image"]) for b in batches for sample in b])
        assert [name for name, _ in seen[0]] == [name for name, _ in seen[1]]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*seen))
        assert len({image.shape for _, image in seen[0]}) > 1
        assert len({file for file, _ in seen[0]}) == (2 if "Subset" in name else 4)


@pytest.fixture
def damaged(tmp_path):
    """Records of 20 images, of which four cannot be read."""
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"")
    (tmp_path / "07.png").write_text("text")
    whole = (tmp_path / "12.png").read_bytes()
    (tmp_path / "12.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "16.png").unlink()
    return [
        {"file_name": str(tmp_path / f"{i:02}.png"), "width": 16, "height": 12, "annotations": []}
        for i in range(20)
    ]


BROKEN = {
    "03.png": "not an image",
    "07.png": "not an image",
    "12.png": "image file is truncated",
    "16.png": "No such file or directory",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_and_capped(cfg, damaged, workers, caplog):
    cfg.INPUT.MIN_SIZE_TRAIN = (12,)
    mapper = DatasetMapper(cfg, is_train=True)
    ours = loader(mapper, records=damaged, num_workers=workers, batch_size=4)
    ours.max_unreadable = 0.2
    with caplog.at_level(logging.WARNING, "nl_detectron"):
        used = names(take(ours, 30))
    files = {record["file_name"] for record in damaged}
    broken = [name for name in files if Path(name).name in BROKEN]
    assert {name for batch in used for name in batch} == files - {*broken}
    messages = [r.getMessage() for r in caplog.records if r.name == "nl_detectron"]
    for name in broken:
        (message,) = (message for message in messages if name in message)
        assert message.startswith(f"Not used for training: {name}: {BROKEN[Path(name).name]}")
    assert len(messages) == len(ours.unreadable) == 4
    # The same images take their places whoever reads them.
    other = loader(mapper, records=damaged, batch_size=4, num_workers=1)
    other.max_unreadable = 1.0
    assert names(take(other, 30)) == used

    ours.max_unreadable, ours.unreadable = 0.15, {}
    message = r"^4 of 20 .* --max-bad-images 0\.15 allows: .*$"
    with pytest.raises(UnreadableFile, match=message) as error:
        take(ours, 30)
    assert all(name in str(error.value) for name in broken)
    assert "Traceback" not in str(error.value)
    ours.max_unreadable, ours.unreadable = 0.0, {}
    with pytest.raises(UnreadableFile, match=r"^[^;]*\d\d\.png[^;]*\(--bad-images skip .*\)$"):
        take(ours, 30)


def test_all_unreadable(cfg, damaged):
    cfg.INPUT.MIN_SIZE_TRAIN = (12,)
    mapper = DatasetMapper(cfg, is_train=True)
    ours = loader(mapper, records=[damaged[i] for i in (3, 7, 12)])
    ours.max_unreadable = 1.0
    with pytest.raises(UnreadableFile, match="^3 of 3 training files cannot be read"):
        take(ours, 1)


def test_mistakes_are_no_unreadable_files():
    ours = loader(lambda record: record["height_"])
    ours.max_unreadable = 1.0
    with pytest.raises(KeyError):
        take(ours, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_ends_at_an_unreadable_image(small_cfg, custom_data, tmp_path, workers):
    category = [{"id": 1, "name": "square"}]
    json_file = write_coco(tmp_path / "images", "a.json", num_images=4, categories=category)
    (tmp_path / "images" / "3.png").write_bytes(b"")
    register_coco_files("custom_test", str(json_file), str(tmp_path / "images"))
    small_cfg.MODEL.KEYPOINT_ON, small_cfg.DATALOADER.NUM_WORKERS = False, workers
    test_loader = CocoTrainer.build_test_loader(small_cfg, "custom_test")
    assert len(test_loader) == 4
    seen = []
    with pytest.raises(UnreadableFile, match=r"^\S+/3\.png: not an image$"):
        seen += names(test_loader)
    small_cfg.DATALOADER.NUM_WORKERS = 0
    (tmp_path / "images" / "3.png").write_bytes((tmp_path / "images" / "2.png").read_bytes())
    assert len(names(CocoTrainer.build_test_loader(small_cfg, "custom_test"))) == 4


def children():
    threads = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(pid) for t in threads for pid in (t / "children").read_text().split()}


def test_workers_leave_signals_to_the_parent():
    """They reach the whole job; but a worker that its parent ends does end."""
    before, batches, expected = children(), iter(loader(num_workers=2)), take(loader(), 12)
    assert [next(batches), next(batches)] == expected[:2]  # one of each worker
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGUSR1)
        subprocess.run(["kill", str(pid)], check=True)  # SIGTERM, but not from the parent
    assert [next(batches) for _ in range(10)] == expected[2:]
    assert workers <= children()
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    for process in multiprocessing.active_children():
        if process.pid in workers:
            process.join(5)
            assert process.exitcode == 0
