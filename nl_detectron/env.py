"""Hook for unmodified detectron2 tools: ``DETECTRON2_ENV_MODULE=nl_detectron.env``.

detectron2 calls :func:`setup_environment` at the start of its own import, when it is half
imported. So nothing is imported up here, and ``detectron2.__version__`` does not exist inside.
"""


def setup_environment() -> None:
    """Register the package's builders and head, and let ``get_cfg()`` know ``MODEL.NON_LOCAL``."""
    from detectron2.config.defaults import _C

    # Importing the package is what registers.
    from nl_detectron.config import add_non_local_config

    add_non_local_config(_C)
