"""Configs from strangers: no code is run, nothing is downloaded, and no file takes long to read."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest
import yaml
from detectron2.config import get_cfg

from nl_detectron.config import load_config
from nl_detectron.safety.configs import check_config
from tests.malicious import write_code_configs
from tests.running import ROOT


@pytest.mark.parametrize("name", ["apply", "new", "list", "name", "module", "base", "deep_base"])
def test_code_is_not_run(name, tmp_path):
    trace = tmp_path / "trace"
    file = write_code_configs(tmp_path, trace)[name]
    with pytest.raises(ValueError, match=r"yaml, line 2: !!python/.* is not loaded") as error:
        load_config(file)
    assert "could run code" in str(error.value)
    assert not trace.exists()
    if name not in ("name", "module"):
        with suppress(Exception):
            get_cfg().merge_from_file(str(file))
        assert trace.exists()  # detectron2's default runs it


def test_lazy_config_is_not_run(tmp_path):
    (tmp_path / "lazy.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    with pytest.raises(ValueError, match=r"lazy.py is a LazyConfig, which is code"):
        load_config(tmp_path / "lazy.py")
    (tmp_path / "c.yaml").write_text("_BASE_: lazy.py\n")
    with pytest.raises(ValueError, match=r"lazy.py is not a YAML config"):
        load_config(tmp_path / "c.yaml")
    assert not (tmp_path / "trace").exists()


@pytest.fixture
def server(tmp_path_factory):
    """A server on this machine, with the list of what it was asked for."""
    folder, asked = tmp_path_factory.mktemp("served"), []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    running = HTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", folder, asked
    running.shutdown()
    running.server_close()


def test_bases_are_local_unless_allowed(server, tmp_path, monkeypatch):
    url, folder, asked = server
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (folder / "root.yaml").write_text("SEED: 7\n")
    (folder / "base.yaml").write_text("_BASE_: root.yaml\nVERSION: 2\n")
    (folder / "code.yaml").write_text(f"A: !!python/object/apply:os.mkdir ['{tmp_path}/trace']")
    for base in ("base", "code"):
        (tmp_path / f"{base}.yaml").write_text(f"_BASE_: {url}/{base}.yaml\n")
    with pytest.raises(ValueError, match=r"base.yaml: the _BASE_ http:.*--allow-remote"):
        load_config("base.yaml")
    (tmp_path / "s3.yaml").write_text("_BASE_: [base.yaml, 's3://bucket/base.yaml']\n")
    with pytest.raises(ValueError, match=r"base.yaml is not on this machine"):
        load_config("s3.yaml")
    assert asked == []
    assert load_config("base.yaml", allow_remote=True).SEED == 7
    with pytest.raises(ValueError, match=r"code.yaml, line 1: !!python/object.* is not loaded"):
        load_config("code.yaml", allow_remote=True)
    assert not (tmp_path / "trace").exists()


def bomb(kind):
    """The text of a config, and what the error says."""
    laughs = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    merges = [f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 10)}]" for i in range(1, 10)]
    return {
        "aliases": ("\n".join(["a0: &a0 [1]", *laughs]), "more than 20000 values"),
        "merges": ("\n".join(["m0: &m0 {x: 1}", *merges]), "more than 20000 values"),
        "cycle": ("a: &a [*a]", "an alias refers to what it is part of"),
        "brackets": ("- " * 30_000, "nested too deeply"),
        "nested": ("a: " + "[" * 60 + "]" * 60, "nested more than 50 levels"),
        "large": ("# " + "x" * 70_000, "more than 65536 bytes"),
        "parentheses": (f"SEED: '{'(' * 60_000}'", "SEED|Type mismatch"),
        "signs": (f"SEED: '{'-' * 60_000}1'", "is not a YAML config"),
        "list": ("[1, 2]", "it holds a list"),
        "empty": ("", "it holds nothing"),
        "tabs": ("a:\n\tb: 1", "is not a YAML config"),
        "latin": (b"a: \xff\xfe\xe9", "is not a YAML config"),
        "number": ("_BASE_: 3", "_BASE_ must be a file or a list of them, got 3"),
        "self": ("_BASE_: ../self/c.yaml", "is its own _BASE_"),
        "many": (f"_BASE_: [{', '.join(['b.yaml'] * 60)}]", "more than 50 bases"),
        "device": ("_BASE_: /dev/zero", "does not exist"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    "aliases merges cycle brackets nested large parentheses signs list empty tabs latin number "
    "self many device".split(),
)
def test_bombs(kind, tmp_path):
    text, message = bomb(kind)
    file = tmp_path / kind / "c.yaml"
    file.parent.mkdir()
    file.with_name("b.yaml").write_text("SEED: 1\n")
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_config(file)
    assert time.monotonic() - start < 20


def test_aliases_are_fine(tmp_path):
    """PyYAML writes them where two keys have the same list."""
    sizes = [[32, 64]]
    dumped = yaml.safe_dump({"MODEL": {"ANCHOR_GENERATOR": {"SIZES": [sizes[0], sizes[0]]}}})
    assert "*id001" in dumped
    (tmp_path / "c.yaml").write_text(dumped)
    assert load_config(tmp_path / "c.yaml").MODEL.ANCHOR_GENERATOR.SIZES == [[32, 64], [32, 64]]


def test_own_configs_pass():
    files = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")]
    assert len(files) > 50
    for file in files:
        check_config(file)
