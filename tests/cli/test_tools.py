"""The tools, run as a person runs them, on a generated data set in COCO's format."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.datasets.builtin_meta import (
    COCO_CATEGORIES,
    COCO_PERSON_KEYPOINT_NAMES,
)
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from nl_detectron import add_non_local_config
from nl_detectron.analysis.detector_cost import Workload, block_rows, count_parameters_and_gmac
from nl_detectron.config import load_config, without_blocks
from nl_detectron_cli import COMMANDS, analyze, overfit, train
from tests.generated_coco import write_coco
from tests.running import QUICK, ROOT, TINY, custom_data_arguments, run


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Generated pictures under the names and categories of COCO 2017: a DETECTRON2_DATASETS."""
    root = tmp_path_factory.mktemp("datasets")
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    person = [{**things[0], "keypoints": COCO_PERSON_KEYPOINT_NAMES, "skeleton": []}]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        images = root / "coco" / split
        for kind, categories in (("instances", things), ("person_keypoints", person)):
            keypoints = 17 * (kind == "person_keypoints")
            name = f"annotations/{kind}_{split}.json"
            write_coco(images, name, num_images=2, categories=categories, keypoints=keypoints)
    return root


SCRIPTS = [*sorted((ROOT / "tools").glob("*.py")), ROOT / "projects/long_range/demo.py"]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        *((path.name, [path]) for path in SCRIPTS),
        *((f"nl-detectron {name}", ["-m", "nl_detectron_cli", name]) for name in COMMANDS),
    ],
)
def test_help_imports_the_standard_library_alone(program, command):
    """Without what takes seconds to import; and it shows how it was called, and the defaults."""
    command = [sys.executable, "-X", "importtime", *command, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {program} [-h]")
    imported = re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.MULTILINE)
    assert "argparse" in imported
    assert {"torch", "numpy", "detectron2", "nl_detectron"}.isdisjoint(imported)
    for option, default in {"--count": 8, "--num-gpus": 1, "--image-size": "800 1333"}.items():
        if f"  {option} " in done.stdout:
            (text,) = re.findall(rf"^  {option} [^-]*", done.stdout, re.MULTILINE)
            assert f"(default: {default})" in " ".join(text.split())


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


class TestStockTools:
    """detectron2's own scripts, with nothing but the hook."""

    def test_train_net_trains_resumes_and_evaluates(self, coco, tmp_path):
        config = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
        command = ["-m", "tools.train_net", "--config-file", config]
        options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path, *TINY, "TEST.EVAL_PERIOD", "0"]
        done = run(*command, *options, hook=True, datasets=coco)
        assert done.returncode == 0, done.stderr
        assert {"bbox/AP", "segm/AP"} <= set(metrics(tmp_path)[-1])

        options += ["SOLVER.MAX_ITER", "3"]
        done = run(*command, "--resume", *options, hook=True, datasets=coco)
        assert done.returncode == 0, done.stderr
        assert "Starting training from iteration 2" in done.stdout + done.stderr
        assert (tmp_path / "model_final.pth").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("script", ["train_net", "plain_train_net"])
    def test_keypoints(self, script, coco, tmp_path):
        config = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"
        options = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path, *TINY, "TEST.EVAL_PERIOD", "0"]
        done = run(
            "-m", f"tools.{script}", "--config-file", config, *options, hook=True, datasets=coco
        )
        assert done.returncode == 0, done.stderr
        assert "keypoints" in done.stdout + done.stderr

    @pytest.mark.slow
    def test_lazyconfig_train_net(self, coco, tmp_path):
        config = QUICK / "mask_rcnn_R_50_NL_FPN_instant_test.py"
        options = ["train.device=cpu", f"train.output_dir={tmp_path}", "train.max_iter=2"]
        command = ["-m", "tools.lazyconfig_train_net", "--config-file", config, *options]
        done = run(*command, hook=True, datasets=coco)
        assert done.returncode == 0, done.stderr
        assert {"bbox/AP", "segm/AP"} <= set(metrics(tmp_path)[-1])

    @pytest.mark.slow
    def test_analyze_model(self):
        config = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
        command = ["-m", "tools.analyze_model", "--tasks", "parameter", "structure"]
        done = run(*command, "--config-file", config, "MODEL.DEVICE", "cpu", hook=True)
        assert done.returncode == 0, done.stderr
        assert "(non_local0): NonLocalBlock(" in done.stdout + done.stderr


class TestTrainNet:
    CONFIG = QUICK / "keypoint_rcnn_R_18_NL_FPN_NLhead_overfit.yaml"

    def test_own_keypoints_train_and_evaluate(self, custom_data, tmp_path):
        command = ["tools/train_net.py", "--config-file", self.CONFIG]
        command += custom_data_arguments(custom_data, "train", "test")
        command += ["--health-period", "1", "--resume", "--scale-lr", "OUTPUT_DIR", tmp_path]
        command += [
            *TINY,
            "SOLVER.IMS_PER_BATCH",
            "1",
            "TEST.EVAL_PERIOD",
            "0",
            "SOLVER.CHECKPOINT_PERIOD",
            "1",
        ]
        command += ["TEST.KEYPOINT_OKS_SIGMAS", "(0.1,0.1)"]
        seen = 0
        for iterations in (2, 3):  # the second time, one more
            done = run(*command, "SOLVER.MAX_ITER", iterations)
            assert done.returncode == 0, done.stderr
            lines = metrics(tmp_path)[seen:]
            seen += len(lines)
            logged = {key: value for line in lines for key, value in line.items()}
            assert {"bbox/AP", "keypoints/AP"} <= set(logged)
            assert "| SOLVER.BASE_LR | 0.01 | 0.005 | |" in done.stdout  # half the config's batch
            assert "  BASE_LR: 0.005\n" in (tmp_path / "config.yaml").read_text()
            ratio = logged["non_local/backbone.bottom_up.res4.non_local0/residual_ratio"]
            assert ratio > 0
            line = f"iter: {iterations - 1}  backbone.bottom_up.res4.non_local0: residual ratio"
            assert f"{line} {ratio:.3g}, entropy 0." in done.stdout
        assert "Starting training from iteration 2" in done.stdout + done.stderr
        checkpoint = torch.load(tmp_path / "model_final.pth", weights_only=True)
        assert checkpoint["metadata"]["keypoint_oks_sigmas"] == [0.1, 0.1]
        assert checkpoint["metadata"]["thing_classes"] == ["bar"]
        assert checkpoint["metadata"]["category_ids"] == [3]
        assert json.loads((tmp_path / "metadata.json").read_text()) == checkpoint["metadata"]
        periodic = torch.load(tmp_path / "model_0000000.pth", weights_only=True)
        assert periodic["metadata"] == checkpoint["metadata"]
        model = checkpoint["model"]
        assert model["roi_heads.box_predictor.cls_score.weight"].shape[0] == 1 + 1
        assert model["roi_heads.keypoint_head.score_lowres.weight"].shape[1] == 2

        # A new process knows what was stored, and finds the AP that the training found.
        command = ["tools/train_net.py", "--config-file", self.CONFIG, "--eval-only"]
        command += [
            *custom_data_arguments(custom_data, "test"),
            "OUTPUT_DIR",
            tmp_path / "again",
            *TINY,
        ]
        done = run(*command, "MODEL.WEIGHTS", tmp_path / "model_final.pth")
        assert done.returncode == 0, done.stderr
        rows = [line.split(": ")[-1] for line in done.stdout.splitlines() if "copypaste" in line]
        for task in ("bbox", "keypoints"):
            ap = rows[rows.index(task) + 2].split(",")[0]
            assert float(ap) == pytest.approx(logged[f"{task}/AP"], abs=1e-4)

    def test_two_processes_take_the_step_of_one(self, custom_data, tmp_path):
        """RPN alone: the heads' losses are means over samples whose number differs by image."""
        options = [*TINY, "MODEL.META_ARCHITECTURE", "ProposalNetwork", "SOLVER.MAX_ITER", "1"]
        options += ["MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000", "SOLVER.BASE_LR", "0.1"]
        options += ["MODEL.MASK_ON", "False", "TEST.EVAL_PERIOD", "0", "DATASETS.TEST", "()"]
        config = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
        models = []
        for processes in (1, 2):
            output = tmp_path / str(processes)
            command = ["tools/train_net.py", "--config-file", config, "--dist-url", free_url()]
            command += ["--num-processes", processes, *custom_data_arguments(custom_data, "train")]
            command += ["--health-period", "1"]
            done = run(*command, "OUTPUT_DIR", output, *options)
            assert done.returncode == 0, done.stderr
            models.append(torch.load(output / "model_final.pth", weights_only=False)["model"])
            (logged,) = metrics(output)  # by one of the processes
            assert 0 < logged["non_local/backbone.bottom_up.res4.non_local0/entropy"] <= 1
        new = build_rpn(options, config)
        moved = 0
        for name, value in models[0].items():
            torch.testing.assert_close(value, models[1][name], rtol=1e-4, atol=1e-6, msg=name)
            moved += name in new and not torch.equal(value, new[name])
        assert moved > 50

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the following arguments are required: --config-file"),
            (["--health-period", "-1"], "argument --health-period: must be 0 or more, got -1"),
        ],
    )
    def test_arguments(self, arguments, message, capsys):
        if arguments:
            arguments = ["--config-file", "Base-RCNN-FPN.yaml", *arguments]
        with pytest.raises(SystemExit) as exit:
            train.parse_args(arguments)
        assert exit.value.code == 2
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(("policy", "spins"), [(None, 1000), ("passive", 0)])
    def test_threads_soon_sleep_when_they_wait(self, policy, spins, monkeypatch):
        """As OpenMP itself tells, when the tool imports PyTorch; then a mistake ends it."""
        monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.delenv(name, raising=False)
        if policy:
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
        done = run("tools/train_net.py", "--config-file", "Base-RCNN-FPN.yaml", "SEEDS", "1")
        assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == [str(spins)]
        assert done.stderr.splitlines()[-1] == "Non-existent key: SEEDS; did you mean SEED?"
        assert done.returncode == 1


def free_url():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def build_rpn(options, config):
    cfg = get_cfg()
    add_non_local_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.merge_from_list(options)
    cfg.MODEL.DEVICE = "cpu"
    seed_all_rng(3)
    return build_model(cfg).state_dict()


class TestAnalyze:
    @pytest.mark.parametrize("name", ["R_50_NL_FPN_1x", "R_101_NL_FPN_3x", "X_152_32x8d_NL_FPN_1x"])
    def test_one_block_in_mask_rcnn(self, name):
        """C = 1024, D = 512; 50 x 84 queries, 25 x 42 keys: the cost by hand."""
        cfg = load_config(ROOT / f"configs/COCO-InstanceSegmentation/mask_rcnn_{name}.yaml")
        stock, stock_gmac = count_parameters_and_gmac(without_blocks(cfg), Workload())
        with_block, gmac = count_parameters_and_gmac(cfg, Workload())
        queries, keys = 50 * 84, 25 * 42
        projections = 1024 * 512 * (2 * queries + 2 * keys)
        pairs = 2 * queries * keys * 512
        assert with_block - stock == 3 * (1024 * 512 + 512) + 512 * 1024 + 1024 == 2_099_712
        assert gmac - stock_gmac == pytest.approx((projections + pairs) / 1e9)
        assert gmac / stock_gmac < 1.05

        cfg.MODEL.NON_LOCAL.NORM = "BN"
        assert count_parameters_and_gmac(cfg, Workload())[0] - stock == 2_101_760

    def test_mask_head_is_counted_per_detection(self):
        """Four 3x3 convolutions and a 2x2 deconvolution of 256 channels, 80 classes."""
        path = ROOT / "configs/COCO-InstanceSegmentation/mask_rcnn_R_50_NL_FPN_1x.yaml"
        few, many = (
            Workload(image_size=(64, 64), proposals=7, detections=detections)
            for detections in (3, 5)
        )
        cfg = load_config(path)
        gmac = count_parameters_and_gmac(cfg, many)[1] - count_parameters_and_gmac(cfg, few)[1]
        per_roi = 196 * 256 * 256 * (4 * 9 + 4) + 784 * 256 * 80
        assert gmac == pytest.approx(2 * per_roi / 1e9)

    def test_roi_heads_are_counted_per_roi(self):
        """Four blocks at 14 x 14 with C = 512, D = 256, not subsampled."""
        path = ROOT / "configs/COCO-Keypoints/keypoint_rcnn_R_50_FPN_NLhead_1x.yaml"
        cfg = load_config(path)
        gmac = (
            count_parameters_and_gmac(cfg, Workload())[1]
            - count_parameters_and_gmac(without_blocks(cfg), Workload())[1]
        )
        per_roi = 4 * 196 * 512 * 256 + 2 * 196 * 196 * 256
        assert gmac == pytest.approx(100 * 4 * per_roi / 1e9)

    def test_no_blocks(self):
        cfg = load_config(ROOT / "configs/COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml")
        (line,) = block_rows(without_blocks(cfg), Workload(image_size=(64, 64)), 1)
        assert line.startswith(
            "No non-local blocks: MODEL.BACKBONE.NAME is build_retinanet_resnet_fpn_backbone, "
        )

    def test_mistake(self, monkeypatch):
        config = "configs/COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml"
        command = f"analyze --config-file {ROOT / config} MODEL.NON_LOCAL.PAIRWISE dot"
        monkeypatch.setattr("sys.argv", command.split())
        with pytest.raises(SystemExit, match="pairwise .*must be one of .*, got 'dot'"):
            analyze.main()

    def test_command(self):
        config = "configs/COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml"
        done = run("tools/analyze.py", "--config-file", config, "--batch-size", "2")
        assert done.returncode == 0, done.stderr
        assert "| retinanet_R_50_NL_FPN_1x | 40,015,284 | 2,099,712 |" in done.stdout
        # x; pooled keys and where they come from; theta, phi, g; y
        x, keys, inner = 1024 * 4200, 1024 * 1050, 512 * (4200 + 2 * 1050 + 4200)
        saved = 2 * (4 * (x + keys + inner) + 8 * keys) / 2**20
        block = "| backbone.bottom_up.res4.non_local4 | 2 x 1024 x 50 x 84 | blocked | 2,099,712 |"
        assert f"{block} 20.0 | 20.0 | {saved:.1f} MB |" in done.stdout


class TestOverfit:
    def test_chooses_usable_images(self):
        data = {
            "images": [{"id": i} for i in range(6)],
            "categories": [{"id": 1, "keypoints": ["nose"]}],
            "annotations": [
                {"image_id": 1, "iscrowd": 0, "num_keypoints": 1},
                {"image_id": 2, "iscrowd": 1, "num_keypoints": 1},
                {"image_id": 3, "iscrowd": 0, "num_keypoints": 0},
                *[{"image_id": 4, "iscrowd": 0, "num_keypoints": 1}] * 3,
                {"image_id": 5, "num_keypoints": 1},
            ],
        }
        chosen = overfit.first_images(data, 2, 2)
        assert [image["id"] for image in chosen["images"]] == [1, 5]
        assert [a["image_id"] for a in chosen["annotations"]] == [1, 5]
        with pytest.raises(ValueError, match="--count must be at most 2, .* 1 to 2 objects, got 3"):
            overfit.first_images(data, 3, 2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "No such file"),
            ("{", "Expecting property name"),
            ("[]", "the file has no images"),
            (
                '{"images": [{"id": 1}], "annotations": [{"image_id": 1}]}',
                "the file has no categories",
            ),
        ],
    )
    def test_json_that_is_of_no_use(self, text, message, tmp_path):
        if text:
            (tmp_path / "a.json").write_text(text)
        config, annotations = str(QUICK / "Base-overfit.yaml"), str(tmp_path / "a.json")
        with pytest.raises(SystemExit, match=f"--json .*a.json: .*{message}"):
            overfit.main(["--config-file", config, "--json", annotations, "--images", "."])

    def test_hands_the_subset_to_train_net(self, custom_data, tmp_path):
        config = QUICK / "mask_rcnn_R_18_NL_FPN_overfit.yaml"
        command = [
            "tools/overfit.py",
            "--config-file",
            config,
            "--json",
            custom_data,
            "--count",
            "2",
        ]
        command += ["--images", custom_data.parent / "images", "OUTPUT_DIR", tmp_path, *TINY]
        done = run(*command, "TEST.EVAL_PERIOD", "0")
        assert done.returncode == 0, done.stderr
        assert "Loaded 2 images in COCO format" in done.stdout + done.stderr
        assert "segm/AP" in metrics(tmp_path)[-1]
