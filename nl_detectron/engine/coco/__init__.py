"""Everything specific to COCO detection: data sets, class names, AP."""
