"""A generated data set in COCO's format, and videos."""

from __future__ import annotations

import json

import cv2
import numpy as np
from PIL import Image


def write_coco(folder, json_name, *, num_images, categories, keypoints=0):
    """Squares, each its own mask; keypoint k is the k-th corner of it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(1, num_images + 1):
        pixels = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
        x, y, size = (int(v) for v in rng.integers((4, 4, 24), (40, 20, 40)))
        pixels[y : y + size, x : x + size] += 120
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 96})
        corners = [(x, y), (x + size, y), (x + size, y + size), (x, y + size)]
        annotation = {
            "id": i,
            "image_id": i,
            "category_id": categories[0]["id"],
            "bbox": [x, y, size, size],
            "area": size * size,
            "iscrowd": 0,
            "segmentation": [[float(v) for corner in corners for v in corner]],
        }
        if keypoints:
            points = [[*corners[k % 4], 2] for k in range(keypoints)]
            annotation["keypoints"] = [v for point in points for v in point]
            annotation["num_keypoints"] = keypoints
        annotations.append(annotation)
    json_file = folder.parent / json_name
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file.write_text(json.dumps({"info": {}, "licenses": [], **content}))
    return json_file


def write_video(file, frames):
    """BGR images, five a second."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 5.0, (width, height))
    for frame in frames:
        writer.write(frame)
    writer.release()
    return file
