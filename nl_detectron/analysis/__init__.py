"""What looks at a model: its attention, drawn; what its blocks do, and what they cost."""
