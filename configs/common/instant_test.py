"""The LazyConfig counterpart of quick_schedules/Base-instant-test.yaml."""


def make_instant(dataloader, lr_multiplier, model, optimizer, train):
    """Turn a full config into a short run from scratch on small images."""
    bottom_up = model.backbone.bottom_up
    bottom_up.freeze_at = 0
    bottom_up.stem.norm = bottom_up.stages.norm = model.backbone.norm = "GN"
    if "roi_heads" in model:
        model.proposal_generator.post_nms_topk = (200, 100)
        model.roi_heads.batch_size_per_image = 16
        model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=10)
        if "mask_head" in model.roi_heads:
            model.roi_heads.mask_head.conv_norm = "GN"
        if "keypoint_head" in model.roi_heads:
            model.roi_heads.keypoint_head.conv_dims = [64] * 8
    else:
        model.max_detections_per_image = 10
        model.test_score_thresh = 0.0

    for loader, short_edge in ((dataloader.train, (128,)), (dataloader.test, 128)):
        loader.num_workers = 0
        loader.mapper.augmentations[0].update(short_edge_length=short_edge, max_size=224)
    dataloader.train.total_batch_size = 2

    lr_multiplier.scheduler.update(values=[1.0, 0.1], milestones=[15, 20])
    lr_multiplier.warmup_length = 5 / 20
    optimizer.lr = 0.005
    train.update(init_checkpoint="", max_iter=20, eval_period=0)
