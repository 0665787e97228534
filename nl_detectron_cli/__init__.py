"""The commands, apart from the package whose import takes seconds, for PyTorch and detectron2."""
