"""Arguments that commands share."""

from __future__ import annotations

import pytest

from nl_detectron_cli.arguments import training_parser


def test_renamed_option(capsys):
    parser = training_parser("")
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--config-file", "Base-RCNN-FPN.yaml", "--may-lack", "roi_heads"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("--may-lack is now called --allow-missing\n")
    assert "--may-lack" not in parser.format_help()
