"""Figures: colours, arrows and texts are where the weights say, and nothing is cropped.

Expected places are computed by hand, expected colours are matplotlib's own.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from numpy.testing import assert_allclose
from PIL import Image

from nl_detectron.analysis.drawing.canvas import COLUMN, GAP, TWO_COLUMNS, Detection, FigureData
from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map, save_image_grid
from nl_detectron.analysis.drawing.strip import choose_frames
from nl_detectron.analysis.geometry import AttentionMap, FeatureGrid

HEIGHT, WIDTH = 40, 60
SHIFT = WIDTH + GAP  # from one frame to the next
BOTH = pytest.mark.parametrize("draw", [draw_heat_map, draw_arrows])


def subject(weights, query=(5.0, 7.0, 0), grid=None, frame=None, **kwargs):
    """Keys of 16 x 12 on black frames; the last column is all padding, the last row half."""
    weights = np.asarray(weights, dtype=float)
    boxes = (grid or FeatureGrid(16.0, 12.0)).boxes(*weights.shape[1:])
    if frame is None:
        frame = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    height, width = frame.shape[:2]
    attention = AttentionMap(weights, boxes.clip(0, [width, height] * 2), query)
    return FigureData([frame] * len(weights), attention, **kwargs)


def keys(frames=1, **weights):
    """Weights by place: ``_1_2=0.8`` in row 1, column 2 (of the last frame); all others are 0."""
    array = np.zeros((frames, 4, 5))
    for place, weight in weights.items():
        array[(-1, *map(int, place[1:].split("_")))] = weight
    return array


def rgb(figure):
    """The pixels of a figure."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def image_pixels(figure):
    """The pixels of the image in it, resized to ten per pixel of the image."""
    pixels, box = rgb(figure), figure.axes[0].get_window_extent()
    top, bottom = (round(len(pixels) - y) for y in (box.y1, box.y0))
    part = Image.fromarray(pixels[top:bottom, round(box.x0) : round(box.x1)].astype(np.uint8))
    (x0, x1), (y1, y0) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
    size = (round(10 * (x1 - x0)), round(10 * (y1 - y0)))
    return np.asarray(part.resize(size)).astype(int)


def overlay(figure, x, y, t=0):
    """RGBA of the colours at a point of the frame, before they are laid over the image."""
    image = figure.axes[0].images[len(figure.axes[0].images) // 2 + t]
    array, (left, right, bottom, top) = image.get_array(), image.get_extent()
    row, column = (y - top) / (bottom - top), (x - left) / (right - left)
    return array[int(row * array.shape[0]), min(int(column * array.shape[1]), len(array[0]) - 1)]


def inferno(place):
    return matplotlib.colormaps["inferno"](0.25 + 0.75 * place)[:3]


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def arrows(figure):
    """Start and end of each arrow, the strongest first, and its patch."""
    found = [text for text in figure.axes[0].texts if text.arrow_patch is not None]
    return [(text.xyann, text.xy, text.arrow_patch) for text in reversed(found)]


class TestHeatMap:
    @pytest.mark.parametrize(
        ("place", "box"),
        [("_0_0", (0, 0, 16, 12)), ("_1_2", (32, 12, 48, 24)), ("_3_3", (48, 36, 60, 40))],
    )
    def test_colour_is_on_the_key(self, place, box):
        """Without interpolation; black was made grey. The outline is on its border."""
        shown = subject(keys(**{place: 0.8}), query=(90.0, 90.0, 0))
        pixels = image_pixels(draw_heat_map(shown, smooth=False))
        y, x = np.argwhere(pixels[..., 0] > pixels[..., 2] + 20).T / 10  # yellow
        assert_allclose([x.min(), y.min(), x.max(), y.max()], box, atol=0.8)
        x0, y0, x1, y1 = (10 * side for side in box)
        inside = pixels[y0 + 15 : y1 - 15, x0 + 15 : x1 - 15]
        assert (np.ptp(inside, axis=(0, 1)) <= 2).all()

    def test_colours_are_logarithmic(self):
        """From a thousandth of the largest weight to the largest, in steps of ten."""
        weights = keys(_0_0=0.3, _0_1=0.03, _0_2=0.003, _1_0=0.0003, _1_1=0.00001, _1_2=0.0)
        figure = draw_heat_map(subject(weights), smooth=False)
        for place, (x, y) in zip(
            (1, 2 / 3, 1 / 3, 0, 0, 0), ((8, 6), (24, 6), (40, 6), (8, 18), (24, 18), (40, 18))
        ):
            assert_allclose(overlay(figure, x, y)[:3], inferno(place), atol=0.01)
        opacity = [overlay(figure, x, 6)[3] for x in (8, 24, 40, 56)]
        assert opacity == sorted(opacity, reverse=True)
        assert opacity[3] == 0  # no weight: the image alone

    def test_places_on_the_scale_are_interpolated(self):
        """Half-way between the centres of 0.1 and 0.001 the colour is that of 0.01."""
        weights = np.full((1, 4, 5), 0.001)
        weights[0, :, 2] = 0.1
        figure = draw_heat_map(subject(weights))
        for x, place in ((24, 0), (28, 0.25), (32, 0.5), (36, 0.75), (40, 1), (54, 0), (60, 0)):
            for y in (0.1, 20, 39.9):  # the same down to the borders
                assert_allclose(overlay(figure, x, y)[:3], inferno(place), atol=0.04)

    def test_flat_map_has_the_colours_of_the_middle(self):
        """One decade around 0.0020 to 0.0022: nothing in it looks large or small."""
        weights = np.linspace(0.0020, 0.0022, 20).reshape(1, 4, 5)
        figure = draw_heat_map(subject(weights))
        for x, y in ((8, 6), (54, 38)):
            assert_allclose(overlay(figure, x, y)[:3], inferno(0.5), atol=0.04)

    def test_object_below_the_largest_weight_is_seen(self):
        """A chequered image keeps a third of its contrast there."""
        frame = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        frame[(np.indices((HEIGHT, WIDTH)).sum(axis=0) // 2 % 2).astype(bool)] = 255
        figure = draw_heat_map(subject(keys(_1_2=0.99), query=(90.0, 90.0, 0), frame=frame))
        pixels = image_pixels(figure)
        below, beside = pixels[140:220, 345:455], pixels[140:220, 20:130]
        assert below.std(axis=(0, 1)).min() > beside.std(axis=(0, 1)).max() / 3

    def test_weights_in_the_padding_do_not_dim_the_image(self):
        expected = image_pixels(draw_heat_map(subject(keys(_1_2=0.8))))
        figure = draw_heat_map(subject(keys(_1_2=0.8, _1_4=70.0)))
        assert np.array_equal(image_pixels(figure), expected)

    def test_frames_side_by_side(self):
        """The strongest key, half of it in the padding, is outlined."""
        weights = keys(3, _3_2=0.25)
        figure = draw_heat_map(subject(weights, query=(5.0, 7.0, 1)), smooth=False)
        assert_allclose(overlay(figure, 2 * SHIFT + 40, 38, t=2)[:3], inferno(1), atol=0.01)
        assert overlay(figure, SHIFT + 40, 38, t=1)[3] == 0
        (query,), (outline,) = figure.axes[0].lines, figure.axes[0].patches
        assert query.get_xydata().tolist() == [[SHIFT + 5, 7]]
        assert outline.get_bbox().bounds == (2 * SHIFT + 32, 36, 16, 4)
        assert legend(figure) == ["query", "strongest key, weight 0.25"]
        assert [t.get_text() for t in figure.axes[0].texts] == ["t = 0", "t = 1", "t = 2"]

    def test_some_of_the_frames(self):
        """Weights in the others count in the shares."""
        weights = keys(4, _0_1=0.03)
        weights[1, 0, 0], weights[0, 2, 2], weights[2, 3, 3] = -0.06, 0.2, 0.01
        shown = subject(weights[:2], query=(5.0, 7.0, 3), labels=("frame 8", "frame 24"))
        whole = replace(shown.attention, weights=weights)
        shown = shown._replace(attention=whole.select([1, 3]))
        heat, arrow = draw_heat_map(shown), draw_arrows(shown)
        assert legend(heat)[1] == "strongest key in these frames, weight -0.06"
        assert legend(arrow)[1] == (
            "top 2 of 40 keys in these frames: 30% of the weight, 70% in other frames"
        )
        assert [ends for *ends, _ in arrows(arrow)] == [
            [(SHIFT + 5, 7), (8, 6)],
            [(SHIFT + 5, 7), (SHIFT + 24, 6)],
        ]
        texts = [t.get_text() for t in heat.axes[0].texts]
        assert texts == ["frame 8", "frame 24"]

    def test_view_shows_a_part(self):
        grid = FeatureGrid(2.0, 2.0, left=20.0, top=10.0)
        figure = draw_heat_map(subject(keys(_0_0=1.0), grid=grid, crop=(18.0, 8.0, 33.0, 20.0)))
        assert figure.axes[0].get_xlim() == (18, 33)
        assert figure.axes[0].get_ylim() == (20, 8)
        assert figure.axes[0].images[1].get_extent() == [20, 30, 18, 10]

    def test_signs(self):
        """Dot product: 0 is the middle, and opposite weights have the map's opposite colours."""
        figure = draw_heat_map(subject(keys(_0_0=0.3, _0_1=-0.3, _0_2=-0.1)), smooth=False)
        ends = matplotlib.colormaps["PuOr"]([0.0, 1.0])[:, :3]
        assert_allclose(overlay(figure, 24, 6)[:3], ends[0], atol=0.01)
        assert_allclose(overlay(figure, 8, 6)[:3], ends[1], atol=0.01)
        assert overlay(figure, 40, 30)[3] == 0
        labels = [label.get_text() for label in figure.axes[1].get_xticklabels()]
        assert labels == ["-0.3", "-0.03", "0", "0.03", "0.3"]


@pytest.mark.parametrize(
    ("low", "high", "ticks", "patches"),
    [
        (0.001, 0.1, ["0.001", "0.01", "0.1"], 0),
        (0.003, 0.06, ["0.005", "0.01", "0.02", "0.05"], 0),
        (1e-9, 0.5, ["0.001", "0.01", "0.1"], 1),  # a triangle: there are weights below
    ],
)
@BOTH
def test_colour_bar(draw, low, high, ticks, patches):
    weights = np.full((1, 4, 5), low)
    weights[0, 1, 2] = high
    bar = draw(subject(weights)).axes[1]
    assert [label.get_text() for label in bar.get_xticklabels()] == ticks
    assert_allclose(bar.get_xticks(), [float(tick) for tick in ticks])
    assert bar.get_xlabel() == "attention weight (logarithmic scale)"
    assert len(bar.patches) == patches


@BOTH
def test_no_weight_at_all(draw):
    figure = draw(subject(keys()))
    rgb(figure)
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["0", "1"]
    assert arrows(figure) == []


@BOTH
def test_wrong_number_of_frames(draw):
    given = subject(keys(_1_2=0.5))
    with pytest.raises(ValueError, match="frame of the map, 1, got 2"):
        draw(given._replace(frames=given.frames * 2))


class TestArrows:
    def test_until_nine_tenths_of_the_weight(self):
        weights = keys(_1_2=0.5, _0_1=0.3, _3_3=0.14, _2_0=0.04, _2_1=0.02)
        figure = draw_arrows(subject(weights))
        found = arrows(figure)
        assert [ends for *ends, _ in found] == [
            [(5.0, 7.0), (40.0, 18.0)],
            [(5.0, 7.0), (24.0, 6.0)],
            [(5.0, 7.0), (54.0, 38.0)],  # the part in the image: 48 to 60, 36 to 40
        ]
        assert legend(figure) == ["query", "top 3 of 20 keys: 94% of the weight"]
        for property_ in ("get_linewidth", "get_alpha", "get_mutation_scale"):
            sizes = [getattr(patch, property_)() for *_, patch in found]
            assert sizes == sorted(sizes, reverse=True)
            assert len(set(sizes)) == 3
        colours = [patch.get_edgecolor()[:3] for *_, patch in found]
        places = [1, 1 - np.log10(0.5 / 0.3) / 3, 1 - np.log10(0.5 / 0.14) / 3]
        assert_allclose(colours, [inferno(place) for place in places], atol=0.02)

    def test_flat_map_has_few_and_faint_ones(self):
        grid = FeatureGrid(3.0, 3.0)
        figure = draw_arrows(subject(np.full((1, 13, 20), 1 / 260), grid=grid))
        assert len(arrows(figure)) == 20
        assert legend(figure)[1] == "top 20 of 260 keys: 8% of the weight"
        for *_, patch in arrows(figure):
            assert patch.get_linewidth() < 0.6
            assert patch.get_alpha() < 0.35

    @pytest.mark.parametrize(
        ("weights", "query", "ends", "statement"),
        [
            # weights in the padding count, signs do not
            (keys(_1_2=0.25, _1_4=0.75), (5, 7, 0), [(40, 18)], "top 1 of 20 keys: 25%"),
            (keys(_1_2=-0.6, _0_1=0.4), (5, 7, 0), [(40, 18), (24, 6)], "top 2 of 20 keys: 100%"),
            (keys(_0_0=1.0), (8, 6, 0), [(8, 6)], "top 1 of 20 keys: 100%"),  # its own
            (
                keys(3, _1_2=0.8),
                (5, 7, 1),
                [(40 + 2 * (WIDTH + GAP), 18)],
                "top 1 of 60 keys: 100%",
            ),
        ],
    )
    def test_ends(self, weights, query, ends, statement):
        figure = draw_arrows(subject(weights, query=query))
        rgb(figure)
        start = query[0] + query[2] * SHIFT, query[1]
        assert [places for *places, _ in arrows(figure)] == [[start, end] for end in ends]
        assert legend(figure)[1] == f"{statement} of the weight"


class TestLayout:
    TITLE = "backbone.bottom_up.res4.non_local4, query (84, 28)\n" + "long_name_" * 9 + ".png"

    @pytest.mark.parametrize(
        ("height", "width", "frames", "crop"),
        [
            (40, 60, 1, None),
            (160, 576, 1, None),
            (640, 427, 1, None),
            (900, 100, 1, None),
            (40, 60, 3, None),
            (427, 640, 1, (100.0, 50.0, 180.0, 300.0)),
        ],
    )
    @BOTH
    def test_nothing_is_cropped_and_no_texts_meet(self, draw, height, width, frames, crop):
        weights = np.full((frames, 4, 5), -0.00123)
        weights[0, 1, 2] = 0.5
        frame = np.zeros((height, width, 3), dtype=np.uint8)
        grid = FeatureGrid(width / 5, height / 4)
        figure = draw(subject(weights, grid=grid, frame=frame, crop=crop, title=self.TITLE))
        pixels = rgb(figure)
        assert figure.get_figwidth() == (COLUMN if frames == 1 else TWO_COLUMNS)
        outer = [text.get_window_extent() for text in texts(figure)]
        outer += [figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()]
        for box in outer:
            assert min(box.x0, box.y0) >= 0
            assert box.x1 <= pixels.shape[1]
            assert box.y1 <= pixels.shape[0]
        image = figure.axes[0].get_window_extent()
        parts = [figure.texts[0].get_window_extent(), image, figure.axes[1].get_tightbbox()]
        parts.append(figure.legends[0].get_window_extent())
        for above, below in zip(parts, parts[1:]):
            assert above.y0 >= below.y1 - 1
        x0, y0, x1, y1 = crop or (0, 0, (width + GAP) * frames - GAP, height)
        assert image.width / image.height == pytest.approx((x1 - x0) / (y1 - y0))

    @BOTH
    def test_fonts_are_legible_in_a_column(self, draw):
        figure = draw(subject(keys(_1_2=0.5), title="block\nimage"))
        assert {text.get_fontsize() for text in texts(figure)} == {7}
        assert figure.texts[0].get_text() == "block\nimage"

    @BOTH
    def test_detection(self, draw):
        detection = Detection((10.0, 5.0, 50.0, 30.0), "person 98%")
        figure = draw(subject(keys(_1_2=0.5), detection=detection))
        assert figure.axes[0].patches[-1].get_bbox().bounds == (10, 5, 40, 25)
        (label,) = [text for text in figure.axes[0].texts if text.get_text()]
        assert (label.get_text(), label.xy) == ("person 98%", (10, 5))

    @pytest.mark.parametrize(
        "box", [(0, 0, 9, 9), (51, 0, 60, 9), (0, 31, 9, 40), (51, 31, 60, 40), (0, 0, 60, 40)]
    )
    def test_label_of_a_detection_at_the_border_is_in_the_image(self, box):
        figure = draw_arrows(subject(keys(_1_2=0.5), detection=Detection(box, "surfboard 98%")))
        rgb(figure)
        image = figure.axes[0].get_window_extent()
        (label,) = [text for text in figure.axes[0].texts if text.get_text()]
        extent = label.get_window_extent()
        assert image.x0 <= extent.x0 < extent.x1 <= image.x1
        assert image.y0 <= extent.y0 < extent.y1 <= image.y1


# A clip of every third frame from 10 on. By default, the middle of the frames of each position is
# drawn, 4t + 1 for a stride of 4; of the query's position, the query.
@pytest.mark.parametrize(
    ("positions", "stride", "query", "wanted", "chosen"),
    [
        (4, 4, 6, [], {0: 1, 1: 6, 2: 9, 3: 13}),
        (4, 1, 3, [], {0: 0, 1: 1, 2: 2, 3: 3}),
        (9, 1, 3, [], {0: 0, 3: 3, 4: 4, 6: 6, 8: 8}),  # 0 2 4 6 8, but 3 instead of 2
        (3, 4, 13, [], {0: 1, 1: 5, 2: 13}),  # 12 to 15 are left out by a pooling
        (4, 4, 6, [10, 55], {0: 0, 1: 6, 3: 15}),
        (4, 4, 6, [28], {1: 6}),
    ],
)
def test_choice_of_frames(positions, stride, query, wanted, chosen):
    clip = list(range(10, 58, 3))
    found = choose_frames(positions, stride, clip, query, wanted)
    assert list(found.items()) == list(chosen.items())


def test_grid(tmp_path):
    colours = ["red", "lime", "blue", "black"]
    files = [tmp_path / f"{colour}.png" for colour in colours]
    for file, size in zip(files, [(30, 20), (30, 25), (30, 60), (28, 40)]):
        Image.new("RGB", size, file.stem).save(file)
    save_image_grid(tmp_path / "grid.png", files, columns=2)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (60, 25 + 60)
        assert grid.getpixel((0, 0)) == grid.getpixel((29, 19)) == (255, 0, 0)
        assert grid.getpixel((29, 20)) == (255, 255, 255)  # it is lower than its neighbour
        assert grid.getpixel((30, 0)) == grid.getpixel((59, 24)) == (0, 255, 0)
        assert grid.getpixel((0, 25)) == grid.getpixel((29, 84)) == (0, 0, 255)
        assert grid.getpixel((57, 64)) == (0, 0, 0)
