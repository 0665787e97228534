"""Hook for detectron2's tools and ours: ``DETECTRON2_ENV_MODULE=video_classification.env``.

As in :mod:`nl_detectron.env`, nothing is imported up here.
"""


def setup_environment() -> None:
    """Register the models, and let ``get_cfg()`` know ``MODEL.NON_LOCAL`` and ``MODEL.VIDEO``."""
    from detectron2.config.defaults import _C

    from nl_detectron.config import add_non_local_config

    from . import models  # registers them
    from .config import add_video_config

    del models
    add_non_local_config(_C)
    add_video_config(_C)
