"""A data set in which what an object is depends on something far away, and twins to train on it."""
