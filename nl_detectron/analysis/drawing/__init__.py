"""Publication-ready figures of attention."""

from nl_detectron.analysis.drawing.canvas import Box, Detection, FigureData
from nl_detectron.analysis.drawing.figures import draw_arrows, draw_heat_map, save_image_grid

__all__ = ["Box", "Detection", "FigureData", "draw_arrows", "draw_heat_map", "save_image_grid"]
