"""Mutations of the real COCO json: refused in a sentence, or accepted by detectron2 as well."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
import traceback

import numpy as np
import pytest
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.data.transforms import ResizeShortestEdge
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nl_detectron_cli import check_data
from tests.running import ROOT, words

COCO_FOLDER = ROOT.parent / "shared" / "datasets" / "coco"
JSON_FILE = COCO_FOLDER / "annotations" / "person_keypoints_val2017.json"
IMAGES = COCO_FOLDER / "val2017"
CONFIG = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_NLhead_1x.yaml"
MUTATIONS = 600
SECONDS, BYTES = 10, 2 * 1024**3

ODD_VALUES = [
    *(None, True, False, 0, -1, 1, 3, 1.5, 10**6, 10**9, 2**63, -(2**64), 10**400, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "0", "../a", "/etc/passwd", "\ud800"),
    *("\0", "a" * 10**5, [], {}, [[]], [{}], [None], ["a"], [1], [[1, 2]], {"a": 1}),
    *({"size": [480, 640], "counts": "1" * 50}, {"size": [10**6] * 2, "counts": [10**12]}),
    *({"size": [480, 640], "counts": [480 * 640]}, {"size": [2, 2], "counts": [-1, 5]}),
]


@pytest.fixture(scope="module")
def content():
    """A few images of each kind: crowds, people without keypoints, and others."""
    if not JSON_FILE.exists():
        pytest.skip(f"needs {JSON_FILE}")
    content = json.loads(JSON_FILE.read_text())
    crowds = {a["image_id"] for a in content["annotations"] if a["iscrowd"]}
    people = {a["image_id"] for a in content["annotations"]} - crowds
    chosen = {*sorted(crowds)[:1], *sorted(people)[:3]}
    content["images"] = [i for i in content["images"] if i["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    return content


def mutated(content, rng):
    """The text of the file after one to three random changes of values, or one of bytes."""
    if rng.random() < 0.2:
        return damaged(json.dumps(content).encode(), rng)
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        change_value(content, rng)
    return json.dumps(content).encode()


def damaged(text, rng):
    place, length = rng.randrange(len(text)), rng.choice((1, 2, 10, 1000))
    return rng.choice(
        (
            text[:place],
            text[:place] + text[place + length :],
            text[:place] + rng.randbytes(length) + text[place + length :],
            text[: place + length] + text[place:],
            text[:place] + b"[" * 10**5 + text[place:],
            text.decode().encode(rng.choice(("utf-16", "utf-8-sig", "utf-32"))),
        )
    )


def change_value(content, rng):
    """Go down to a random depth, then replace, delete, repeat or exchange what is there."""
    parent, key = None, None
    value = content
    while isinstance(value, (dict, list)) and value and (parent is None or rng.random() < 0.85):
        parent = value
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = value[key]
    if parent is None:
        return
    action = rng.choice(("replace", "replace", "replace", "delete", "repeat", "exchange"))
    if action == "replace":
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif action == "delete":
        del parent[key]
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(value))
    else:
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key], parent[other] = parent[other], parent[key]


def forked(function, log):
    """Run it in a process of its own; returns its exit code, seconds and the most bytes it held."""
    start = time.monotonic()
    child = os.fork()
    if not child:
        signal.alarm(3 * SECONDS)
        code = 99
        try:
            with open(log, "w", buffering=1, encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    code = function()
                except BaseException:
                    traceback.print_exc(file=file)
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, time.monotonic() - start, usage.ru_maxrss * 1024


def check(file):
    """Exit code of the command: 1 with a sentence or report, 0 if there is no error."""
    data = f"--train-json {file} --train-images {IMAGES} --test-json {file} --test-images {IMAGES}"
    try:
        check_data.main(words("--config-file", CONFIG, data, "MODEL.MASK_ON True"))
    except SystemExit as end:
        return int(bool(end.code))
    return 0


def use(file):
    """Train and evaluate on the file, as far as its annotations go."""
    records = load_coco_json(str(file), str(IMAGES), "fuzzed")
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[ResizeShortestEdge(64, 128)],
        image_format="BGR",
        use_instance_mask=True,
        use_keypoint=True,
    )
    for record in records:
        instances = mapper(record)["instances"]
        assert instances.gt_boxes.tensor.isfinite().all()
        if len(instances):
            assert instances.gt_keypoints.tensor.isfinite().all()
            assert instances.gt_masks.get_bounding_boxes().tensor.isfinite().all()
    truth = COCO(str(file))
    found = [
        {key: a[key] for key in ("image_id", "category_id", "bbox", "keypoints")} | {"score": 1.0}
        for a in truth.dataset["annotations"]
        if not a["iscrowd"]
    ]
    for kind in ("bbox", "segm", "keypoints"):
        results = [
            one | ({"segmentation": truth.annToRLE(a)} if kind == "segm" else {})
            for one, a in zip(found, (a for a in truth.dataset["annotations"] if not a["iscrowd"]))
            if a["image_id"] in truth.imgs
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        assert np.isfinite(evaluation.eval["precision"]).all()
    return 0


@pytest.mark.slow
def test_no_traceback_no_hang_no_gigabytes(content, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(11)
    file, log = tmp_path / "fuzzed.json", tmp_path / "log.txt"
    file.write_text(json.dumps(content))
    assert forked(lambda: check(file), log)[0] == 0, log.read_text()
    assert forked(lambda: use(file), log)[0] == 0, log.read_text()
    codes, wrong = [], []
    for number in range(MUTATIONS):
        file.write_bytes(mutated(content, rng))
        for run in (check, use):
            code, seconds, size = forked(lambda run=run: run(file), log)
            if code not in (0, run is check) or seconds > SECONDS or size > BYTES:
                (tmp_path / f"{number}.json").write_bytes(file.read_bytes())
                wrong.append((number, run.__name__, code, seconds, size, log.read_text()[-1500:]))
            if run is check:
                codes.append(code)
            if code:
                break
    assert not wrong
    assert 0.05 * MUTATIONS < codes.count(0) < 0.6 * MUTATIONS
