"""A handful of images to train on and to test on."""

from __future__ import annotations

import pytest

from nl_detectron_cli import overfit
from tests.running import QUICK, TINY, metrics, run


def test_chooses_usable_images():
    objects = [(1, 0, 1), (2, 1, 1), (3, 0, 0), (4, 0, 1), (4, 0, 1), (4, 0, 1), (5, 0, 1)]
    keys = ("image_id", "iscrowd", "num_keypoints")
    data = {
        "images": [{"id": i} for i in range(6)],
        "categories": [{"id": 1, "keypoints": ["nose"]}],
        "annotations": [dict(zip(keys, values)) for values in objects],
    }
    del data["annotations"][-1]["iscrowd"]
    chosen = overfit.first_images(data, 2, 2)
    assert [image["id"] for image in chosen["images"]] == [1, 5]
    assert [a["image_id"] for a in chosen["annotations"]] == [1, 5]
    with pytest.raises(ValueError, match="--count must be at most 2, .* 1 to 2 objects, got 3"):
        overfit.first_images(data, 3, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting property name"),
        ("[]", "the file has no images"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}', "the file has no categories"),
    ],
)
def test_unusable_json(text, message, tmp_path):
    if text:
        (tmp_path / "a.json").write_text(text)
    config, annotations = str(QUICK / "Base-overfit.yaml"), str(tmp_path / "a.json")
    with pytest.raises(SystemExit, match=f"--json .*a.json: .*{message}"):
        overfit.main(["--config-file", config, "--json", annotations, "--images", "."])


def test_trains_on_the_subset(custom_data, tmp_path):
    config = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
    data = "--count 2 --json", custom_data, "--images", custom_data.parent / "images"
    done = run("tools/overfit.py --config-file", config, *data, "OUTPUT_DIR", tmp_path, *TINY)
    assert "Loaded 2 images in COCO format" in done.stdout + done.stderr
    assert "segm/AP" in metrics(tmp_path)[-1]
