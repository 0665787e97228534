"""Figures of attention for a paper."""

from nl_detectron.analysis.drawing.canvas import Box, Detection, Subject
from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map, save_grid

__all__ = ["Box", "Detection", "Subject", "draw_arrows", "draw_heat_map", "save_grid"]
