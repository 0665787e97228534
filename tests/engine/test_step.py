"""A training step against plain PyTorch: mixed precision, and steps that are not taken."""

from __future__ import annotations

import json
import math

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from nl_detectron.config import load_config
from nl_detectron.engine.coco.trainer import CocoTrainer
from nl_detectron.engine.step import TrainingStep
from tests.running import QUICK, TINY, forked

KEYPOINTS = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"


class Net(nn.Module):
    """Batch norm, dropout, and losses that are multiplied by what each image says."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout()
        self.linear = nn.Linear(20, 2)
        self.dropped = []

    def forward(self, batch):
        x = self.norm(self.conv(torch.stack([image["image"] for image in batch]))).relu()
        x = self.dropout(x.flatten(1))
        self.dropped.append(x.detach() == 0)
        y = self.linear(x)
        factor = torch.tensor([image["factor"] for image in batch])
        root = torch.tensor([image["root"] for image in batch])
        # The square root is 0, and has an infinite derivative, where root is 0.
        return {
            "loss_a": (y[:, 0] ** 2 * factor).mean(),
            "loss_b": (y[:, 1] ** 2 * root).sqrt().mean(),
        }


def image(i, factor=1.0, root=1.0):
    generator = torch.Generator().manual_seed(i)
    pixels = torch.randn(3, 4, 4, generator=generator)
    return {"image": pixels, "file_name": f"{i}.png", "factor": factor, "root": root}


def batches(**bad):
    """Five batches of two; the second image of the third one may be bad."""
    result = [[image(2 * i), image(2 * i + 1)] for i in range(5)]
    result[2][1].update(bad)
    return result


def trained(data, **options):
    """A net after a step on each batch, with its step and what was logged."""
    torch.manual_seed(0)
    net = Net()
    step = TrainingStep(net, data, torch.optim.SGD(net.parameters(), 0.1, 0.9), **options)
    with EventStorage() as storage:
        for step.iter in range(len(data)):
            storage.iter = step.iter
            torch.manual_seed(step.iter)
            step.run_step()
    return net, step, storage


def expected(data, skipped=()):
    """The state of a net that plain PyTorch trains without some of the batches."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    for i, batch in enumerate(data):
        if i not in skipped:
            torch.manual_seed(i)
            optimizer.zero_grad()
            sum(net(batch).values()).backward()
            optimizer.step()
    return net.state_dict()


def assert_equal(state, other):
    for name, value in other.items():
        assert torch.equal(state[name], value), name


def test_good_steps_are_plain_ones():
    data = batches()
    net, step, storage = trained(data)
    assert_equal(net.state_dict(), expected(data))
    assert step.nonfinite == 0
    logged = storage.histories()["total_loss"].values()
    assert [iteration for _, iteration in logged] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "bad",
    [{"factor": math.nan}, {"factor": math.inf}, {"root": math.inf}, {"root": 0.0}],
    ids=["loss nan", "loss inf", "other loss", "gradient"],
)
def test_bad_step_is_skipped(bad, caplog):
    """Weights, momentum and statistics are those of a training without the batch."""
    data = batches(**bad)
    net, step, storage = trained(data, max_nonfinite=1)
    assert_equal(net.state_dict(), expected(data, skipped={2}))
    assert step.nonfinite == 1
    logged = storage.histories()["total_loss"].values()
    assert [iteration for _, iteration in logged] == [0, 1, 3, 4]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("Iteration 2 is skipped")
    assert "1 of at most 1" in message
    assert message.endswith("for 4.png, 5.png")
    assert ("nan" in message or "inf" in message) == (bad != {"root": 0.0})


def test_loss_that_no_weight_can_change():
    """It is infinite, its gradients are zero."""

    class Constant(Net):
        def forward(self, batch):
            losses = super().forward([image(0), image(1)])
            return {"loss": sum(losses.values()) * 0 + batch[1]["factor"]}

    net = Constant()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step = TrainingStep(net, [batches(factor=math.inf)[2]], torch.optim.SGD(net.parameters(), 0.1))
    with EventStorage():
        step.run_step()
    assert step.nonfinite == 1
    assert_equal(net.state_dict(), before)


def test_parts():
    """The gradients of the parts of a batch are added up before the step."""
    data = batches()
    net, _, storage = trained(data, parts=2)
    torch.manual_seed(0)
    reference, logged = Net(), []
    optimizer = torch.optim.SGD(reference.parameters(), 0.1, 0.9)
    for i, batch in enumerate(data):
        torch.manual_seed(i)
        optimizer.zero_grad()
        losses = [sum(reference([part]).values()) / 2 for part in batch]
        for loss in losses:
            loss.backward()
        optimizer.step()
        logged.append(sum(losses).item())
    for name, value in reference.state_dict().items():
        assert_close(net.state_dict()[name], value, msg=name)
    values = [value for value, _ in storage.histories()["total_loss"].values()]
    assert values == pytest.approx(logged)


def test_count_is_in_the_checkpoint():
    _, step, _ = trained(batches(factor=math.nan))
    state = step.state_dict()
    _, other, _ = trained(batches())
    other.load_state_dict(state)
    assert other.nonfinite == 1
    del state["nonfinite"]  # as detectron2 saves it
    other.load_state_dict(state)
    assert other.nonfinite == 0


def test_one_too_many(tmp_path):
    """The report names the images and the first module at fault, in the pass that was at fault."""
    data = batches(factor=math.nan)
    data[4][0]["image"][0, 0, 0] = math.inf
    with pytest.raises(
        FloatingPointError, match=r"iteration 4 .*--max-nonfinite 1.*nonfinite.json"
    ):
        trained(data, max_nonfinite=1, output_dir=tmp_path)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (report["iteration"], report["skipped"]) == (4, 1)
    (process,) = report["processes"]
    assert process["images"] == ["8.png", "9.png"]
    assert process["first_module"] == "conv (Conv2d)"
    assert process["losses"] == {"loss_a": "nan", "loss_b": "nan"}


def test_report_on_gradients_and_losses(tmp_path):
    for bad, first in (({"root": 0.0}, None), ({"factor": math.nan}, "(Net)")):
        data = batches(**bad)
        torch.manual_seed(0)
        net = Net()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        step = TrainingStep(
            net,
            data[2:],
            torch.optim.SGD(net.parameters(), 0.1),
            max_nonfinite=0,
            output_dir=tmp_path,
        )
        torch.manual_seed(7)
        with EventStorage(), pytest.raises(FloatingPointError):
            step.run_step()
        drawn = torch.rand(1)
        assert_equal(net.state_dict(), before)
        (process,) = json.loads((tmp_path / "nonfinite.json").read_text())["processes"]
        assert process["first_module"] == first
        once, again = net.dropped  # the same numbers are drawn
        assert torch.equal(once, again)
        torch.manual_seed(7)
        net(data[2])
        assert torch.equal(drawn, torch.rand(1))  # what comes next is not changed by that
        if first is None:
            names = {"conv.weight", "conv.bias", "norm.weight", "norm.bias", "linear.weight"}
            assert set(process["gradients"]) == names | {"linear.bias"}


def test_overflow_of_the_scaler_is_no_fault():
    """It reduces the scale; what is not finite at a scale of 1 is a fault."""
    torch.manual_seed(0)
    net = Net()
    data = [batches(factor=1e6)[2], batches()[0], batches(factor=math.nan)[2]]
    step = TrainingStep(net, data, torch.optim.SGD(net.parameters(), 0.1))
    step._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-127)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with EventStorage():
        step.run_step()
        assert_equal(net.state_dict(), before)
        assert (step._scaler.get_scale(), step.nonfinite) == (1, 0)
        torch.manual_seed(0)
        step.run_step()
    reference = Net()
    reference.load_state_dict(before)
    torch.manual_seed(0)
    sum(reference(batches()[0]).values()).backward()
    assert_close(net.linear.weight, before["linear.weight"] - 0.1 * reference.linear.weight.grad)
    state = step.state_dict()
    assert state["grad_scaler"]["scale"] == 1
    step._scaler = torch.amp.GradScaler("cpu")
    step.load_state_dict(state)
    assert step._scaler.get_scale() == 1

    with EventStorage():
        step.run_step()
    assert step.nonfinite == 1


class Refusing(Net):
    """Finds out itself, as detectron2's region proposal network does."""

    def forward(self, batch):
        losses = super().forward(batch)
        if losses["loss_a"].isnan():
            raise FloatingPointError("scores contain Inf/NaN")
        return losses


def bad_in_one_process(rank, folder, net_class):
    torch.manual_seed(0)
    net = net_class()
    data = [[batch[rank]] for batch in batches(factor=math.nan)]
    for item in data:  # batch norm needs two
        item.append(image(100))
    data.append(data[2])
    model = DistributedDataParallel(net, broadcast_buffers=False)
    step = TrainingStep(
        model, data, torch.optim.SGD(net.parameters(), 0.1, 0.9), output_dir=folder, max_nonfinite=1
    )
    with EventStorage() as storage:
        for step.iter in range(5):
            storage.iter = step.iter
            torch.manual_seed(step.iter)
            step.run_step()
        torch.save((net.state_dict(), step.nonfinite), f"{folder}/{rank}.pth")
        with pytest.raises(FloatingPointError):
            step.run_step()


@pytest.mark.parametrize(
    ("net_class", "loss"), [(Net, "loss_a"), (Refusing, "scores contain Inf/NaN")]
)
def test_all_processes_skip(net_class, loss, tmp_path):
    """Only one of them has the bad image; the weights are those of a training without the batch."""
    forked(lambda *args: bad_in_one_process(*args, net_class), 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pth") for rank in range(2)]
    assert [count for _, count in found] == [1, 1]

    torch.manual_seed(0)
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9) for net in nets]
    for i in (0, 1, 3, 4):
        for rank, net in enumerate(nets):
            torch.manual_seed(i)
            net.zero_grad()
            sum(net([batches()[i][rank], image(100)]).values()).backward()
        for pair in zip(*(net.parameters() for net in nets)):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    for net, (state, _) in zip(nets, found):
        for name, value in net.state_dict().items():
            assert_close(state[name], value, msg=name)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    first, second = report["processes"]
    assert [first["images"], second["images"]] == [["4.png", "100.png"], ["5.png", "100.png"]]
    assert second["losses"][loss] == "nan" != first["losses"]["loss_a"]


def test_mixed_precision_on_the_cpu(custom_data_name, tmp_path):
    """A keypoint detector gets the gradients of plain bfloat16, not far from those of float32."""
    options = "MODEL.ROI_HEADS.NUM_CLASSES 1 MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS 2".split()
    options += (
        "SOLVER.AMP.ENABLED True SOLVER.CLIP_GRADIENTS.ENABLED False MODEL.DEVICE cpu".split()
    )
    cfg = load_config(KEYPOINTS, [*TINY, *options, "OUTPUT_DIR", str(tmp_path)])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (custom_data_name,), ()
    batch = next(iter(build_detection_train_loader(cfg)))

    class Trainer(CocoTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [batch]

    trainer = Trainer(cfg)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    torch.manual_seed(5)
    with EventStorage():
        trainer.run_step()
    state = trainer.model.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert sum(not torch.equal(state[name], value) for name, value in before.items()) > 50

    gradients = []
    for enabled in (True, False):
        reference = build_model(cfg)
        reference.load_state_dict(before)
        torch.manual_seed(5)
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled):
            loss = sum(reference(batch).values())
        loss.backward()
        gradients.append([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    half, single = (torch.cat(parts) for parts in gradients)
    found = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    assert (torch.cat(found) - half).norm() < 0.01 * half.norm()
    assert 0.9 < torch.cosine_similarity(half, single, dim=0) < 0.999
