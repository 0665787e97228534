"""Conversion of checkpoints between libraries; see :func:`convert`."""

from nl_detectron.weights.blocks import OPTIONS, Block
from nl_detectron.weights.convert import Conversion, convert
from nl_detectron.weights.dialects import DIALECTS
from nl_detectron.weights.files import load, save
from nl_detectron.weights.report import report

__all__ = ["DIALECTS", "OPTIONS", "Block", "Conversion", "convert", "load", "report", "save"]
