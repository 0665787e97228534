"""The models; importing this registers them with detectron2."""

from .classifier import VideoClassifier
from .head import ClassificationHead
from .inflate import inflate, load_image_weights
from .resnet3d import POOLINGS, ResNet3d, make_non_local_resnet3d, make_resnet3d
from .tsm import TemporalShift, online

__all__ = [
    "POOLINGS",
    "ClassificationHead",
    "ResNet3d",
    "TemporalShift",
    "VideoClassifier",
    "inflate",
    "load_image_weights",
    "make_non_local_resnet3d",
    "make_resnet3d",
    "online",
]
