"""Clips as the model gets them: mapper, cache and loaders on frames that know their place."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from video_classification.data import (
    VideoMapper,
    benchmark_loader,
    build_test_loader,
    build_train_loader,
    cache,
    register_csv,
)


@pytest.fixture
def cfg(video_cfg):
    """Frames of 64x48, of which clips of 4x3 are 40x32; no scaling, so that pixels keep values."""
    video_cfg.INPUT.CLIP.NUM_FRAMES, video_cfg.INPUT.CLIP.STRIDE = 4, 3
    video_cfg.INPUT.MIN_SIZE_TRAIN = (48,)
    video_cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    video_cfg.INPUT.MIN_SIZE_TEST = 48
    video_cfg.INPUT.CROP.ENABLED = True
    video_cfg.INPUT.CROP.TYPE = "absolute"
    video_cfg.INPUT.CROP.SIZE = [32, 40]
    video_cfg.TEST.VIEWS.CROP_SIZE = 48
    video_cfg.DATASETS.TRAIN = ("test",)
    video_cfg.SOLVER.IMS_PER_BATCH = 4
    video_cfg.DATALOADER.NUM_WORKERS = 0
    return video_cfg


@pytest.fixture
def data_set(tmp_path, coded_video):
    """Registers a data set of 20 videos, of which three cannot be decoded."""
    names = [coded_video(20, name=f"{i:02}.mp4") for i in range(20)]
    Path(names[3]).write_bytes(b"")
    Path(names[7]).write_text("text")
    Path(names[12]).write_bytes(Path(names[0]).read_bytes()[:4000])
    (tmp_path / "list.csv").write_text("".join(f"{name},{i % 3}\n" for i, name in enumerate(names)))
    register_csv("test", tmp_path / "list.csv")
    return names


def places(clip):
    """Frame numbers (T,), columns and rows of a coded clip; check that all frames share these."""
    assert clip.dtype == torch.uint8
    numbers, x, y = clip.numpy()
    np.testing.assert_array_equal(numbers, np.broadcast_to(numbers[:, :1, :1], numbers.shape))
    np.testing.assert_array_equal(x, np.broadcast_to(x[:1, :1], x.shape))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:1, :, :1], y.shape))
    return numbers[:, 0, 0].tolist(), x[0, 0].tolist(), y[0, :, 0].tolist()


def test_training_clips(cfg, coded_video):
    record = {"file_name": coded_video(14), "label": 2}
    mapper = VideoMapper(cfg, is_train=True)
    np.random.seed(0)
    starts, lefts, tops, flips = set(), set(), set(), 0
    for _ in range(150):
        clip = mapper(record)
        assert (clip["label"], clip["file_name"]) == (2, record["file_name"])
        numbers, x, y = places(clip["video"])
        flipped = x[0] > x[-1]
        assert numbers == [numbers[0] + 3 * i for i in range(4)]
        assert x[:: -1 if flipped else 1] == list(range(min(x), min(x) + 40))
        assert y == list(range(y[0], y[0] + 32))
        starts.add(numbers[0])
        lefts.add(min(x))
        tops.add(y[0])
        flips += flipped
    assert starts == {0, 1, 2}  # the span is 12
    assert {min(lefts), max(lefts), min(tops), max(tops)} == {0, 24, 16}
    assert 50 < flips < 100  # 75 +- 4 standard deviations

    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED = "none", False
    _, x, y = places(VideoMapper(cfg, is_train=True)(record)["video"])
    assert (x, y) == (list(range(64)), list(range(48)))
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (30, 33), "range"
    mapper = VideoMapper(cfg, is_train=True)
    # 64/48 of the shorter side, truncated
    sizes = {tuple(mapper(record)["video"].shape[2:]) for _ in range(60)}
    assert sizes == {(30, 40), (31, 41), (32, 42), (33, 44)}


def test_views(cfg, coded_video):
    cfg.TEST.VIEWS.NUM_CLIPS = 5
    cfg.INPUT.FORMAT = "BGR"
    views = VideoMapper(cfg, is_train=False)({"file_name": coded_video(20), "label": 1})
    expected = [[(start + 3 * i) % 20 for i in range(4)] for start in (0, 4, 8, 12, 16)]
    assert views["frames"].tolist() == expected
    assert views["crops"].tolist() == [[0, 0, 48, 48], [0, 8, 48, 48], [0, 16, 48, 48]]
    # Each frame once: 0 3 6 9, 4 7 10 13, 8 11 14 17, 12 15 18 1, 16 19 2 5 are all of them.
    assert views["video"].shape == (3, 20, 48, 64)
    for clip, numbers in zip(views["clips"], expected):
        assert places(views["video"][:, clip].flip(0))[0] == numbers

    # From 0.45 to before 1.2 seconds, at 10 frames a second: frames 5 to 11.
    part = {"file_name": coded_video(20), "label": 1, "start": 0.45, "end": 1.2}
    frames = VideoMapper(cfg, is_train=False)(part)["frames"]
    starts = (5, 6, 7, 9, 10)  # 5 + int(7 / 5 * k)
    assert frames.tolist() == [[5 + (s - 5 + 3 * i) % 7 for i in range(4)] for s in starts]
    clip = VideoMapper(cfg, is_train=True)({**part, "end": 1.7})["video"]
    assert places(clip.flip(0))[0] == [5, 8, 11, 14]  # the only 12 frames are 5 to 16
    rounded = {"file_name": coded_video(20, fps=30), "label": 1, "start": 0.066667}  # 2 / 30
    assert VideoMapper(cfg, is_train=False)(rounded)["frames"][0, 0] == 2
    part = {"file_name": coded_video(20), "label": 1, "start": 2.0, "end": 3}
    assert VideoMapper(cfg, is_train=False)(part) == {
        "file_name": part["file_name"],
        "label": 1,
        "error": f"{part['file_name']}: no frame from 2.0 to 3 seconds; the last one is at 1.90",
    }


def test_actions_label_the_frames_they_last(cfg, coded_video):
    actions = ((7, 0.0, 0.25), (2, 1.05, 1.25), (5, 1.0, 0.5))
    record = {"file_name": coded_video(14), "label": (2, 5, 7), "actions": actions}
    mapper, seen = VideoMapper(cfg, is_train=True), {}
    for _ in range(40):
        clip = mapper(record)
        seen[places(clip["video"])[0][0]] = clip["label"]
    # Frames 0 3 6 9, 1 4 7 10, 2 5 8 11, in tenths of a second; action 2 is at 11 and 12 only.
    assert seen == {0: (7,), 1: (7,), 2: (2, 7)}
    assert VideoMapper(cfg, is_train=False)(record)["label"] == (2, 5, 7)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "INPUT.CROP.TYPE",
            "relative_range",
            r"must be one of \['absolute'\], got 'relative_range'",
        ),
        (
            "INPUT.RANDOM_FLIP",
            "vertical",
            r"must be one of \['horizontal', 'none'\], got 'vertical'",
        ),
        ("INPUT.FORMAT", "YUV", r"must be one of \['RGB', 'BGR'\], got 'YUV'"),
        (
            "INPUT.MIN_SIZE_TRAIN_SAMPLING",
            "any",
            r"must be one of \['range', 'choice'\], got 'any'",
        ),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", r"MIN_SIZE_TRAIN must be .* got \(48,\)"),
        ("INPUT.CROP.SIZE", [50, 49], r"must not be larger .* INPUT.MIN_SIZE_TRAIN is \(48,\)"),
        ("INPUT.CLIP.STRIDE", 0, "must be at least 1, got 0"),
        ("TEST.VIEWS.STARTS", "middle", "must be one of .* got 'middle'"),
        ("TEST.VIEWS.NUM_CLIPS", 0, "must be at least 1, got 0"),
        ("TEST.VIEWS.CROP_SIZE", 49, "larger than a frame of 48x48: raise INPUT.MIN_SIZE_TEST"),
    ],
)
def test_wrong_values_of_keys(cfg, key, value, message):
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=rf"{key}.*{message}|{message}"):
        VideoMapper(cfg, is_train=not key.startswith("TEST"))


def test_cache(cfg, coded_video):
    names = [coded_video(14, name=f"{i}.mp4") for i in range(3)]
    cfg.DATALOADER.CACHE_VIDEOS = 2
    train, test = VideoMapper(cfg, is_train=True), VideoMapper(cfg, is_train=False)
    cached = VideoMapper(cfg, is_train=False)({"file_name": names[0], "label": 0})["video"]
    assert cache.open_video(names[0], 2) is cache.open_video(names[0], 2)
    cfg.DATALOADER.CACHE_VIDEOS = 0
    decoded = VideoMapper(cfg, is_train=False)({"file_name": names[0], "label": 0})["video"]
    assert torch.equal(cached, decoded)
    for mapper, name in ((train, names[1]), (test, names[0]), (train, names[2])):
        mapper({"file_name": name, "label": 0})
    assert [key[0] for key in cache._videos] == [names[0], names[2]]  # used last
    video = cache.open_video(names[0], 2)
    os.utime(names[0], (0, 0))  # as if replaced
    assert cache.open_video(names[0], 2) is not video


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_videos_are_named_once_and_capped(cfg, data_set, workers, caplog):
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(cfg)
    loader.max_unreadable = 0.15
    with caplog.at_level(logging.WARNING, "nl_detectron"):
        clips = [clip for _, batch in zip(range(30), loader) for clip in batch]
    broken = [data_set[i] for i in (3, 7, 12)]
    assert {clip["file_name"] for clip in clips} == {*data_set} - {*broken}
    for name in broken:
        assert caplog.text.count(f"Not used for training: {name}: ") == 1

    loader.max_unreadable, loader.unreadable = 0.1, {}
    message = (
        r"^3 of 20 training files .*--max-bad-images 0.1 allows: (\S+(03|07|12).mp4: [^;]*;? ?){3}$"
    )
    with pytest.raises(ValueError, match=message):
        list(zip(range(30), loader))


def test_testing_swaps_no_video(cfg, data_set):
    results = [batch[0] for batch in build_test_loader(cfg, "test")]
    assert [result["file_name"] for result in results] == data_set
    assert [result["label"] for result in results] == [i % 3 for i in range(20)]
    assert [i for i, result in enumerate(results) if "error" in result] == [3, 7, 12]
    assert all(data_set[i] in results[i]["error"] for i in (3, 7, 12))
    assert all("video" in result for i, result in enumerate(results) if i not in (3, 7, 12))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_decides_every_batch(cfg, data_set, workers):
    cfg.DATALOADER.NUM_WORKERS = workers

    def batches(seed, start=0):
        cfg.SEED = seed
        loader = build_train_loader(cfg)
        loader.start, loader.max_unreadable = start, 1.0
        numbers = range(start, 7)
        batches = [[c["file_name"] for c in batch] for _, batch in zip(numbers, loader)]
        clips = [clip["video"] for _, batch in zip(numbers, loader) for clip in batch]
        return batches, torch.stack(clips).reshape(len(numbers), -1)

    names, videos = batches(5)
    again, same_videos = batches(5)
    assert names == again
    assert torch.equal(videos, same_videos)
    assert names != batches(6)[0]
    for start in (3, 4):
        later, later_videos = batches(5, start)
        assert later == names[start:]
        assert torch.equal(later_videos, videos[start:])


def test_speed(cfg, data_set):
    cfg.DATALOADER.NUM_WORKERS = 2
    loader = build_train_loader(cfg)
    loader.max_unreadable = 1.0
    speed = benchmark_loader(loader, seconds=0.2)
    assert speed.clips % 4 == 0
    assert speed.seconds >= 0.2
    total, each = speed.clips / speed.seconds, speed.clips / speed.seconds / 2
    assert str(speed).endswith(f"{total:.2f} clips/s with 2 workers, {each:.2f} per worker")


def test_memory_is_flat(cfg, coded_video):
    """A leak of one decoder context or decoded clip per video would be 100 kB and more."""
    record = {"file_name": coded_video(20), "label": 0}
    mapper, sizes = VideoMapper(cfg, is_train=True), []
    for count in range(600):
        if count % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
        mapper(record)
    assert sizes[-1] - sizes[1] < 4e6  # 400 clips
