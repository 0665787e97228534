"""Images as they reach the tools; more of them, and videos, in test_predict.py."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.structures import Instances
from PIL import Image

from nl_detectron.frames import Images, report_done


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them upside down by its EXIF, and files that are none."""
    pixels = np.zeros((37, 53, 3), dtype=np.uint8)
    pixels[:20, :30] = 40, 100, 200
    Image.fromarray(pixels).save(tmp_path / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "c.JPG", quality=100, exif=exif)
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:99])
    (tmp_path / "d.jpg").write_text("no image")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_folder(folder, capsys):
    images = Images(folder)
    seen = {frame.name: frame.image for frame in images}
    assert list(seen) == ["b.png", "c.JPG"]
    assert seen["b.png"].shape == (37, 53, 3)
    assert seen["b.png"][0, 0].tolist() == [200, 100, 40]  # BGR
    assert np.abs(seen["c.JPG"][::-1, ::-1].astype(int) - seen["b.png"]).mean() < 3
    assert (len(images), images.skipped) == (4, 2)
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"skipped {folder / 'a.png'}",
        f"skipped {folder / 'd.jpg'}",
    ]


def test_image_that_is_refused(folder, capsys):
    for source in (folder, folder / "b.png"):
        images = Images(source)
        images.skip("b.png", ValueError("too dull"))
        assert images.skipped == 1
        assert capsys.readouterr().err == f"skipped {folder / 'b.png'}: too dull\n"


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        Images(tmp_path)
    images = Images(tmp_path / "none.png")
    assert list(images) == []
    assert images.skipped == 1


def test_several_of_one_id(folder):
    (folder / "b.jpg").touch()
    with pytest.raises(ValueError, match="several images of the id 'b'"):
        Images(folder)


def test_picture_that_cannot_be_written(folder):
    images = Images(folder / "b.png")
    (frame,) = images
    with pytest.raises(OSError, match=r"cannot write .*none.b\.png"):
        images.draw(frame, Instances((37, 53)), folder / "none")


def test_report(capsys):
    report_done("photos", 2, 3)
    with pytest.raises(SystemExit, match="nothing could be done with photos"):
        report_done("photos", 0, 3)
    assert capsys.readouterr().out == "2 images done, 3 skipped\n0 images done, 3 skipped\n"
