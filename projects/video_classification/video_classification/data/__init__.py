"""Videos for training and testing: decode, sample, crop, load; and the data sets."""

from .catalog import load, register_built_in, register_charades, register_csv, register_folder
from .decode import UnreadableVideo, VideoReader, iter_frames, write_video
from .loader import (
    LoaderSpeed,
    TrainLoader,
    benchmark_loader,
    build_test_loader,
    build_train_loader,
)
from .mapper import VideoMapper
from .sampling import TEST_CLIPS

register_built_in()

__all__ = [
    "TEST_CLIPS",
    "LoaderSpeed",
    "TrainLoader",
    "UnreadableVideo",
    "VideoMapper",
    "VideoReader",
    "benchmark_loader",
    "build_test_loader",
    "build_train_loader",
    "iter_frames",
    "load",
    "register_built_in",
    "register_charades",
    "register_csv",
    "register_folder",
    "write_video",
]
