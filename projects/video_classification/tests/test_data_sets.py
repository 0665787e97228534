"""Data sets from folders and lists, and what is refused in them."""

import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_classification.data import (
    load,
    register_built_in,
    register_charades,
    register_csv,
    register_folder,
)


@pytest.fixture
def root(tmp_path):
    """Folders with empty files, as nothing is decoded here."""
    for name in ("run/a b.mp4", "run/c.mkv", "jump/d.MP4", "jump/notes.txt", "e.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def read(root):
    """Registers a list and returns (file, label) of its records, and the classes."""

    def read(text, **options):
        (root / "list.csv").write_text(text)
        register_csv("test", root / "list.csv", **options)
        records = DatasetCatalog.get("test")
        names = [record["file_name"].removeprefix(f"{root}/") for record in records]
        return list(zip(names, [r["label"] for r in records])), MetadataCatalog.get("test").classes

    return read


def test_folder_per_class(root):
    (root / ".cache").mkdir()
    (root / "walk").mkdir()
    with pytest.raises(ValueError, match=r"1 of 3 entries are wrong:\n  walk: no videos"):
        register_folder("test", root)
    (root / "walk").rmdir()
    register_folder("test", root)
    assert load("test") == [
        {"file_name": str(root / "jump/d.MP4"), "label": 0},
        {"file_name": str(root / "run/a b.mp4"), "label": 1},
        {"file_name": str(root / "run/c.mkv"), "label": 1},
    ]
    metadata = MetadataCatalog.get("test")
    assert (metadata.classes, metadata.multi_label) == (["jump", "run"], False)

    register_folder("test", root, classes=["climb", "run", "jump"])  # as in training
    assert [record["label"] for record in load("test")] == [2, 1, 1]
    with pytest.raises(ValueError, match="run: label 'run' is not one of the 2 classes"):
        register_folder("test", root, classes=["climb", "jump"])
    with pytest.raises(ValueError, match="run: no subfolders"):
        register_folder("test", root / "run")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        register_folder("test", root / "nowhere")


def test_lists(read, root):
    expected = [("run/a b.mp4", 1), ("e.mp4", 0), ("e.mp4", 2)]
    digits = ["0", "1", "2"]
    assert read('run/a b.mp4,1\n\n"e.mp4", 0\ne.mp4,2\n') == (expected, digits)
    assert read("Path,Label\nrun/a b.mp4,1\ne.mp4,0\ne.mp4,2\n") == (expected, digits)
    assert read(f'label,path\n1, "{root}/run/a b.mp4"\n0,e.mp4\n2,e.mp4') == (expected, digits)
    names = ["ate", "ran", "sat"]
    by_name = "run/a b.mp4,ran\ne.mp4,ate\ne.mp4,sat\n"
    assert read(by_name) == (expected, names)
    assert read(by_name, classes=["sat", "ran", "ate"]) == (
        [("run/a b.mp4", 1), ("e.mp4", 2), ("e.mp4", 0)],
        ["sat", "ran", "ate"],
    )
    (root / "classes.txt").write_text("ate\nran\nsat\nwon\n")
    given = read("run/a b.mp4,1\ne.mp4,0\ne.mp4,2\n", classes=root / "classes.txt")
    assert given == (expected, [*names, "won"])
    assert read("run/c.mkv 1\ne.mp4 0\n")[0] == [("run/c.mkv", 1), ("e.mp4", 0)]
    assert read("c.mkv 0\n", root=root / "run")[0] == [("run/c.mkv", 0)]


def test_parts_of_videos(read, root):
    read("path,label,start,end\ne.mp4,0,1.5,3\ne.mp4,0,,2\ne.mp4,0,7,\ne.mp4,0\n")
    (root / "list.csv").unlink()  # it is read once
    parts = [(r.get("start"), r.get("end")) for r in load("test")]
    assert parts == [(1.5, 3.0), (None, 2.0), (7.0, None), (None, None)]


def test_any_number_of_labels(read):
    text = "e.mp4,2;0\nrun/c.mkv,1\nrun/a b.mp4,\n"
    videos, classes = read(text, multi_label=True)
    assert [label for _, label in videos] == [(0, 2), (1,), ()]
    assert classes == ["0", "1", "2"]
    assert MetadataCatalog.get("test").multi_label
    with pytest.raises(ValueError, match=r"line 1: 2 labels.*MULTI_LABEL.*\n  line 3: 0 labels"):
        read(text)


@pytest.mark.parametrize(
    ("text", "classes", "message"),
    [
        ("e.mp4,1\nrun/c.mkv,2\n", None, "list.csv: labels are 1 to 2, but they must begin with 0"),
        ("e.mp4,0\ne.mp4,2\n", ["x", "y"], "line 2: label '2' is not one of the 2 classes (x, y"),
        ("e.mp4,x\ne.mp4,z\n", ["x", "y"], "line 2: label 'z' is not one of the 2 classes (x, y"),
        ("e.mp4,-1\n", ["x", "y"], "line 1: label '-1' is not"),
        ("e.mp4,x\n\ne.mp4,3\n", None, "some labels are numbers (line 3: 3), some are names (line"),
        ("path,label\ne.mp4,0\ngone.mp4,0\n", None, "line 3: no such file: "),
        (
            "e.mp4 0\nrun/a b.mp4 1\n",
            None,
            "line 2: 3 fields; where fields are separated by spaces",
        ),
        ("e.mp4,0,soon\n", None, "line 1: 'soon' is not a number of seconds"),
        ("e.mp4,0,-1,3\n", None, "line 1: '-1' is not a number of seconds"),
        ("e.mp4,0,2,2\n", None, "line 1: end 2.0 is not after start 2.0"),
        ("e.mp4,0\ne.mp4,0,1,2,3\n", None, "line 2: 5 fields, expected path, label, start, end"),
        ("e.mp4\n", None, "line 1: 1 fields"),
        ("e.mp4,\n", None, "line 1: 0 labels"),
        ("path,label,age\ne.mp4,0,9\n", None, "line 1: columns must be among"),
        ("path,label\n", None, "list.csv: no videos in it"),
        ("", None, "list.csv: no videos in it"),
    ],
)
def test_wrong_lines_are_refused(read, text, classes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(text, classes=classes)


def test_all_wrong_lines_are_counted(read):
    with pytest.raises(ValueError, match=r"7 of 8 entries are wrong:(\n  line \d: .*){5}\n.*and 2"):
        read("e.mp4,0\n" + "gone.mp4,0\n" * 7)


def test_charades(root):
    """The fields that matter, as in the official files."""
    (root / "official.csv").write_text(
        "id,subject,script,actions,length\n"
        'e,S1,"A person runs, and\nsits.",c092 11.90 21.20;c147 0.00 12.60,24.83\n'
        "e,S2,Nothing.,,30\n"
        "e,S3,An error of theirs.,c071 18.00 10.00,30\n"
    )
    register_charades("test", root / "official.csv", root)
    records = load("test")
    assert records[0] == {
        "file_name": str(root / "e.mp4"),
        "label": (92, 147),
        "actions": ((92, 11.9, 21.2), (147, 0.0, 12.6)),
    }
    assert [record["label"] for record in records[1:]] == [(), (71,)]
    classes = MetadataCatalog.get("test").classes
    assert (len(classes), classes[0], classes[156]) == (157, "c000", "c156")
    assert MetadataCatalog.get("test").multi_label
    with (root / "official.csv").open("a") as file:
        file.write("e,S4,,c157 1 2,30\ngone,S5,,,30\n")
    with pytest.raises(
        ValueError, match=r"2 of 5.*\n  line 6: label 'c157'.*\n  line 7: no such f"
    ):
        register_charades("test", root / "official.csv", root)


def test_built_in_data_sets_are_read_when_needed(root, monkeypatch):
    with pytest.raises(ValueError, match="no data set 'kinetics' is registered"):
        load("kinetics")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    register_built_in()  # nothing is there yet
    with pytest.raises(ValueError, match="kinetics400/train: no such folder"):
        load("kinetics400_train")
    (root / "kinetics400" / "val" / "juggling").mkdir(parents=True)
    (root / "kinetics400" / "val" / "juggling" / "1.mp4").touch()
    (root / "kinetics400" / "train.csv").write_text("val/juggling/1.mp4 juggling\n")
    for split in ("train", "val"):
        assert len(load(f"kinetics400_{split}")) == 1
        assert MetadataCatalog.get(f"kinetics400_{split}").classes == ["juggling"]
    (root / "charades" / "Charades_v1_480").mkdir(parents=True)
    (root / "charades" / "Charades_v1_480" / "X.mp4").touch()
    (root / "charades" / "Charades_v1_test.csv").write_text("id,actions\nX,c003 1 2\n")
    assert load("charades_val")[0]["label"] == (3,)
    assert MetadataCatalog.get("charades_val").multi_label
    monkeypatch.undo()
    register_built_in()
