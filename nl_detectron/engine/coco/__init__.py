"""All that knows COCO detection: data sets, names of classes, AP."""
