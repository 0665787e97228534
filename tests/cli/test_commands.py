"""The one console command, and --config-file, which all of its commands share."""

from __future__ import annotations

import argparse
import json

import pytest

import nl_detectron
import nl_detectron_cli
from nl_detectron_cli import doctor
from nl_detectron_cli.arguments import add_config_file
from tests.running import ROOT


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs nl-detectron; returns its exit code and what it printed."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["/usr/bin/nl-detectron", *arguments])
        with pytest.raises(SystemExit) as end:
            nl_detectron_cli.main()
        return end.value.code, "".join(capsys.readouterr())

    return run


def test_help_says_one_line_of_each_command(command):
    code, output = command("--help")
    assert code == 0
    for name, line in nl_detectron_cli.COMMANDS.items():
        assert " ".join(output.split()).count(f" {name} {line} ") == 1


def test_version(command):
    assert command("--version") == (0, f"nl_detectron {nl_detectron.__version__}\n")


def test_unknown_command_is_told_the_known(command):
    code, output = command("tran", "--help")
    assert code == 2
    assert "usage: nl-detectron [-h]" in output
    assert "invalid choice: 'tran' (choose from 'train', 'ab', " in output


def test_arguments_go_to_the_command(command, monkeypatch, capsys):
    code, output = command("overfit", "--help", "--version")
    assert (code, output.splitlines()[0][:31]) == (0, "usage: nl-detectron overfit [-h")
    monkeypatch.setattr("sys.argv", ["nl-detectron", "doctor", "--matrix", "--json"])
    nl_detectron_cli.main()
    assert json.loads(capsys.readouterr().out) == doctor.combinations()


def test_config_by_its_name_or_path(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_config_file(parser)
    name = "COCO-Detection/retinanet_R_50_NL_FPN_1x.yaml"
    monkeypatch.chdir(tmp_path)
    for word in (name, str(ROOT / "configs" / name)):
        found = parser.parse_args(["--config-file", word]).config_file
        assert found == str(ROOT / "configs" / name)
    with pytest.raises(SystemExit, match=rf"--config-file .* neither .* did you mean {name}\?"):
        parser.parse_args(["--config-file", name.replace("Detection", "Detect")])
