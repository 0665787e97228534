"""Fixtures of all tests: a fixed seed, a quiet detectron2, devices and small configs."""

from __future__ import annotations

import logging

import pytest
import torch

from nl_detectron.config import default_config
from nl_detectron.engine.coco.files import register_coco_files
from tests.generated_coco import write_coco
from tests.running import NO_GPU, forget_custom_data
from tests.tested import record


def pytest_sessionfinish(session, exitstatus):
    record(session.config, exitstatus)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _custom_data_of_one_test():
    yield
    forget_custom_data()


@pytest.fixture(autouse=True, scope="session")
def _quiet():
    for name in ("detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep what is cached between runs in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request):
    return request.param


@pytest.fixture
def cfg():
    """The defaults of detectron2 and of the package, on the CPU: what the hook gives get_cfg()."""
    cfg = default_config()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


SMALL = """
    MODEL.MASK_ON True MODEL.KEYPOINT_ON True MODEL.BACKBONE.NAME build_resnet_fpn_backbone
    MODEL.RESNETS.OUT_FEATURES ['res2','res3','res4','res5'] MODEL.RESNETS.STEM_OUT_CHANNELS 8
    MODEL.RESNETS.RES2_OUT_CHANNELS 32 MODEL.RESNETS.WIDTH_PER_GROUP 8
    MODEL.FPN.IN_FEATURES ['res2','res3','res4','res5'] MODEL.FPN.OUT_CHANNELS 16
    MODEL.ANCHOR_GENERATOR.SIZES [[32],[64],[128],[256],[512]]
    MODEL.RPN.IN_FEATURES ['p2','p3','p4','p5','p6']
    MODEL.RPN.POST_NMS_TOPK_TRAIN 20 MODEL.RPN.POST_NMS_TOPK_TEST 20
    MODEL.ROI_HEADS.NAME StandardROIHeads MODEL.ROI_HEADS.IN_FEATURES ['p2','p3','p4','p5']
    MODEL.ROI_HEADS.NUM_CLASSES 1 MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 10
    MODEL.ROI_BOX_HEAD.NAME FastRCNNConvFCHead MODEL.ROI_BOX_HEAD.NUM_FC 1
    MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION 7
    MODEL.ROI_MASK_HEAD.NAME MaskRCNNConvUpsampleHead MODEL.ROI_MASK_HEAD.NUM_CONV 1
    MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 5
    MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS (32,32,32,32,32,32,32,32)
""".split()


@pytest.fixture
def small_cfg(cfg):
    """A Keypoint + Mask R-CNN with FPN, R-50 by its blocks, an eighth of it by its channels."""
    cfg.merge_from_list(SMALL)
    return cfg


@pytest.fixture
def nl_cfg(small_cfg):
    """The same with blocks in the backbone and in the keypoint head."""
    small_cfg.MODEL.BACKBONE.NAME = "build_non_local_resnet_fpn_backbone"
    small_cfg.MODEL.ROI_KEYPOINT_HEAD.NAME = "NonLocalKeypointHead"
    return small_cfg


@pytest.fixture(scope="session")
def custom_data(tmp_path_factory):
    """Two classes of things with two keypoints: nothing that detectron2 has built in."""
    folder = tmp_path_factory.mktemp("own")
    names = ["left_end", "right_end"]
    categories = [{"id": 3, "name": "bar", "keypoints": names, "skeleton": []}]
    return write_coco(
        folder / "images", "bars.json", num_images=4, categories=categories, keypoints=2
    )


@pytest.fixture(scope="session")
def custom_data_name(custom_data):
    """Its name in detectron2's catalog."""
    register_coco_files("custom_data", str(custom_data), str(custom_data.parent / "images"))
    return "custom_data"
