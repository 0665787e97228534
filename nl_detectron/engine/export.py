"""Programs: a detector or its backbone for torch.export, ONNX and TorchScript, for all image sizes.

A program takes pixels as the network does, in the order of ``INPUT.FORMAT`` and at the size that
the network sees; it normalizes and pads them. It returns named tensors: the maps of the backbone,
or the detections before they are scaled to the original image. detectron2 supports tracing by
TorchScript, not torch.export, which does not know how many objects there will be:
:func:`_exportable` replaces what depends on that number in Python.

Shapes: N batch, H W image, R RoIs, J keypoints.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from detectron2.export import TracingAdapter
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.modeling import GeneralizedRCNN, poolers
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import fast_rcnn, keypoint_head
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torch._higher_order_ops.while_loop import while_loop
from torch.overrides import TorchFunctionMode

from nl_detectron.non_local import find_blocks

Outputs = dict[str, Tensor]
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")

# Of values, relative to the largest; the formats differ in the order of their sums.
TOLERANCE = 1e-4


class BackboneProgram(nn.Module):
    """Images (N, 3, H, W) -> the maps of the backbone."""

    def __init__(self, model: Any):
        """Wrap a detector, a ``GeneralizedRCNN`` for example."""
        super().__init__()
        self.model = model.eval()

    @property
    def min_size(self) -> int:
        """The least height and width: the smallest map must have two rows and columns."""
        return max(shape.stride for shape in self.model.backbone.output_shape().values()) + 1

    def forward(self, images: Tensor) -> Outputs:
        """Compute the maps, by their names."""
        return self.model.backbone(self._padded(images))

    def inputs(self, image: Tensor, batch: int) -> Tensor:
        """Return a batch of 1 to 3 images: (3, H, W), and its mirror images."""
        return torch.stack([image, image.flip(2), image.flip(1)][:batch])

    def run_stock(self, images: Tensor) -> Outputs:
        """Return what the model computes without this class."""
        inputs = [{"image": image} for image in images]
        return self.model.backbone(self.model.preprocess_image(inputs).tensor)

    def trace(self, images: Tensor) -> TracingAdapter:
        """Return the model with detectron2's adapter for ``torch.jit.trace``."""
        return TracingAdapter(self, images)

    def _padded(self, images: Tensor) -> Tensor:
        images = (images - self.model.pixel_mean) / self.model.pixel_std
        stride = max(self.model.backbone.size_divisibility, 1)
        height, width = images.shape[-2:]
        # Not with -(-height // stride): ONNX rounds towards zero.
        bottom = (height + stride - 1) // stride * stride - height
        right = (width + stride - 1) // stride * stride - width
        return F.pad(images, [0, right, 0, bottom])


class DetectorProgram(BackboneProgram):
    """Image (3, H, W) -> its detections, ``Instances``' fields before post-processing."""

    def __init__(self, model: Any):
        """Wrap a detector.

        Raises:
            ValueError: it is not a ``GeneralizedRCNN``.
        """
        super().__init__(model)
        if not isinstance(model, GeneralizedRCNN):
            raise ValueError(
                "the whole model can only be exported with MODEL.META_ARCHITECTURE "
                f"GeneralizedRCNN, got {type(model).__name__}; its backbone can"
            )

    def forward(self, image: Tensor) -> Outputs:
        """Detect objects."""
        images = ImageList(self._padded(image[None]), [tuple(image.shape[1:])])
        features = self.model.backbone(images.tensor)
        proposals, _ = self.model.proposal_generator(images, features, None)
        (found,), _ = self.model.roi_heads(images, features, proposals, None)
        return _tensors(found)

    def inputs(self, image: Tensor, batch: int) -> Tensor:
        """Return the image: detectors take one."""
        return image

    def run_stock(self, image: Tensor) -> Outputs:
        """Return what the model computes without this class."""
        return _tensors(self.model.inference([{"image": image}], do_postprocess=False)[0])

    def trace(self, image: Tensor) -> TracingAdapter:
        """Return the model with detectron2's adapter for ``torch.jit.trace``."""

        def detect(model: Any, inputs: Any) -> Outputs:
            return _tensors(model.inference(inputs, do_postprocess=False)[0])

        return TracingAdapter(self.model, [{"image": image}], detect)


PROGRAMS = {"model": DetectorProgram, "backbone": BackboneProgram}


def save(program: BackboneProgram, path: Path, file_format: str, image: Tensor) -> None:
    """Write a program to a file.

    Args:
        program: what to export.
        path: the file.
        file_format: torch, onnx or torchscript.
        image: (3, H, W). Tracing follows it: it should show objects.

    Raises:
        ModuleNotFoundError: ONNX's packages are missing.
        ValueError: a whole detector as ONNX.
    """
    if file_format == "torchscript":
        images = program.inputs(image, 2)
        adapter = program.trace(images)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constants in the trace: see check()
            traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        # The adapter returns the tensors of a dict as a tuple, sorted by name.
        names = sorted(program.run_stock(images))
        traced.save(str(path), _extra_files={"outputs.json": json.dumps(names)})
    elif file_format == "onnx":
        if isinstance(program, DetectorProgram):
            raise ValueError("format onnx is for backbones, got a whole detector")
        with block_paths(program, file_format):
            exported = export(program, image)
        save_onnx(exported, path, list(program.run_stock(program.inputs(image, 1))))
    else:
        torch.export.save(export(program, image), path)


def export(program: BackboneProgram, image: Tensor) -> torch.export.ExportedProgram:
    """Return a program by torch.export, for all sizes from ``program.min_size`` on."""
    images = program.inputs(image, 2)  # a batch of one would be fixed
    size = partial(torch.export.Dim, min=program.min_size)
    shapes = {images.dim() - 2: size("height"), images.dim() - 1: size("width")}
    if images.dim() == 4:
        shapes[0] = torch.export.Dim("batch")
    # The layout of channels-last weights would be checked for each size.
    program.to(memory_format=torch.contiguous_format)
    with _exportable(), torch.no_grad():
        return torch.export.export(program, (images,), dynamic_shapes=(shapes,))


def save_onnx(exported: torch.export.ExportedProgram, path: Path, names: list[str]) -> None:
    """Write what torch.export made of a network in ONNX's format.

    Args:
        exported: takes one batch of images or maps. Export it with :func:`block_paths`.
        path: the file.
        names: of the outputs.
    """
    for name in ONNX_PACKAGES:
        _import_onnx(name)
    program: Any = torch.onnx.export(
        exported, input_names=["images"], output_names=names, verbose=False
    )
    program.save(path)


@contextmanager
def block_paths(model: nn.Module, file_format: str) -> Iterator[None]:
    """Let blocks take the paths of the program in a file of this format.

    They are those that :func:`nl_detectron.ops.choose_path` takes in a program, except that ONNX
    cannot search in a sorted list.
    """
    program_paths = {
        "gaussian": "fused",
        "embedded_gaussian": "fused",
        "dot_product": "linear",
        "concatenation": "naive" if file_format == "onnx" else "sorted",
    }
    blocks = list(find_blocks(model).values())
    paths = [block.path for block in blocks]
    for block in blocks:
        block.path = program_paths[block.pairwise]
    try:
        yield
    finally:
        for block, path in zip(blocks, paths):
            block.path = path


def load(path: Path, file_format: str) -> Callable[[Tensor], Outputs]:
    """Return a function that runs the program in a file."""
    if file_format == "torch":
        return torch.export.load(path).module()
    if file_format == "torchscript":
        extra = {"outputs.json": ""}
        traced = torch.jit.load(str(path), _extra_files=extra)
        names = json.loads(extra["outputs.json"])
        return lambda images: dict(zip(names, traced(images)))
    session = _import_onnx("onnxruntime").InferenceSession(path)
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Outputs:
        outputs = session.run(None, {"images": images.cpu().numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs)}

    return run


def check(
    program: BackboneProgram, run: Callable[[Tensor], Outputs], file_format: str, image: Tensor
) -> Iterator[str]:
    """Compare a program that was loaded with the model it was made of, at three sizes.

    The blocks of the model take the paths of the program: an untrained network can make large
    differences of the rounding errors of another one.

    Args:
        program: the program before it was saved.
        run: the one that was loaded.
        file_format: of the file that it was loaded from.
        image: (3, H, W); a backbone gets batches of one to three.

    Yields:
        What agreed at each size, in words.

    Raises:
        ValueError: an output differs.
    """
    objects = 0
    for batch, scale in enumerate((1, 0.71, 0.53), 1):
        size = [max(round(n * scale), program.min_size) for n in image.shape[1:]]
        resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
        images = program.inputs(resized, batch)
        with torch.no_grad(), block_paths(program, file_format):
            expected, got = program.run_stock(images), run(images)
        name, difference = max(compare(expected, got).items(), key=lambda item: item[1])
        where = f"{size[0]} x {size[1]}"
        if difference > TOLERANCE:
            raise ValueError(
                f"the exported file must agree with the model to {TOLERANCE}, but at {where} "
                f"{name} differs by {difference:.1e} of its largest value"
            )
        found = len(got["scores"]) if "scores" in got else None
        objects += found or 0
        where += f", batch of {batch}" if found is None else f", {found} objects"
        yield f"{where}: agrees to {difference:.1e} ({name})"
    if isinstance(program, DetectorProgram) and not objects:
        yield "no objects were found, so masks and keypoints were not compared: try another image"


def compare(expected: Outputs, got: Outputs) -> dict[str, float]:
    """Return the largest difference of each output, relative to its largest value (at least 1).

    It is infinite for another shape. Keypoints are compared with those that detectron2 decodes
    from the heatmaps in ``got``: between two maxima a rounding error decides.
    """
    if "pred_keypoints" in got and got["pred_boxes"].shape == expected["pred_boxes"].shape:
        decoded = keypoint_head.heatmaps_to_keypoints(
            got["pred_keypoint_heatmaps"], got["pred_boxes"]
        )
        expected = {**expected, "pred_keypoints": decoded[:, :, [0, 1, 3]]}
    return {name: _difference(expected[name], got[name]) for name in expected}


def _difference(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    expected, got = expected.double(), got.double()
    largest = expected.abs().max().clamp(min=1)
    difference = ((expected - got).abs().max() / largest).item()
    return difference if difference == difference else float("inf")


def _tensors(found: Instances) -> Outputs:
    """The fields of detections, sorted by name."""
    fields = sorted(found.get_fields().items())
    return {name: value.tensor if isinstance(value, Boxes) else value for name, value in fields}


@contextmanager
def _exportable() -> Iterator[None]:
    """Replace code of detectron2 that torch.export cannot follow, for as long as it runs."""
    with ExitStack() as stack:
        for module, name, function in (
            (proposal_utils, "_is_tracing", lambda: True),  # always filters empty boxes
            (proposal_utils, "min", torch.sym_min),  # of the number of anchors, which varies
            # As torchvision's batched_nms: for thousands of boxes, exact; else in their own dtype.
            (proposal_utils, "batched_nms", partial(_batched_nms, dtype=torch.float64)),
            (fast_rcnn, "batched_nms", partial(_batched_nms, dtype=torch.float32)),
            # (0, x1, y1, x2, y2): all boxes are in the first image, the only one.
            (poolers, "convert_boxes_to_pooler_format", lambda b: F.pad(b[0].tensor, (1, 0))),
            (keypoint_head, "heatmaps_to_keypoints", _heatmaps_to_keypoints),
        ):
            create = name == "min"  # it hides the built-in function
            stack.enter_context(mock.patch.object(module, name, function, create=create))
        stack.enter_context(patch_builtin_len(["detectron2.structures.instances"]))
        stack.enter_context(_NoQuestions())
        yield


class _NoQuestions(TorchFunctionMode):
    """Answers what detectron2 asks of values and sizes that a program does not know yet.

    Whether a tensor is true: detectron2 asks if all boxes are finite, and drops those that are not
    (a program drops the nan ones, which count as empty). How many elements it has: detectron2 asks
    if it is empty, for the sake of older versions of PyTorch.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.__bool__:
            return True
        if function is torch.Tensor.numel:
            return 1
        return function(*args, **(kwargs or {}))


def _batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, *, dtype: torch.dtype
) -> Tensor:
    """Non-maximum suppression within groups: those of other groups are shifted out of reach."""
    # Two boxes of no size: they are kept, as the last ones, because torchvision tells torch.export
    # that two or more always are.
    boxes, scores, groups = (
        F.pad(boxes, (0, 0, 0, 2)),
        F.pad(scores, (0, 2), value=float("-inf")),
        F.pad(groups, (0, 2)),
    )
    boxes = boxes.to(dtype)
    shifted = boxes + (groups.to(dtype) * (boxes.amax() + 1))[:, None]
    return torchvision.ops.nms(shifted, scores.to(dtype), threshold)[:-2]


def _heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """detectron2's function of the same name, with a loop that torch.export can follow.

    Args:
        maps: (R, J, S, S).
        rois: (R, 4).

    Returns:
        (R, J, 4) of x, y, logit, score.
    """
    number, joints = maps.shape[:2]
    places = torch.arange(number, device=maps.device)

    def unfinished(i: Tensor, found: Tensor) -> Tensor:
        return i < maps.shape[0]

    def decode_one(i: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        small, roi = maps.index_select(0, i[None]), rois.index_select(0, i[None])[0]
        size = (roi[2:] - roi[:2]).clamp(min=1)
        width, height = (int(n.item()) for n in size.ceil().long().unbind())
        for n in (width, height):
            torch._check(n >= 1)
        large = F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False)
        logit, position = large.reshape(joints, -1).max(dim=1)
        score = 1 / (small[0] - logit[:, None, None]).exp().sum((1, 2))
        xy = torch.stack([position % width, position // width], dim=1)
        xy = (xy.to(size.dtype) + 0.5) * (size / size.ceil()) + roi[:2]
        row = torch.cat([xy, logit[:, None], score[:, None]], dim=1)
        return i + 1, torch.where((places == i)[:, None, None], row, found)

    start = torch.zeros((), dtype=torch.int64, device=maps.device)
    _, keypoints = while_loop(unfinished, decode_one, (start, maps.new_zeros(number, joints, 4)))
    return keypoints


def _import_onnx(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"format onnx needs the package {name}: pip install {' '.join(ONNX_PACKAGES)}",
            name=name,
        ) from None
