from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from long_range import training
from long_range.comparison import draw_predictions
from long_range.dataset import KINDS, class_names, make_scene, register_dataset, write_dataset
from long_range.scene import BEACON_COLORS, CLEARANCE, HEIGHT, WIDTH
from long_range.training import variant_config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron.config import load_config
from nl_detectron.engine.ablation import VARIANTS, train_and_evaluate

SIZE = 7


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("long_range")
    for kind in KINDS:
        write_dataset(root / kind, kind, "val", seed=3, size=SIZE)
    return {kind: root / kind for kind in KINDS}


def scenes(kind="instances", count=40):
    return [make_scene(kind, "train", 0, index) for index in range(count)]


def test_same_seed_writes_the_same_bytes(folders, kind, tmp_path):
    write_dataset(tmp_path / "same", kind, "val", seed=3, size=SIZE)
    write_dataset(tmp_path / "other", kind, "val", seed=4, size=SIZE)
    names = sorted(path.name for path in folders[kind].iterdir())
    assert len(names) == SIZE + 1
    for name in names:
        written = (folders[kind] / name).read_bytes()
        assert (tmp_path / "same" / name).read_bytes() == written
        assert (tmp_path / "other" / name).read_bytes() != written


def test_splits_have_no_picture_in_common():
    train, val = (
        {make_scene("instances", split, 0, index).draw().tobytes() for index in range(20)}
        for split in ("train", "val")
    )
    assert len(train) == len(val) == 20
    assert not train & val


def test_perfect_predictions_reach_ap_100(folders, kind):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folders[kind] / "annotations.json"))
        perfect = truth.loadRes([{**truth.anns[i], "score": 1.0} for i in truth.anns])
        for task in ("bbox", "segm", "keypoints") if kind == "keypoints" else ("bbox", "segm"):
            evaluation = COCOeval(truth, perfect, task)
            if task == "keypoints":
                evaluation.params.kpt_oks_sigmas = np.array([0.1, 0.1])
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert evaluation.stats[0] == 1.0, task


def test_annotations_have_what_coco_asks_for(folders, kind):
    coco = json.loads((folders[kind] / "annotations.json").read_text())
    assert set(coco) == {"info", "licenses", "images", "annotations", "categories"}
    assert [category["name"] for category in coco["categories"]] == class_names(kind)
    assert len({a["id"] for a in coco["annotations"]}) == len(coco["annotations"])
    assert {a["image_id"] for a in coco["annotations"]} == {i["id"] for i in coco["images"]}
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0
        assert x + width <= WIDTH
        assert y + height <= HEIGHT
        assert 0 < annotation["area"] < width * height
        assert annotation["iscrowd"] == 0
        if kind == "keypoints":
            assert annotation["num_keypoints"] == 2
            assert annotation["keypoints"][2::3] == [2, 2]


def test_masks_lie_on_the_drawn_objects(folders, kind):
    truth = COCO(str(folders[kind] / "annotations.json"))
    for image_id in truth.imgs:
        image = make_scene(kind, "val", 3, image_id).draw().astype(int)
        # Half way between the lightest object and the darkest ground.
        dark = (image.max(axis=2) < 140) & (np.ptp(image, axis=2) == 0)
        masks = [truth.annToMask(a) for a in truth.imgToAnns[image_id]]
        drawn = np.any(masks, axis=0)
        assert (dark & drawn).sum() / (dark | drawn).sum() > 0.95


def test_only_the_beacon_tells_the_color(kind):
    for scene in scenes(kind):
        pictures = [
            dataclasses.replace(scene, beacon_color=color).draw() for color in BEACON_COLORS
        ]
        x0, y0, x1, y1 = scene.beacon_box.astype(int)
        for picture in pictures:
            assert np.ptp(picture[y0:y1, x0:x1].astype(int), axis=2).max() > 60
            picture[y0:y1, x0:x1] = 0
            assert np.ptp(picture.astype(int), axis=2).max() == 0
            assert (picture == pictures[0]).all()


def test_all_objects_are_far_from_the_beacon(kind):
    for scene in scenes(kind):
        assert len(scene.objects) in (2, 3)
        for obj in scene.objects:
            x0, _, x1, _ = obj.box
            assert max(x0 - scene.beacon_box[2], scene.beacon_box[0] - x1) >= CLEARANCE


def test_the_beacon_says_which_end_is_the_head(folders):
    truth = COCO(str(folders["keypoints"] / "annotations.json"))
    sides = {"red": set(), "green": set()}
    for annotation in truth.anns.values():
        scene = make_scene("keypoints", "val", 3, annotation["image_id"])
        head, _, _, tail, _, _ = annotation["keypoints"]
        sides[scene.beacon_color].add("left" if head < tail else "right")
    assert sides == {"red": {"left"}, "green": {"right"}}


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="kind must be one of .*'masks'"):
        class_names("masks")
    with pytest.raises(ValueError, match="split must be one of .*'test'"):
        write_dataset(tmp_path, "instances", "test", seed=0, size=1)
    with pytest.raises(ValueError, match="size .* got 0"):
        write_dataset(tmp_path, "instances", "val", seed=0, size=0)
    with pytest.raises(ValueError, match="seed .* got -1"):
        write_dataset(tmp_path, "instances", "val", seed=-1, size=1)
    with pytest.raises(ValueError, match="variant must be one of .*'nl'"):
        variant_config("instances", "nl", output=tmp_path, seed=0)
    with pytest.raises(ValueError, match="budget .* got 0"):
        variant_config("instances", "stock", output=tmp_path, seed=0, budget=0)


def awake_model(kind, variant, tmp_path):
    """A model in test mode whose non-local blocks, if any, are no longer the identity."""
    torch.manual_seed(0)
    model = build_model(variant_config(kind, variant, output=tmp_path, seed=0)).eval()
    for name, parameter in model.named_parameters():
        if "non_local" in name and "conv_out.weight" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "non_local" in name and "theta.weight" in name:
            torch.nn.init.zeros_(parameter)  # equal attention to all positions
    return model


def regions_of(box):
    """The box, and the widest regions that overlap it enough (IoU 0.5) to count as a hit."""
    x0, y0, x1, y1 = box
    wide = x1 - x0
    return [[x0, y0, x1, y1], [x0 - wide, y0, x1, y1], [x0, y0, x1 + wide, y1]]


def pooled(model, image, boxes):
    """All that the box, mask and keypoint heads are given for some boxes."""
    features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
    heads = model.roi_heads
    found = [heads.box_pooler([features[f] for f in heads.box_in_features], [Boxes(boxes)])]
    if heads.mask_on:
        found.append(
            heads.mask_pooler([features[f] for f in heads.mask_in_features], [Boxes(boxes)])
        )
    if heads.keypoint_on:
        inputs = [features[f] for f in heads.keypoint_in_features]
        found.append(heads.keypoint_pooler(inputs, [Boxes(boxes)]))
    assert len(found) == 2
    return found


def as_image(scene):
    return torch.from_numpy(scene.draw()[:, :, ::-1].copy()).permute(2, 0, 1).float()


@torch.no_grad()
def test_stock_heads_get_the_same_for_every_beacon(kind, tmp_path):
    stock = awake_model(kind, "stock", tmp_path)
    non_local = awake_model(kind, "non_local", tmp_path)
    for scene in scenes(kind, count=4):
        other = dataclasses.replace(
            scene, beacon_color="green" if scene.beacon_color == "red" else "red"
        )
        boxes = torch.tensor([r for obj in scene.objects for r in regions_of(obj.box)]).float()
        for a, b in zip(*(pooled(stock, as_image(s), boxes) for s in (scene, other))):
            assert torch.equal(a, b)
        for a, b in zip(*(pooled(non_local, as_image(s), boxes) for s in (scene, other))):
            assert not torch.equal(a, b)


def test_reach_of_the_stock_heads_ends_before_the_beacon(kind, tmp_path):
    # The widest object there is, where its widest region starts 35 columns behind a cell of res5:
    # the last place where p2's convolution takes that cell in.
    wide = 54
    start = 9 * 32 + 35 + wide
    boxes = torch.tensor(regions_of([start, 40, start + wide, 90])).float()
    model = awake_model(kind, "stock", tmp_path)
    for parameter in model.backbone.parameters():
        if parameter.dim() == 4:
            # Averages of what is positive throughout: no ReLU stops a gradient.
            parameter.data.abs_().div_(parameter[0].abs().sum())
    image = torch.rand(3, HEIGHT, WIDTH).mul(100).add(130).requires_grad_()
    sum(x.sum() for x in pooled(model, image, boxes)).backward()
    reach = start - int(image.grad.abs().amax(dim=(0, 1)).nonzero().min())
    # By hand: the receptive field of res5 is 427 columns.
    assert reach == 427 // 2 + 35 + wide
    assert reach < CLEARANCE


def test_without_blocks_is_the_config_without_the_block(kind, tmp_path):
    name = training.CONFIG_NAMES[kind].removesuffix("_NL")
    written = load_config(training.CONFIGS / f"{name}.yaml")
    variant = variant_config(kind, "stock", output=tmp_path, seed=0)
    assert {**variant.MODEL} == {**written.MODEL}
    assert {**variant.INPUT} == {**written.INPUT}


@pytest.fixture
def registered(folders):
    for kind, folder in folders.items():
        for split in ("train", "val"):
            register_dataset(folder, kind, split)


def test_both_start_alike(kind, tmp_path, registered):
    losses, names = [], []
    for variant in VARIANTS:
        cfg = variant_config(kind, variant, output=tmp_path, seed=5, budget=0.01)
        trainer = training.AdamWTrainer(cfg)
        names.append(set(trainer.model.state_dict()))
        with EventStorage() as storage:
            trainer.iter = 0
            trainer.run_step()
            losses.append(storage.latest()["total_loss"])
    assert losses[0] == losses[1]
    assert names[0] < names[1]
    assert all(".res4.non_local4." in name for name in names[1] - names[0])


@pytest.mark.slow
def test_short_training_is_evaluated_and_drawn(kind, tmp_path, registered, folders):
    files = {}
    for variant in VARIANTS:
        cfg = variant_config(kind, variant, output=tmp_path / variant, seed=0, budget=0.1)
        run = train_and_evaluate(cfg, training.AdamWTrainer)
        files[variant] = tmp_path / variant / "inference" / "coco_instances_results.json"
        assert set(run.scores) == {
            "bbox/AP",
            f"{'segm' if kind == 'instances' else 'keypoints'}/AP",
        }
        assert run.losses["total_loss"][-1] < run.losses["total_loss"][0]
    draw_predictions(tmp_path / "figure.png", folders[kind], files, (0, 1))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
