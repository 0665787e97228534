"""The configs of this package by name, as ``detectron2.model_zoo`` has detectron2's."""

from nl_detectron.model_zoo.files import find_config_file, get_config_file, names
from nl_detectron.model_zoo.model_zoo import get, get_config

__all__ = ["find_config_file", "get", "get_config", "get_config_file", "names"]
