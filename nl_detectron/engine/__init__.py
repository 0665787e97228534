"""Train, compare and run models; only :mod:`.coco` is specific to a task."""
