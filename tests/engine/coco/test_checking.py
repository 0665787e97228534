"""Every kind of problem with a data set is found, counted and named."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util

from nl_detectron.engine.coco.annotations import leaves_folder
from nl_detectron.engine.coco.checking import Source, check_sources
from nl_detectron.engine.coco.findings import parse_treat

NAN, INF = float("nan"), float("inf")
KEYPOINT_MODEL = ("area", "iscrowd", "segmentation", "keypoints", "num_keypoints")
# The images are 96 x 64.
ALL_OF_IT = {"size": [64, 96], "counts": [0, 64 * 96]}


@pytest.fixture
def data(custom_data, tmp_path):
    """A copy of the files, to damage; ``found`` checks them."""

    class Data:
        images = tmp_path / "images"
        json_file = tmp_path / "bars.json"
        content = json.loads(custom_data.read_text())

        def found(self, splits=("train",), keys=KEYPOINT_MODEL, mask_format="polygon", limit=0.0):
            self.json_file.write_text(json.dumps(self.content))
            source = Source(str(self.json_file), str(self.images), splits, keys, mask_format)
            findings, _ = check_sources([source], limit)
            return findings

    shutil.copytree(custom_data.parent / "images", Data.images)
    return Data()


def test_nothing_is_wrong(data):
    assert data.found().lines({}) == [
        str(data.json_file),
        "  4 images, 4 annotations",
        "  4 image files checked",
        "  no problems",
    ]


def polygon(*numbers):
    return {"segmentation": [list(numbers)]}


TRIANGLE = [1, 1, 9, 1, 9, 9]
POINTS = [30, 30, 2, 40, 40, 2]


@pytest.mark.parametrize(
    ("change", "kind", "description"),
    [
        ({"bbox": [NAN, 0, 2, 2]}, "box", "its bbox is [nan, 0, 2, 2]"),
        ({"bbox": [0, 0, INF, 2]}, "box", "its bbox is [0, 0, inf, 2]"),
        ({"bbox": [0, 0, 10**400, 2]}, "box", "its bbox is [0, 0, 1000000"),
        ({"bbox": [5, 5, -2, 2]}, "box", "its bbox is [5, 5, -2, 2]"),
        ({"bbox": [5, 5, 2]}, "box", "its bbox is [5, 5, 2]"),
        ({"bbox": ["5", 5, 2, 2]}, "box", "its bbox is ['5', 5, 2, 2]"),
        ({"bbox": [True, 5, 2, 2]}, "box", "its bbox is [True, 5, 2, 2]"),
        ({"bbox": "5522"}, "box", "its bbox is '5522'"),
        ({"bbox": 0}, "box", "its bbox is 0"),
        ({"bbox": [5, 5, 0, 2]}, "box-empty", "its bbox is [5, 5, 0, 2]"),
        ({"bbox": [96, 5, 9, 9]}, "box-outside", "[96, 5, 9, 9] in an image of 96 x 64"),
        ({"bbox": [5, -9, 9, 8]}, "box-outside", "[5, -9, 9, 8]"),
        ({"bbox": [-9, 5, 8, 9]}, "box-outside", "[-9, 5, 8, 9]"),
        ({"bbox": [5, 64, 9, 9]}, "box-outside", "[5, 64, 9, 9]"),
        ({"bbox": [5, 5, 9, 900]}, "box-outside", "[5, 5, 9, 900]"),
        ({"bbox": [90, 5, 9, 9]}, "box-beyond", "[90, 5, 9, 9]"),
        ({"bbox": [-3, 5, 9, 9]}, "box-beyond", "[-3, 5, 9, 9]"),
        ({"area": NAN}, "area", "its area is nan"),
        ({"area": -1}, "area", "its area is -1"),
        ({"area": "5"}, "area", "its area is '5'"),
        ({"iscrowd": 2}, "iscrowd", "its iscrowd is 2"),
        ({"iscrowd": "0"}, "iscrowd", "its iscrowd is '0'"),
        ({"ignore": 1}, "ignore", "its ignore is 1"),
        ({"id": 0}, "annotation-id", "its id is 0"),
        ({"id": "a"}, "annotation-id", "its id is 'a'"),
        ({"id": 4}, "duplicate-annotation", "another annotation has its id, too"),
        ({"image_id": 9}, "unknown-image", "its image_id is 9"),
        ({"image_id": "3"}, "unknown-image", "its image_id is '3'"),
        ({"image_id": [3]}, "image-id", "its image_id is [3]"),
        ({"image_id": True}, "image-id", "its image_id is True"),
        ({"keypoints": [NAN, *POINTS[1:]]}, "keypoints", "its keypoints are [nan, 30, 2"),
        ({"keypoints": False}, "keypoints", "its keypoints are False"),
        ({"keypoints": ["a"] * 6}, "keypoints", "its keypoints are ['a'"),
        ({"keypoints": POINTS[:5]}, "keypoints-length", "5 keypoint values, its category needs 6"),
        ({"keypoints": [-5, *POINTS[1:]]}, "keypoint-outside", "at -5, 30 in an image of 96 x 64"),
        ({"keypoints": [30, 65, *POINTS[2:]]}, "keypoint-outside", "at 30, 65"),
        ({"keypoints": [30, 30, 3, *POINTS[3:]]}, "keypoint-visibility", "are [3, 2]"),
        ({"num_keypoints": 1}, "num-keypoints", "its num_keypoints is 1, 2 are labeled"),
        (polygon(1, NAN, *TRIANGLE), "polygon-values", "its segmentation is [[1, nan, 1"),
        (polygon(1, INF, *TRIANGLE), "polygon-values", "its segmentation is [[1, inf, 1"),
        (polygon(1, 1, 9, 9), "polygon", "1 of 1 polygons have fewer than 3 points"),
        (polygon(*TRIANGLE, 1), "polygon", "1 of 1 polygons have fewer than 3 points or half a"),
        ({"segmentation": TRIANGLE}, "polygon-values", "its segmentation is [1, 1, 9"),
        ({"segmentation": 0}, "polygon-values", "its segmentation is 0"),
        ({"segmentation": "abc"}, "polygon-values", "its segmentation is 'abc'"),
        ({"segmentation": [TRIANGLE, [1, 1]]}, "polygon-part", "1 of 2 polygons"),
        (polygon(*TRIANGLE, 1e9, 5), "polygon-values", "its segmentation is [[1, 1, 9"),
        (polygon(*TRIANGLE, 193, 5), "polygon-outside", "its segmentation is [[1, 1, 9"),
        (polygon(*TRIANGLE, 5, -97), "polygon-outside", "its segmentation is [[1, 1, 9"),
        ({"segmentation": ALL_OF_IT}, "mask-format", "its mask is run-length encoded"),
        ({"category_id": 4, "keypoints": []}, "unknown-category", "its category_id is 4"),
        ({"category_id": [3]}, "unknown-category", "its category_id is [3]"),
    ],
)
def test_annotation(change, kind, description, data):
    """Others may be found beside it, where a value is wrong in two ways."""
    data.content["annotations"][2] |= change
    data.content["annotations"].reverse()  # not in the order of the ids
    findings = data.found(keys=("area", "iscrowd"))
    name = change.get("id", 3)
    image = "" if "image_id" in change else " of image 3 (3.png)"
    beside = {"num-keypoints"} if kind in ("keypoint-outside", "keypoint-visibility") else set()
    assert set(findings.counts) - beside == {kind} | ({"keypoints-length"} & set(findings.counts))
    if kind != "duplicate-annotation":  # which is either of the two
        assert findings.examples[kind][0].startswith(f"annotation {name!r}{image}: ")
    assert description in findings.examples[kind][0]
    assert findings.counts[kind] == 1


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "bbox", *KEYPOINT_MODEL])
@pytest.mark.parametrize("value", [None, [], "gone"])
def test_what_annotations_need(key, value, data):
    for annotation in data.content["annotations"]:
        annotation[key] = value
        if value == "gone":
            del annotation[key]
    findings = data.found()
    assert findings.counts["missing-key"] == 4
    assert f"has no {key!r}" in findings.examples["missing-key"][0]
    assert len(findings.examples["missing-key"]) == 3
    assert "    ..." in findings.lines({})


@pytest.mark.parametrize("compressed", [True, False])
def test_masks_of_pycocotools_are_valid(compressed, data):
    rng = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((64, 96)) < share, dtype=np.uint8)
        rle = mask_util.encode(mask)
        rle["counts"] = rle["counts"].decode()
        if not compressed:  # the lengths of the runs, of zeros first
            ends = np.flatnonzero(np.diff(mask.ravel("F"), prepend=0, append=2)).tolist()
            rle["counts"] = np.diff(ends, prepend=0).tolist()
            assert np.array_equal(mask_util.decode(mask_util.frPyObjects(rle, 64, 96)), mask)
        data.content["annotations"][0] |= {"iscrowd": 1, "segmentation": rle}
        assert not data.found().counts
        data.content["annotations"][0]["iscrowd"] = 0
        assert data.found().counts == {"mask-format": 1}
        assert not data.found(mask_format="").counts


@pytest.mark.parametrize(
    ("rle", "description"),
    [
        ({"counts": [6144]}, "the size of its mask is []"),
        ({"size": [64, 96]}, "the counts of its mask are None"),
        ({"size": [96, 64], "counts": [6144]}, "mask is 64 x 96 in an image of 96 x 64"),
        ({"size": [64, 96], "counts": [6143]}, "counts of its mask are [6143], for 96 x 64 pixels"),
        ({"size": [64, 96], "counts": [6145, -1]}, "counts of its mask are [6145, -1]"),
        ({"size": [64, 96], "counts": [6144.0]}, "counts of its mask are [6144.0]"),
        ({"size": [64, 96], "counts": ""}, "counts of its mask are ''"),
        ({"size": [64, 96], "counts": "PPP"}, "counts of its mask are 'PPP'"),
        ({"size": [64, 96], "counts": "P" * 99}, "counts of its mask are 'PPP"),
        ({"size": [64, 96], "counts": "\u20ac0"}, "counts of its mask are '\u20ac0'"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "mask is 1000000000 x"),
    ],
)
def test_bad_masks(rle, description, data):
    data.content["annotations"][0] |= {"iscrowd": 1, "segmentation": rle}
    findings = data.found()
    assert findings.counts == {"rle": 1}
    assert description in findings.examples["rle"][0]


@pytest.mark.parametrize(
    ("change", "kind", "example"),
    [
        ({"id": None}, "missing-key", "image number 2: has no 'id'"),
        ({"file_name": ""}, "missing-key", "image number 2: has no 'file_name'"),
        ({"id": 2.5}, "image-record", "image number 2: its id is 2.5"),
        ({"id": True}, "image-record", "image number 2: its id is True"),
        ({"file_name": 5}, "image-record", "image number 2: its file_name is 5"),
        ({"file_name": "\ud800"}, "image-record", r"image number 2: its file_name is '\ud800'"),
        ({"file_name": "a\0b"}, "image-record", r"image number 2: its file_name is 'a\x00b'"),
        ({"height": 64.0}, "image-record", "image number 2: its height is 64.0"),
        ({"width": 0}, "image-record", "image number 2: its width is 0"),
        ({"id": "2"}, "image-record", "images: some ids are numbers, others are strings"),
        ({"id": 1}, "duplicate-image", "image 1 (2.png): image number 2 has its id, too"),
        ({"file_name": "1.png"}, "duplicate-file", "image 2 (1.png): another image has its file"),
        ({"file_name": "../images/2.png"}, "file-name", "image 2 (../images/2.png): its file name"),
        ({"file_name": "a/../../b"}, "file-name", "image 2 (a/../../b): its file name"),
        ({"file_name": "/etc/passwd"}, "file-name", "image 2 (/etc/passwd): its file name"),
        ({"file_name": "..\\b"}, "file-name", "image 2 (..\\b): its file name"),
        ({"height": 1, "width": 3000}, "image-shape", "image 2 (2.png): it is 3000 x 1"),
        ({"height": 20000, "width": 20000}, "image-huge", "image 2 (2.png): it has 20000 x 20000"),
        ({"file_name": "lost.png"}, "image-missing", "image 2 (lost.png): "),
        ({"file_name": "."}, "image-missing", "image 2 (.): "),
        ({"height": 96, "width": 64}, "image-size", "it is 96 x 64, but the JSON file says 64 x 9"),
    ],
)
def test_image(change, kind, example, data):
    """Annotations of images that are not valid are reported, too, as warnings."""
    data.content["images"][1] |= change
    findings = data.found()
    consequences = {"unknown-image", "image-size", "box-outside", "keypoint-outside"}
    assert findings.counts.keys() - (consequences - {kind}) == {kind}
    assert example in findings.examples[kind][0]
    if "number 2: has" in example:
        assert findings.counts["unknown-image"] == 1


def test_records_that_are_not_objects(data):
    data.content["images"].append(["a.jpg"])
    data.content["annotations"].append("x" * 10**6)
    findings = data.found()
    assert findings.counts == {"image-record": 1, "annotation-record": 1}
    assert all(len("".join(examples)) < 100 for examples in findings.examples.values())


def resave(file, **options):
    with Image.open(file) as image:
        image.load()
    image.save(file, **options)


def oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return lambda file: resave(file, format="JPEG", exif=exif)


def cut(share, **options):
    def damage(file):
        resave(file, **options)
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])

    return damage


def overwrite(content):
    return lambda file: file.write_bytes(content)


def gray16(file):
    Image.fromarray(np.full((64, 96), 40000, np.uint16)).save(file)


@pytest.mark.parametrize(
    ("damage", "kind", "description"),
    [
        (overwrite(b""), "image-empty", "has 0 bytes"),
        (overwrite(b"GIF"), "image-broken", "cannot identify image file"),
        (cut(0.5, format="PNG"), "image-broken", "truncated"),
        (cut(0.5, format="JPEG"), "image-broken", "truncated"),
        (cut(0.01, format="JPEG"), "image-broken", ""),
        (gray16, "image-depth", "its mode is I;16"),
        (oriented(6), "image-turned", "with its EXIF orientation 6 it is 64 x 96, but"),
        (oriented(3), "image-orientation", "its EXIF orientation is 3"),
        (oriented(1), None, ""),
        (lambda file: resave(file, format="JPEG"), None, ""),
        (os.remove, "image-missing", "No such file"),
    ],
)
def test_image_file(damage, kind, description, data):
    damage(data.images / "3.png")
    findings = data.found()
    assert findings.counts == ({kind: 1} if kind else {})
    if kind:
        assert findings.examples[kind][0].startswith("image 3 (3.png): ")
        assert description in findings.examples[kind][0]


def test_jpeg_with_more_after_its_end(data):
    """Some cameras append to it; it is whole."""
    resave(data.images / "3.png", format="JPEG")
    with (data.images / "3.png").open("ab") as file:
        file.write(b"more")
    assert not data.found().counts


def test_bomb(data):
    """20000 x 20000 in few bytes: only the header is read."""
    Image.new("1", (20000, 20000)).save(data.images / "3.png")
    findings = data.found()
    assert findings.counts == {"image-huge": 1}
    assert "exceeds limit" in findings.examples["image-huge"][0]


def test_turned_as_the_file_says(data):
    oriented(6)(data.images / "3.png")
    data.content["images"][2] |= {"height": 96, "width": 64}
    data.content["annotations"][2]["bbox"] = [4, 4, 9, 9]
    assert not data.found().counts


@pytest.mark.parametrize("name", ["..a.png", "a/../b.png", "a/..", "x\\y.png", "...", "C:a.png"])
def test_file_names_within_the_folder(name):
    assert not leaves_folder(name)


def test_warnings_do_not_make_objects_useless(data):
    for annotation in data.content["annotations"]:
        annotation["keypoints"][0] = -1
    assert data.found().counts == {"keypoint-outside": 4}


def test_nothing_to_learn(data):
    for annotation in data.content["annotations"]:
        annotation["keypoints"], annotation["num_keypoints"] = [0] * 6, 0
    assert data.found().counts == {"no-objects": 1}
    assert not data.found(keys=()).counts
    for annotation in data.content["annotations"]:
        annotation["iscrowd"] = 1
    assert data.found(keys=()).counts == {"no-objects": 1}
    del data.content["annotations"], data.content["images"]
    assert data.found(keys=()).counts == {"no-images": 1, "no-objects": 1}


def test_not_a_coco_file(data):
    data.content = [1]
    assert data.found().sentence(["json"]) == f"{data.json_file}: json (1): has no categories"


class TestOverlap:
    @pytest.fixture
    def found(self, data, custom_data):
        """The findings between the copied images and the original ones, of which some are left."""

        def found(*kept, test_file=None, limit=0.0):
            data.content["images"] = [i for i in data.content["images"] if i["id"] in kept]
            data.json_file.write_text(json.dumps(data.content))
            train = Source(str(custom_data), str(custom_data.parent / "images"), ("train",))
            test = Source(str(test_file or data.json_file), str(data.images), ("test",))
            return check_sources([train, test], limit)[-1]

        return found

    def test_copies(self, found, data):
        findings = found(2, 3)
        assert findings.counts == {"shared-images": 2}
        assert f"{data.images / '2.png'} is " in findings.examples["shared-images"][0]

    def test_others(self, found, data):
        """Of the same size, too."""
        for number in (2, 3):
            content = bytearray((data.images / f"{number}.png").read_bytes())
            content[-1] ^= 1
            (data.images / f"{number}.png").write_bytes(content)
        assert not found(2, 3).counts

    def test_same_file(self, found, custom_data):
        assert found(test_file=custom_data).counts == {"train-is-test": 1}


class TestCache:
    def test_keeps_what_was_found(self, data):
        data.content["annotations"][0]["area"] = -1
        first = data.found()
        status = data.images.stat()
        (data.images / "3.png").write_bytes(b"")
        assert data.found() == first  # so the files were not read again
        os.utime(data.images, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert data.found().counts == {"area": 1, "image-empty": 1}
        data.content["annotations"][0]["area"] = -2
        assert "is -2" in data.found().examples["area"][0]
        assert data.found(keys=()).counts != data.found(keys=("gone",)).counts

    def test_whole_check_is_kept_for_a_short_one(self, data):
        short = data.found(limit=1e-9)
        assert short.unchecked
        assert short.notes[1] == "0 of 4 image files checked, chosen at random, in 1e-09 seconds"
        assert data.found(limit=1e-9) == short
        whole = data.found()
        assert (whole.files, whole.unchecked) == (4, False)
        assert data.found(limit=1e-9) == whole

    @pytest.mark.parametrize("content", ["", "[1]", '[{"a": 1}]'])
    def test_damaged(self, content, data, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        found = data.found()
        (file,) = (tmp_path / "cache" / "nl_detectron").rglob("*.json")
        file.write_text(content)
        assert data.found() == found
        assert file.read_text() != content

    def test_that_cannot_be_written(self, data, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert not data.found().counts


class TestSeverity:
    def test_parsed(self):
        assert parse_treat(["box=warning", "area=off"]) == {"box": "warning", "area": "off"}

    @pytest.mark.parametrize("word", ["bux=error", "box=fatal", "box", "file-name=warning"])
    def test_refused(self, word):
        with pytest.raises(ValueError, match=f"{word}"):
            parse_treat([word])

    def test_of_what_was_found(self, data):
        data.content["annotations"][0] |= {"area": -1, "bbox": [5, 5, 0, 2]}
        findings = data.found()
        assert findings.of_severity("error", {}) == ["area"]
        assert findings.of_severity("warning", {}) == ["box-empty"]
        treat = {"area": "off", "box-empty": "error"}
        assert findings.of_severity("error", treat) == ["box-empty"]
        assert findings.of_severity("warning", treat) == []
        assert "area" not in "".join(findings.lines(treat))
