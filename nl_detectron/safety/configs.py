"""Checking YAML configs and their bases before they are read: no code, no network, no bombs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

BASE_KEY = "_BASE_"
MAX_BYTES = 2**16
MAX_FILES = 50
MAX_VALUES = 20_000
MAX_DEPTH = 50
# The safe loader's own, with "<<" and "=", which it resolves itself.
_TAGS = {
    *yaml.SafeLoader.yaml_constructors,
    *(f"tag:yaml.org,2002:{x}" for x in ("merge", "value")),
}
_REMOTE = re.compile(r"\w[\w+.-]*://")


def check_config(path: str | Path, fetch: Callable[[str], str] | None = None) -> None:
    """Check a YAML config and all its bases.

    Args:
        path: the file.
        fetch: downloads a base that is a URL, and returns the path of the copy; if absent, only
            local bases are allowed.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file could run code, is elsewhere, or cannot be read with little time and
            memory.
    """
    files: list[str] = []

    def check(file: str, parents: tuple[str, ...]) -> None:
        if os.path.realpath(file) in map(os.path.realpath, parents):
            raise ValueError(f"{file} is its own {BASE_KEY}, by way of {parents[-1]}")
        files.append(file)
        if len(files) > MAX_FILES:
            raise ValueError(f"{path} has more than {MAX_FILES} bases")
        config = _read(file, fetch, parents)
        bases = config.get(BASE_KEY, [])
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str):
                raise ValueError(f"{file}: {BASE_KEY} must be a file or a list of them, got {base}")
            base = os.path.expanduser(base)
            if not _REMOTE.match(base):  # an absolute path remains as it is
                base = os.path.join(os.path.dirname(file), base)
            check(base, (*parents, file))

    check(str(path), ())


def _read(
    file: str, fetch: Callable[[str], str] | None, parents: tuple[str, ...]
) -> dict[str, Any]:
    """Read one file with YAML's safe loader."""
    local = file
    if _REMOTE.match(file):
        if fetch is None:
            raise ValueError(
                f"{parents[-1] if parents else file}: the {BASE_KEY} {file} is not on this "
                "machine; --allow-remote downloads it"
            )
        local = fetch(file)
    if not os.path.isfile(local):
        raise ValueError(f"Config file '{file}' does not exist!")
    if os.path.getsize(local) > MAX_BYTES:
        raise ValueError(f"{file} is not a YAML config: it has more than {MAX_BYTES} bytes")
    try:
        loader = yaml.SafeLoader(Path(local).read_text())
        node = loader.get_single_node()
        _check_node(node, file)
        config = loader.construct_document(node) if node else None
    except RecursionError:
        raise ValueError(f"{file} is not a YAML config: it is nested too deeply") from None
    except (TypeError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        if str(error).startswith(file):
            raise
        raise ValueError(f"{file} is not a YAML config: {error}") from error
    if not isinstance(config, dict):
        kind = "nothing" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{file} is not a YAML config: it holds {kind}")
    return config


def _check_node(root: yaml.Node | None, file: str) -> None:
    """Bound what the values are when every alias is replaced by what it stands for."""
    sizes: dict[yaml.Node, int] = {}  # 0 while a node is being visited

    def size(node: yaml.Node, depth: int) -> int:
        if node not in sizes:
            if node.tag not in _TAGS:
                tag = node.tag.replace("tag:yaml.org,2002:", "!!")
                raise ValueError(
                    f"{file}, line {node.start_mark.line + 1}: {tag} is not loaded, because it "
                    "could run code; write the value itself"
                )
            sizes[node] = 0
            children = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            total = 1 + sum(size(child, depth + 1) for child in children)
            if depth > MAX_DEPTH or total > MAX_VALUES:
                raise ValueError(
                    f"{file} is not a YAML config: more than {MAX_VALUES} values, or nested more "
                    f"than {MAX_DEPTH} levels deep"
                )
            sizes[node] = total
        elif not sizes[node]:
            raise ValueError(f"{file} is not a YAML config: an alias refers to what it is part of")
        return sizes[node]

    if root is not None:
        size(root, 0)
