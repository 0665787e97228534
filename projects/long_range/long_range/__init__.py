"""A data set in which an object's class depends on something far away, and its models."""
