"""Files that run code, or that cost far more than their size, when they are read carelessly."""

from __future__ import annotations

import os
import pickle
import zipfile

import torch


class MakeFolder:
    """Unpickling it makes a folder: the trace."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def write_code_configs(folder, trace):
    """YAML configs that make the folder ``trace`` if PyYAML's unsafe loader reads them."""
    calls = {
        "apply": f"!!python/object/apply:os.mkdir ['{trace}']",
        "new": f"!!python/object/new:os.mkdir ['{trace}']",
        "list": f"[1, !!python/object/apply:os.mkdir ['{trace}']]",
        "name": "!!python/name:os.mkdir ''",
        "module": "!!python/module:antigravity ''",
    }
    files = {name: folder / f"{name}.yaml" for name in calls}
    for name, file in files.items():
        file.write_text(f"MODEL:\n  WEIGHTS: {calls[name]}\n")
    files["base"] = folder / "base.yaml"
    files["base"].write_text("_BASE_: apply.yaml\n")
    files["deep_base"] = folder / "deep_base.yaml"
    files["deep_base"].write_text("_BASE_: [base.yaml]\n")
    return files


def write_code_weights(folder, trace):
    """Checkpoints that make the folder ``trace`` if they are unpickled without restrictions."""
    files = {}
    for name, content in (
        ("detectron2.pkl", {"model": {"x": MakeFolder(trace)}, "__author__": "x"}),
        ("caffe2.pkl", {"blobs": {"x": MakeFolder(trace)}}),
        ("protocol0.pkl", {"x": MakeFolder(trace)}),
        ("model.pth", {"model": {"x": MakeFolder(trace)}}),
        ("pycls.pyth", {"model_state": {"x": MakeFolder(trace)}}),
        ("legacy.pth", {"model": {"x": MakeFolder(trace)}}),
    ):
        files[name] = folder / name
        if name.endswith(".pkl"):
            files[name].write_bytes(pickle.dumps(content, protocol=0 if "0" in name else 2))
        else:
            torch.save(content, files[name], _use_new_zipfile_serialization="legacy" not in name)
    return files


def rewrite_zip(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Copy a .pth file, with its records changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


def write_memory_weights(folder):
    """Small checkpoints that ask for gigabytes."""
    torch.save({"model": {"x": torch.zeros(1).expand(10**12)}}, folder / "expanded.pth")
    torch.save({"model": {"x": torch.zeros(10**6)}}, folder / "plain.pth")
    rewrite_zip(folder / "plain.pth", folder / "compressed.pth", compression=zipfile.ZIP_DEFLATED)
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01OtR"
    (folder / "shape.pkl").write_bytes(b"\x80\x02}U\x01x" + array + b"s.")
    (folder / "numbered.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    (folder / "nested.pkl").write_bytes(b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".")
    return {file.name: file for file in folder.glob("*.p*")}
