"""Inspect a model: draw its attention, measure what its blocks do, and count what they cost."""
