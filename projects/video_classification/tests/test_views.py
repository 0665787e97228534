"""Views of a video: a loop over clips, crops and windows of the map says what they must score."""

from __future__ import annotations

import itertools

import pytest
import torch
from detectron2.modeling import build_model
from torch.testing import assert_close
from video_classification.views import MultiViewClassifier

WINDOW = 2


def window_scores(model, view, activation):
    """One view (3, T, h, w): every window of the map by itself, then the mean over windows."""
    x = (view[None].float() - 114.75) / 57.375
    (feature,) = model.backbone(x)["res5"]  # C, T, H, W
    linear, found = model.head.linear, []
    _, frames, height, width = feature.shape
    for top, left in itertools.product(range(height - WINDOW + 1), range(width - WINDOW + 1)):
        total = torch.zeros(feature.shape[0])
        for t, y, x in itertools.product(range(frames), range(WINDOW), range(WINDOW)):
            total += feature[:, t, top + y, left + x]
        found.append(activation(linear.weight @ (total / (frames * WINDOW**2)) + linear.bias))
    return sum(found) / len(found)


def softmax(logits):
    return logits.exp() / logits.exp().sum()


def sigmoid(logits):
    return 1 / (1 + (-logits).exp())


@pytest.fixture
def model(video_cfg, randomize):
    video_cfg.MODEL.VIDEO.HEAD.POOL_SIZE = WINDOW
    return randomize(build_model(video_cfg)).eval()


@pytest.fixture
def video():
    """Six frames, two clips of three, and two crops: 97 x 101 pixels become a map of 4 x 4."""
    return {
        "video": torch.randint(0, 256, (3, 6, 103, 109), dtype=torch.uint8),
        "clips": torch.tensor([[0, 2, 4], [5, 5, 1]]),
        "crops": torch.tensor([[0, 8, 97, 101], [6, 3, 97, 101]]),
    }


@pytest.mark.parametrize("activation", [softmax, sigmoid])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_views_are_those_of_a_loop(batch_size, activation, model, video):
    model.head.multi_label = activation is sigmoid
    expected = []
    for frames, (y, x, h, w) in itertools.product(video["clips"], video["crops"].tolist()):
        view = torch.stack([video["video"][:, i, y : y + h, x : x + w] for i in frames], dim=1)
        expected.append(window_scores(model, view, activation))
    views = MultiViewClassifier(model, batch_size)
    broken, found = views([{"error": "no frames"}, video])
    assert broken == {"error": "no frames"}
    assert_close(found["scores"], torch.stack(expected))
    # Averaging logits first, or pooling the whole map, gives other scores.
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_one_window(model, video):
    """A map as large as the window, and a smaller one: the mean over the map, as without windows.

    With several windows, the logits are their mean.
    """
    clips = video["video"][None, :, :4]
    for size in (17, 33, 65):
        crop = clips[..., :size, :size]
        logits = model(crop)
        same = torch.allclose(model.scores(crop)[0], softmax(logits[0]), rtol=1e-5)
        assert same == (size < 65)  # where there are several windows, each has its softmax
        model.head.pool_size = 0
        whole = model(crop)
        model.head.pool_size = WINDOW
        assert torch.equal(logits, whole) == (size < 65)
    (feature,) = model.features(crop)  # 3 x 3
    corners = [feature[:, :, y : y + 2, x : x + 2].mean((1, 2, 3)) for y in (0, 1) for x in (0, 1)]
    expected = model.head.linear(torch.stack(corners).mean(0))
    assert_close(model(crop)[0], expected)


def test_mode_is_the_models(model, video):
    """detectron2 restores the mode of what it tests: the wrapped model's."""
    assert not MultiViewClassifier(model).training
    assert MultiViewClassifier(model.train()).training
    with pytest.raises(ValueError, match=r"TEST\.VIEWS\.BATCH_SIZE\) must be 1 or more, got 0"):
        MultiViewClassifier(model, 0)
