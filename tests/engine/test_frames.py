"""Images as they reach the tools; more of them, and videos, in test_predict.py."""

from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from PIL import Image

from nl_detectron.engine.frames import Images, make_output_folder, open_frames, print_summary
from tests.generated_coco import write_video


@pytest.fixture
def folder(tmp_path):
    """Two images, one upside down by its EXIF, files that are none, and one more in a folder."""
    pixels = np.zeros((37, 53, 3), dtype=np.uint8)
    pixels[:20, :30] = 40, 100, 200
    Image.fromarray(pixels).save(tmp_path / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "c.JPG", quality=100, exif=exif)
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.png").write_bytes(whole)
    (tmp_path / "a.png").write_bytes(whole[:99])
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
    out, err = capsys.readouterr()
    assert out == f"{folder}: ignoring 1 subfolder(s)\n"
    skipped = [line.split(":")[0] for line in err.splitlines()]
    assert skipped == [f"skipped {folder / name}" for name in ("a.png", "d.jpg")]


def test_image_that_is_refused(folder, capsys):
    for source in (folder, folder / "b.png"):
        images = Images(source)
        images.skip("b.png", ValueError("too dull"))
        images.skip("b.png", KeyError("x"))
        assert images.skipped == 2
        assert capsys.readouterr().err == (
            f"skipped {folder / 'b.png'}: too dull\nskipped {folder / 'b.png'}: KeyError: 'x'\n"
        )


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="contains no image"):
        Images(tmp_path)
    images = Images(tmp_path / "none.png")
    assert list(images) == []
    assert images.skipped == 1


def test_ids(folder):
    (folder / "0139.bmp").touch()
    images = Images(folder, image_ids={folder / "c.JPG": 5})
    images.check_ids()
    assert [frame.image_id for frame in images] == ["b", 5]
    with pytest.raises(ValueError, match=r"0139.bmp and a.png both have the id 139"):
        Images(folder, image_ids={folder / "a.png": 139}).check_ids()


def test_same_name_before_the_suffix(folder):
    (folder / "b.jpg").write_bytes((folder / "b.png").read_bytes())
    images = Images(folder)
    stems = {frame.name: images.stem(frame) for frame in images}
    assert stems == {"b.jpg": "b.jpg", "b.png": "b.png", "c.JPG": "c"}
    with pytest.raises(ValueError, match="b.jpg and b.png both have the id 'b'"):
        images.check_ids()


def test_time_is_linear_in_the_number_of_images(tmp_path):
    for i in range(30_000):
        (tmp_path / f"{i}.jpg").touch()
    start = time.process_time()
    Images(tmp_path).check_ids()
    assert time.process_time() - start < 3  # comparing all pairs took 8


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bits_are_scaled(tmp_path, name):
    values = np.array([[0, 100 * 257, 128 * 257, 65535]], dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / name), values)
    (frame,) = Images(tmp_path / name)
    assert frame.image.dtype == np.uint8
    assert frame.image.tolist() == [[[value] * 3 for value in (0, 100, 128, 255)]]


def test_pixels_without_a_known_range(tmp_path, capsys):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "depth.tif")
    assert list(Images(tmp_path)) == []
    assert "the range of its pixel values is unknown (mode F)" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_modes(tmp_path, mode):
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (3, 2), "white").convert(mode).save(file)
    (frame,) = Images(file)
    assert frame.image.tolist() == [[[255] * 3] * 3] * 2


class TestOutput:
    @pytest.fixture
    def video(self, tmp_path):
        return write_video(tmp_path / "clip.avi", [np.zeros((64, 96, 3), dtype=np.uint8)])

    @pytest.mark.parametrize("name", ["out.mp4", "out.jpg"])
    def test_images_need_a_folder(self, folder, name):
        for source in (folder, folder / "b.png"):
            with pytest.raises(ValueError, match=f"must be a folder for .* got .*{name}"):
                open_frames(str(source), folder / name)
        assert not (folder / name).exists()
        (folder / name).mkdir()
        open_frames(str(folder), folder / name)

    def test_what_is_read_is_not_replaced(self, folder, video):
        with pytest.raises(ValueError, match="would overwrite the input"):
            Images(folder / "b.png", output=folder / "x" / "..")
        video = video.rename(video.with_suffix(".mp4"))
        for output in (video, video.parent):
            with pytest.raises(ValueError, match="would overwrite the input"):
                open_frames(str(video), output)
        with pytest.raises(ValueError, match="or an .mp4 file .*out.mov"):
            open_frames(str(video), video.parent / "out.mov")

    @pytest.mark.parametrize(
        ("output", "file"),
        [("new.mp4", "new.mp4"), ("x/new.MP4", "x/new.MP4"), ("y", "y/clip.mp4")],
    )
    def test_video(self, video, output, file, capsys):
        frames = open_frames(str(video), video.parent / output)
        for frame in frames:
            frames.write(frame, frame.image)
        frames.close()
        drawn = cv2.VideoCapture(str(video.parent / file))
        assert drawn.read()[1].shape == (64, 96, 3)
        assert drawn.get(cv2.CAP_PROP_FPS) == 5
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "browsers" in line]
        assert line.startswith(f"{video.parent / file} is MPEG-4 Part 2")

    def test_what_cannot_be_written(self, folder):
        images = Images(folder / "b.png", output=folder / "out")
        (frame,) = images
        (folder / "out").rmdir()
        with pytest.raises(OSError, match=r"cannot write .*out.b\.png"):
            images.write(frame, frame.image)
        with pytest.raises(OSError, match=r"folder .*notes.txt cannot be created: File exists"):
            make_output_folder(folder / "notes.txt")


def test_report(capsys):
    print_summary("photos", 2, 3)
    with pytest.raises(SystemExit, match="no image of photos could be"):
        print_summary("photos", 0, 3)
    assert capsys.readouterr().out == "2 images done, 3 skipped\n0 images done, 3 skipped\n"
