"""Hook for detectron2's tools and ours: ``DETECTRON2_ENV_MODULE=video_classification.env``.

As in :mod:`nl_detectron.env`, nothing is imported up here.
"""


def setup_environment() -> None:
    """Register the models and their predictor, and let ``get_cfg()`` know the packages' keys."""
    from detectron2.config.defaults import _C

    from nl_detectron.config import PREDICTORS, add_non_local_config

    from . import models  # registers them
    from .config import add_video_config

    def predictor(*args):
        from .predictor import VideoPredictor  # reads videos, which only some commands do

        return VideoPredictor(*args)

    del models
    add_non_local_config(_C)
    add_video_config(_C)
    PREDICTORS["VideoClassifier"] = predictor
