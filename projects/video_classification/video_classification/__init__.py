"""Video classification: C2D, I3D and TSM with non-local blocks, built by detectron2."""

from .config import add_video_config
from .models import VideoClassifier

__all__ = ["VideoClassifier", "add_video_config"]
