"""What trains, compares and predicts with a model; only :mod:`.coco` knows of a task."""
