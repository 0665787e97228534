"""predict_video: the evaluation's scores, windows of long videos, features, pictures, mistakes."""

from __future__ import annotations

import importlib.util
import json
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from video_classification.data import VideoMapper, VideoReader, register_folder, write_video
from video_classification.drawing import draw_strip, overlay
from video_classification.predictor import Prediction, VideoPredictor
from video_classification.results import Results
from video_classification.trainer import VideoTrainer
from video_classification.views import MultiViewClassifier
from video_classification.windows import camera_frames, sliding_windows

from nl_detectron.engine.frames import Video

PROJECT = Path(__file__).parents[1]
FPS, CLASSES = 10, ["bow", "nod", "wave"]


@pytest.fixture
def cfg(video_cfg):
    """Two clips of four frames, and three crops with 2 x 2 windows in maps of 3 x 3."""
    video_cfg.INPUT.CLIP.NUM_FRAMES, video_cfg.INPUT.CLIP.STRIDE = 4, 2
    video_cfg.INPUT.MIN_SIZE_TEST, video_cfg.TEST.VIEWS.CROP_SIZE = 96, 96
    video_cfg.TEST.VIEWS.NUM_CLIPS, video_cfg.TEST.VIEWS.STARTS = 2, "slowfast"
    video_cfg.MODEL.VIDEO.HEAD.POOL_SIZE = 2
    video_cfg.DATALOADER.NUM_WORKERS = 0
    return video_cfg


@pytest.fixture
def model(cfg, randomize):
    return randomize(build_model(cfg)).eval()


def noise(count, seed=0, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


@pytest.fixture
def files(cfg, model, tmp_path):
    """The model on disk, and a data set of three videos and a broken one."""
    torch.save(
        {"model": model.state_dict(), "metadata": {"classes": CLASSES}}, tmp_path / "model.pth"
    )
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for seed, name in enumerate(CLASSES):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_video(tmp_path / "data" / name / f"{name}.mp4", noise(19 + seed, seed), FPS, crf=0)
    (tmp_path / "data" / "bow" / "broken.mp4").write_bytes(b"\0" * 99)
    return tmp_path


@pytest.fixture
def predict(files):
    """Runs predict_video; returns the videos in its JSON, by the stems of their names."""
    spec = importlib.util.spec_from_file_location("predict_video", PROJECT / "predict_video.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def predict(name, *options):
        given = ["--config-file", files / "config.yaml", "--weights", files / "model.pth"]
        given += ["--input", name if name.startswith("webcam") else files / name]
        script.main([str(word) for word in [*given, "--json", files / "out.json", *options]])
        videos = json.loads((files / "out.json").read_text())["videos"]
        return {Path(video["file_name"]).stem: video for video in videos}

    return predict


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_scores_are_those_of_the_evaluation(combine, cfg, model, files, predict):
    cfg.TEST.VIEWS.COMBINE, cfg.OUTPUT_DIR = combine, str(files / "evaluation")
    cfg.DATASETS.TEST, cfg.TEST.MAX_UNREADABLE = ("predicted",), 0.5
    register_folder("predicted", files / "data")
    VideoTrainer.test(cfg, model)
    (results,) = (files / "evaluation").rglob("results.json")
    expected = json.loads(results.read_text())["predictions"]
    assert len(expected) == 3
    for video in expected:
        stem = Path(video["file_name"]).stem
        found = predict(f"data/{stem}/{stem}.mp4", "TEST.VIEWS.COMBINE", combine)[stem]
        assert [top["class"] for top in found["top5"]] == [top["class"] for top in video["top5"]]
        for ours, theirs in zip(found["top5"], video["top5"]):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)


def test_folder_with_a_broken_video(files, predict, capsys):
    found = predict("data/bow", "--output", files / "out", "--features", files / "f.npz")
    printed = capsys.readouterr()
    assert "1 videos done, 1 skipped" in printed.out
    assert printed.err.count("broken.mp4: ") == 1
    assert "broken.mp4: " in found["broken"]["error"]
    assert "top5" not in found["broken"]
    best = found["bow"]["top5"][0]
    assert f"bow.mp4: {best['class']} {best['score']:.1%}, " in printed.out
    assert [file.name for file in (files / "out").iterdir()] == ["bow.png"]
    features = np.load(files / "f.npz")
    assert features["file_names"].tolist() == [str(files / "data" / "bow" / "bow.mp4")] * 6
    # 19 frames: 11 more than the span of a clip, so the second one starts at 5.5
    seconds = [[0.0, 0.7]] * 3 + [[0.5, 1.2]] * 3
    np.testing.assert_allclose(features["seconds"], seconds)


def test_features_of_views(cfg, model, files):
    """By loops over the positions of the last map that each window of the head has."""
    found = VideoPredictor(cfg, str(files / "model.pth"))(files / "data" / "nod" / "nod.mp4")
    path = str(files / "data" / "nod" / "nod.mp4")
    views = VideoMapper(cfg, is_train=False)({"file_name": path, "label": 0})
    expected = []
    for clip in views["clips"]:
        for y, x, h, w in views["crops"]:
            view = views["video"][None, :, clip, y : y + h, x : x + w]
            with torch.no_grad():
                (x5,) = model.backbone((view - 114.75) / 57.375)["res5"]
            assert x5.shape[1:] == (4, 3, 3)
            windows = [
                torch.stack([x5[:, :, i + p, j + q] for p in range(2) for q in range(2)]).mean(0)
                for i in range(2)
                for j in range(2)
            ]
            expected.append(torch.stack(windows).mean(0).mean(1))
    np.testing.assert_allclose(found.features, torch.stack(expected), rtol=1e-4, atol=1e-6)


def test_windows(cfg, model, files, predict):
    """Each is scored as the same part of a file would be that a list of videos names."""
    frames = noise(40, 7)
    write_video(files / "long.mp4", frames, FPS, crf=0)
    options = "--window", 1.5, "--step", 1, "--features", files / "f.npz", "--output", files / "out"
    windows = predict("long.mp4", *options)["long"]["windows"]
    spans = [[0, 1.5], [1, 2.5], [2, 3.5], [2.5, 4]]
    np.testing.assert_allclose([[w["start"], w["end"]] for w in windows], spans)
    mapper, classifier = VideoMapper(cfg, is_train=False), MultiViewClassifier(model)
    for window in windows:
        part = {"start": window["start"], "end": window["end"]}
        record = {"file_name": str(files / "long.mp4"), "label": 0, **part}
        scores = classifier([mapper(record)])[0]["scores"].mean(0).tolist()
        for top in window["top5"]:
            assert top["score"] == pytest.approx(scores[CLASSES.index(top["class"])], abs=1e-6)
    features = np.load(files / "f.npz")
    np.testing.assert_allclose(features["seconds"], spans)
    head = torch.nn.functional.linear(
        torch.from_numpy(features["features"]), model.head.linear.weight, model.head.linear.bias
    )
    views = mapper({"file_name": str(files / "long.mp4"), "label": 0, "start": 1.0, "end": 2.5})
    logits = [
        model(views["video"][None, :, clip, y : y + h, x : x + w])[0]
        for clip in views["clips"]
        for y, x, h, w in views["crops"]
    ]
    torch.testing.assert_close(head[1], torch.stack(logits).mean(0), rtol=1e-4, atol=1e-5)

    with av.open(files / "out" / "long.mp4") as film:
        (stream,) = film.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    film = VideoReader(files / "out" / "long.mp4")
    assert (film.num_frames, film.fps) == (40, FPS)


def seconds_of(frames):
    return [(k / FPS, np.full((2, 2, 3), k, dtype=np.uint8)) for k in frames]


@pytest.mark.parametrize(
    ("frames", "length", "step", "expected"),
    [
        (range(40), 1.5, 1, [(0, 0, 14), (1, 10, 24), (2, 20, 34), (2.5, 25, 39)]),
        (range(40), 2, 2, [(0, 0, 19), (2, 20, 39)]),
        (range(41), 2, 2, [(0, 0, 19), (2, 20, 39), (2.1, 21, 40)]),
        (range(60), 1, 3, [(0, 0, 9), (3, 30, 39)]),  # with gaps
        (range(33), 1, 3, [(0, 0, 9), (2.3, 23, 32)]),
        (range(7), 2, 1, [(0, 0, 6)]),
        (range(1), 2, 2, [(0, 0, 0)]),
        ([0, 1, 2, 50, 51], 1, 1, [(0, 0, 2), (4.2, 50, 51)]),  # a pause
        ([], 1, 1, []),
    ],
)
def test_which_frames_are_in_a_window(frames, length, step, expected):
    found = list(sliding_windows(seconds_of(frames), length, step))
    for window, (start, first, last) in zip(found, expected, strict=True):
        assert window.start == pytest.approx(start)
        assert window.end - window.start <= length + 1e-9
        numbers = [int(frame[0, 0, 0]) for frame in window.frames]
        assert numbers == [k for k in frames if first <= k <= last]
        np.testing.assert_allclose(window.times, np.array(numbers) / FPS)


def test_long_videos_are_not_kept_in_memory():
    alive, most = weakref.WeakSet(), 0

    class Frame(np.ndarray):
        __hash__ = object.__hash__

    def frames():
        nonlocal most
        for k in range(1000):
            frame = np.zeros((2, 2, 3), dtype=np.uint8).view(Frame)
            alive.add(frame)
            most = max(most, len(alive))
            yield k / FPS, frame
            del frame

    for window in sliding_windows(frames(), 2, 1):
        assert len(window.frames) == 20
        del window
    assert 20 <= most < 50


def test_webcam_frames(tmp_path):
    """As OpenCV reads a file, for want of a camera."""
    color = np.full((40, 64, 48, 3), (250, 120, 10), dtype=np.uint8)
    write_video(tmp_path / "color.mp4", color, FPS)
    times, frames = zip(*camera_frames(Video(str(tmp_path / "color.mp4"))))
    assert times[0] == 0
    assert list(times) == sorted(times)
    assert len(frames) == 40
    np.testing.assert_allclose(frames[7].mean((0, 1)), (250, 120, 10), atol=6)


def test_results_are_kept_when_stopped(tmp_path):
    found = Prediction(np.array([0.1, 0.7, 0.2]), np.ones((2, 5)), *[np.zeros((2, 4), int)] * 2)

    def stop():
        with Results(CLASSES, tmp_path / "a.json", tmp_path / "a.npz") as results:
            results.add("a.mp4", found)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    (video,) = json.loads((tmp_path / "a.json").read_text())["videos"]
    assert [top["class"] for top in video["top5"]] == ["nod", "wave", "bow"]
    assert np.load(tmp_path / "a.npz")["features"].shape == (2, 5)


def test_strip():
    top = [("shaking hands", 0.75), ("a name that is much too long for a figure", 0.25)]
    frames = [np.full((48, 64, 3), k, dtype=np.uint8) for k in (10, 20)]
    figure = draw_strip(frames, [0.0, 1.25], top, "a$b$.mp4")
    figure.canvas.draw()
    assert [int(axes.images[0].get_array().mean()) for axes in figure.axes[:2]] == [10, 20]
    assert [axes.texts[0].get_text() for axes in figure.axes[:2]] == ["0.0 s", "1.2 s"]
    bars = figure.axes[2]
    assert [bar.get_width() for bar in bars.patches] == [0.75, 1, 0.25, 1]
    assert [text.get_text() for text in bars.texts] == [
        *("shaking hands", "75.0%", "a name that is much too…", "25.0%")
    ]
    for text in (*figure.texts, *bars.texts):
        box, whole = text.get_window_extent(), figure.bbox
        assert 0 <= box.x0 < box.x1 <= whole.x1
        assert 0 <= box.y0 < box.y1 <= whole.y1


def test_scores_over_a_video():
    """Of the window with the nearest center: 1.0 or 2.5 s, so the first one up to 1.75 s."""
    gray = np.full((240, 320, 3), 128, dtype=np.uint8)
    windows = [(0.0, 2.0, [("a", 1.0)]), (2.0, 3.0, [("b", 0.0)])]
    frames = list(overlay([(k / 8, gray) for k in range(24)], windows))
    assert frames[0].shape == gray.shape
    shown = [tuple(frame[-15, 60]) for frame in frames]  # under the bar, if it is there
    assert len(set(shown[:14])) == len(set(shown[15:])) == 1
    assert shown[0] == (0x35, 0x72, 0xB0)
    assert max(shown[15]) < 64
    assert (frames[0][:, 200:] == 128).all()
    assert (frames[0][:150] == 128).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("data/bow/none.mp4", "", "no video of .*none.mp4 could be processed"),
        ("data/bow/broken.mp4", "--window 1", "no video of .*broken.mp4 could be processed"),
        ("data", "", r"data contains no video \(.avi"),
        ("config.png", "", "needs a video .* got .*config.png"),
        ("data/bow", "MODEL.VIDEO.NUM_BLOCKS (1,1,1,1)", "model.pth: .* another depth"),
        ("data/bow", "MODEL.VIDEO.HEAD.NUM_CLASSES 4", "model.pth has 3 names .* is 4"),
        ("data/bow", "--classes {}/names.txt", "names.txt has 2 names .* is 3"),
        (
            "data/bow",
            "TEST.VIEWS.COMBINE median",
            "TEST.VIEWS.COMBINE. must be one of .* got 'median'",
        ),
        ("webcam:99", "--window 1", "or a webcam .* got webcam:99"),
        ("data/bow", "--output {}/data/bow --window 1", "would overwrite the input"),
    ],
)
def test_mistakes(name, options, message, files, predict):
    (files / "names.txt").write_text("bow\nnod\n")
    with pytest.raises(SystemExit, match=message):
        predict(name, *options.format(files).split())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("data/bow", "--step 1", "--step needs --window"),
        ("data/bow", "--window 0", "must be more than 0 seconds, got '0'"),
        ("webcam", "", "a webcam needs --window"),
        ("webcam", "--window 1 --output x", "has no --output"),
        ("data/bow", "--features x.npy", "--features must end with .npz, got x.npy"),
    ],
)
def test_mistakes_in_arguments(name, options, message, predict, capsys):
    with pytest.raises(SystemExit) as stop:
        predict(name, *options.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
