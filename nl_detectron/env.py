"""Hook for unmodified detectron2 tools: ``DETECTRON2_ENV_MODULE=nl_detectron.env``.

detectron2 calls :func:`setup_environment` at the start of its own import, while it is only half
imported. Hence nothing is imported at module level here, and ``detectron2.__version__`` does not
exist yet when the hook runs.
"""


def setup_environment() -> None:
    """Register the package's builders and head, and add ``MODEL.NON_LOCAL`` to ``get_cfg()``."""
    from detectron2.config.defaults import _C

    # Importing the package registers its builders and head.
    from nl_detectron.config import add_non_local_config

    add_non_local_config(_C)
