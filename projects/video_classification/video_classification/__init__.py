"""Video classification: C2D, I3D and TSM with non-local blocks, built by detectron2."""

# First of all, as it imports detectron2, which calls back into this package if
# DETECTRON2_ENV_MODULE names it.
import nl_detectron  # isort: skip

from .config import add_video_config
from .models import VideoClassifier

__all__ = ["VideoClassifier", "add_video_config"]

del nl_detectron  # not a name of this package
