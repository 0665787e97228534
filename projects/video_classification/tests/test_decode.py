"""Decoding, against OpenCV and against frames that hold their own number."""

import importlib.util
import sys
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from video_classification.data import UnreadableVideo, VideoReader, decode, iter_frames, write_video


def opencv_frames(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read())[0]:
        frames.append(frame[1][:, :, ::-1])
    return np.stack(frames)


def remux(source, target, change, **options):
    """Copy the packets of a video; ``change`` edits the list of them."""
    with av.open(str(source)) as old, av.open(str(target), "w", **options) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in change([p for p in old.demux(video=0) if p.size]):
            packet.stream = stream
            new.mux(packet)
    return target


def test_reads_the_frames_asked_for(coded_video, coded_frames):
    video = VideoReader(coded_video(70, fps=30))
    truth = np.stack(coded_frames(70))
    assert video.num_frames == 70
    assert video.fps == 30
    np.testing.assert_allclose(video.times, np.arange(70) / 30, atol=1e-4)
    for numbers in ([69, 0, 5, 5, 68], range(70), [0], [33]):
        np.testing.assert_array_equal(video.read(numbers), truth[list(numbers)])
    halves = video.read([9, 4], lambda image: image[::2, ::2])
    np.testing.assert_array_equal(halves, truth[[9, 4], ::2, ::2])
    with pytest.raises(IndexError, match=r"video.mp4 has 70 frames, got \[70\]"):
        video.read([70])


def test_converts_only_wanted_frames(coded_video):
    seen = []
    VideoReader(coded_video(20)).read(
        [3, 11, 3], lambda image: seen.append(image[0, 0, 0]) or image
    )
    assert seen == [3, 11]


# The header of brother.mkv has no number of frames, and one of its frames was dropped.
@pytest.mark.parametrize("name", ["asl/brother.mkv", "asl/eat.mkv", "odd_videos/video_90.mov"])
def test_equals_opencv_on_real_videos(real_videos, name):
    video = VideoReader(real_videos / name)
    truth = opencv_frames(real_videos / name)
    assert truth.shape[1:3] == ((568, 320) if "90" in name else (480, 640))
    np.testing.assert_array_equal(video.read(range(video.num_frames)), truth)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_turns_frames_upright(coded_video, coded_frames, tmp_path, degrees):
    # The display matrix of the track's header: rows (a, b, 0), (c, d, 0), 16.16 fixed point.
    a, b = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    file = bytearray(open(coded_video(3), "rb").read())
    at = file.index(b"tkhd") + 44
    for i, value in enumerate((a, b, 0, -b, a, 0)):
        file[at + 4 * i : at + 4 * i + 4] = (value << 16).to_bytes(4, "big", signed=True)
    (tmp_path / "turned.mp4").write_bytes(file)
    images = VideoReader(tmp_path / "turned.mp4").read([2, 0])
    clockwise = np.rot90(np.stack(coded_frames(3))[[2, 0]], -degrees // 90, axes=(1, 2))
    np.testing.assert_array_equal(images, clockwise)
    np.testing.assert_array_equal(images, opencv_frames(tmp_path / "turned.mp4")[[2, 0]])


def test_frames_before_the_edit_are_not_counted(coded_video, tmp_path):
    """Phones cut a video by telling players to begin late; what is before is decoded, not shown."""

    def ten_frames_earlier(packets):
        for packet in packets:
            packet.pts, packet.dts = (t - 10 * packet.duration for t in (packet.pts, packet.dts))
        return packets

    path = remux(coded_video(30), tmp_path / "cut.mp4", ten_frames_earlier)
    video = VideoReader(path)
    assert video.num_frames == 20
    assert video.read(range(20))[:, 0, 0, 0].tolist() == list(range(10, 30))


def test_names_what_is_unreadable(tmp_path, coded_video):
    good = coded_video(60)
    whole = open(good, "rb").read()
    assert whole.index(b"moov") < whole.index(b"mdat")  # else a part is not even opened
    (tmp_path / "part.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 100)
    mkv = remux(good, tmp_path / "whole.mkv", list)
    assert VideoReader(mkv).num_frames == 60
    (tmp_path / "part.mkv").write_bytes(mkv.read_bytes()[: mkv.stat().st_size // 2])
    reasons = {
        "part.mp4": r"it ends after \d.\d\d of 6.00 seconds",
        "part.mkv": r"it ends after \d.\d\d of 6.00 seconds",
        "empty.mp4": "Invalid data",
        "text.mp4": "Invalid data",
        "missing.mp4": "No such file",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableVideo, match=rf"{name}: {reason}"):
            VideoReader(tmp_path / name)


def test_fewer_frames_than_packets(tmp_path, coded_frames):
    with av.open(str(tmp_path / "whole.webm"), "w") as container:
        stream = container.add_stream("libvpx", 10)
        stream.width, stream.height = 64, 48
        for image in coded_frames(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

    def hide_the_last_three(packets):
        for i, old in enumerate(packets[-3:], start=17):
            # Bit 4 of a VP8 frame: show it.
            packets[i] = av.Packet(bytes([bytes(old)[0] & ~16]) + bytes(old)[1:])
            packets[i].pts, packets[i].dts = old.pts, old.dts
            packets[i].time_base, packets[i].duration = old.time_base, old.duration
        return packets

    video = VideoReader(remux(tmp_path / "whole.webm", tmp_path / "few.webm", hide_the_last_three))
    assert video.num_frames == 20
    assert len(video.read([3, 16])) == 2
    with pytest.raises(UnreadableVideo, match="few.webm: only 17 of its 20 frames can be decoded"):
        video.read([3, 19])


def test_broken_in_the_middle(real_videos):
    video = VideoReader(real_videos / "odd_videos" / "corrupted.mp4")
    assert video.num_frames == 50
    assert video.read([0, 20]).shape[0] == 2
    with pytest.raises(UnreadableVideo, match="corrupted.mp4: Invalid data"):
        video.read([49])


def test_seconds_follow_time_stamps(tmp_path, coded_frames):
    """A phone's frames are not evenly spaced."""
    # Tenths of a second; the first frame is at 0. Packets are not in this order: B-frames.
    stamps = [5, 7, 8, 20, 21, 22, 30, 31, 33]
    # A raw stream has no time stamps; 25 frames a second by convention.
    for name in ("uneven.mkv", "raw.h264"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", 10)
            stream.width, stream.height = 64, 48
            for stamp, image in zip(stamps, coded_frames(9)):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = stamp, Fraction(1, 10)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    uneven = [0, 0.2, 0.3, 1.5, 1.6, 1.7, 2.5, 2.6, 2.8]
    for name, expected in (("uneven.mkv", uneven), ("raw.h264", np.arange(9) / 25)):
        np.testing.assert_allclose(VideoReader(tmp_path / name).times, expected, atol=1e-6)
        seconds, images = zip(*iter_frames(tmp_path / name))
        np.testing.assert_allclose(seconds, expected, atol=1e-6)
        np.testing.assert_array_equal(images, VideoReader(tmp_path / name).read(range(9)))


def test_writes_what_browsers_play(tmp_path, coded_frames):
    frames = [np.ascontiguousarray(image[:, ::-1]) for image in coded_frames(30, 47, 65)]
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, iter(frames), fps=30000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == Fraction(30000, 1001)
    written = VideoReader(tmp_path / "a.mp4").read(range(30)).astype(int)
    assert written.shape == (30, 48, 66, 3)  # even
    assert np.abs(written[:, :47, :65] - np.stack(frames)).mean() < 3
    file = (tmp_path / "a.mp4").read_bytes()
    assert file.index(b"moov") < file.index(b"mdat")  # plays before it is loaded
    assert file == (tmp_path / "b.mp4").read_bytes()
    with pytest.raises(ValueError, match="none.mp4: no frames to write"):
        write_video(tmp_path / "none.mp4", [], 30)


def test_pyav_is_optional_until_it_is_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    spec = importlib.util.spec_from_file_location("decode_without_av", decode.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match=r"pip install 'nl_detectron\[video\]'"):
        module.VideoReader(tmp_path / "video.mp4")
