"""The weights of one non-local block, and the changes to them that keep its function.

Shapes: C in, D inner channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nl_detectron.weights.dialects import SAME_PARAMETERS, Dialect
from nl_detectron.weights.names import tell_pooling

EPS = 1e-5  # of the batch norm of every dialect
# Arguments of NonLocalBlock; one that another depends on comes first.
OPTIONS = "dim pairwise reduction scale subsample subsample_position norm axes".split()


@dataclass
class Block:
    """A block in our terms.

    Attributes:
        tensors: by the parameter names of :class:`~nl_detectron.NonLocalBlock`.
        sources: parameter -> its name in the source.
        options: its arguments, as far as they are known.
        assumed: those that the target takes for granted and nobody has told.
        added: parameter without counterpart in the source -> what it is.
        dropped: parameter of the source that has no place any more -> why.
        changes: what was done to keep the function.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)

    @property
    def widths(self) -> tuple[int, int]:
        """C and D."""
        inner, width, *_ = self.tensors["g.weight"].shape
        return width, inner

    def understand(self, dialect: Dialect, pooled: bool | None) -> None:
        """Find out the options of a block just read, and complete it to a block of ours.

        Args:
            dialect: where it is from.
            pooled: whether its names say that it is subsampled; ``None`` if they do not tell.

        Raises:
            ValueError: weights that no block of this dialect has.
        """
        shape = tuple(self.tensors["g.weight"].shape)
        width, inner = self.widths
        if len(shape) not in (3, 4, 5) or max(width // max(width // inner, 1), 1) != inner:
            raise ValueError(
                f"g of shape {shape}: no block of ours maps {width} to {inner} channels"
            )
        told: dict[str, Any] = {
            "dim": len(shape) - 2,
            "pairwise": self._pairwise(dialect),
            "reduction": width // inner,
            "subsample": None if pooled is None else 1 + pooled,
            "norm": self._norm(dialect),
            "axes": None if len(shape) == 5 else "spacetime",
        }
        self.options = {k: v for k, v in dialect.fixed.items() if k != "dim"}
        self.options |= {k: v for k, v in told.items() if v is not None}
        for name in ("theta", "phi", "g", "conv_out"):
            weight = self.tensors.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in self.tensors:
                self.tensors[f"{name}.bias"] = weight.new_zeros(weight.shape[0])
                self.added[f"{name}.bias"] = "zero; the source has no such bias"
        self._reshape("concat_project.weight", told["dim"])
        if dialect.scales_by_width:
            self._scale_theta((inner / width) ** 0.5, "D ** -0.5 for C ** -0.5")
        if told["norm"] == "GN" and dialect.affine_norm:
            self.fold_norm()

    def adapt(self, wishes: Mapping[str, Any]) -> None:
        """Change the weights to those of a block with other options and the same function.

        Raises:
            ValueError: there is no such block.
        """
        for option in wishes:
            if option not in OPTIONS:
                raise ValueError(f"option must be one of {tuple(OPTIONS)}, got {option!r}")
        for option in sorted(wishes, key=OPTIONS.index):
            value, current = wishes[option], self.options.get(option)
            if value == current:
                continue
            if option == "dim":
                for name in tuple(self.tensors):
                    self._reshape(name, value)
            elif option == "norm" and {value, current} <= {"BN", "SyncBN"}:
                pass
            elif option == "norm" and (current, value) == ("BN", ""):
                self.fold_norm()
            elif option == "norm" and current == "" and value in ("BN", "SyncBN"):
                self._add_norm()
            elif option == "scale" and current is not None:
                self._move_scale(value)
            elif option == "pairwise" and current is None and value not in SAME_PARAMETERS:
                raise ValueError(
                    f"by its weights, pairwise is one of {SAME_PARAMETERS}, got {value!r}"
                )
            elif current is not None and self.matters(option):
                raise ValueError(
                    f"{option} is {current!r}; with {value!r} it would be another function"
                )
            self.options[option] = value

    def prepare(self, dialect: Dialect) -> None:
        """Make it what a block of the dialect is; the names stay ours.

        Raises:
            ValueError: the dialect has no such block.
        """
        unknown = [option for option in dialect.fixed if option not in self.options]
        self.adapt(dialect.fixed)
        self.assumed = {option: self.options[option] for option in unknown if self.matters(option)}
        if self.options["norm"] not in dialect.norms:
            self.adapt({"norm": dialect.norms[-1]})
        pairwise = self.options.get("pairwise")
        if pairwise and pairwise not in dialect.pairwise:
            raise ValueError(f"pairwise must be one of {dialect.pairwise}, got {pairwise!r}")
        subsample = self.options.get("subsample")
        if tell_pooling(dialect) and subsample not in (1, 2):
            raise ValueError(
                f"subsample must be 1 or 2, got {subsample}: parameters are named by it there, and "
                "weights do not tell; add --block subsample=2 in tools/convert_weights.py"
            )
        width, inner = self.widths
        if dialect.scales_by_width:
            self._scale_theta((width / inner) ** 0.5, "C ** -0.5 for D ** -0.5")
        if dialect.concat_dim:
            self._reshape("concat_project.weight", dialect.concat_dim)
        if self.options["norm"] and not dialect.bias_beside_norm:
            self._move_bias_into_norm()

    def fold_norm(self) -> None:
        """Turn batch norm with its running statistics into a part of the output convolution."""
        norm = {n: self.tensors.pop(n) for n in tuple(self.tensors) if n.startswith("norm.")}
        weight, bias = self.tensors["conv_out.weight"], self.tensors["conv_out.bias"]
        scale, shift = norm["norm.weight"].double(), norm["norm.bias"].double()
        if "norm.running_var" in norm:
            scale = scale * (norm["norm.running_var"].double() + EPS).rsqrt()
        mean = norm.get("norm.running_mean", torch.zeros_like(shift)).double()
        by_row = scale.view(-1, *[1] * (weight.dim() - 1))
        self.tensors["conv_out.weight"] = (weight * by_row).to(weight.dtype)
        self.tensors["conv_out.bias"] = ((bias - mean) * scale + shift).to(bias.dtype)
        self.dropped |= dict.fromkeys(norm, "folded into conv_out")
        if "conv_out.bias" in self.added:
            self.added["conv_out.bias"] = "from the folded norm"
        self.changes.append("the norm is folded into conv_out")
        self.options["norm"] = ""

    def matters(self, option: str) -> bool:
        """Whether the function depends on an option, given the others."""
        if option == "scale":
            return self.options.get("pairwise") in ("embedded_gaussian", None)
        if option == "subsample_position":
            return self.options.get("subsample") != 1
        return option != "axes" or self.options["dim"] == 3

    def _pairwise(self, dialect: Dialect) -> str | None:
        has = [f"{name}.weight" in self.tensors for name in ("theta", "phi")]
        if has[0] != has[1]:
            raise ValueError("one of theta and phi is missing")
        if "concat_project.weight" in self.tensors:
            pairwise = "concatenation"
        elif not has[0]:
            pairwise = "gaussian"
        else:
            return dialect.pairwise[0] if len(dialect.pairwise) == 1 else None
        if pairwise not in dialect.pairwise:
            raise ValueError(
                f"pairwise must be one of {dialect.pairwise}, got the keys of {pairwise!r}"
            )
        return pairwise

    def _norm(self, dialect: Dialect) -> str:
        names = {name.removeprefix("norm.") for name in self.tensors if name.startswith("norm.")}
        if not names:
            return ""
        if names >= {"weight", "bias", "running_mean", "running_var"}:
            return "BN"
        if names != {"weight", "bias"}:
            raise ValueError(f"the norm has only {', '.join(sorted(names))}")
        if "GN" not in dialect.norms and not dialect.affine_norm:
            raise ValueError("the norm has no running statistics, so it is not batch norm")
        return "GN"

    def _add_norm(self) -> None:
        ones = torch.ones_like(self.tensors["conv_out.bias"])
        # running_var + EPS is 1, as in detectron2's FrozenBN
        values = {"weight": ones, "bias": 0 * ones, "running_mean": 0 * ones}
        for name, value in {**values, "running_var": ones - EPS}.items():
            self.tensors[f"norm.{name}"] = value
            self.added[f"norm.{name}"] = "a norm that is the identity, until it is trained"

    def _move_scale(self, scale: bool) -> None:
        if not self.matters("scale"):
            return
        if "pairwise" not in self.options:
            raise ValueError(
                "scale can be moved into theta for pairwise 'embedded_gaussian', must not be for "
                "'dot_product', and weights do not tell: give pairwise, or add --block "
                "pairwise=dot_product in tools/convert_weights.py"
            )
        inner = self.widths[1]
        factor = inner**0.5 if scale else inner**-0.5
        self._scale_theta(factor, f"scale {scale} for {not scale}")

    def _scale_theta(self, factor: float, why: str) -> None:
        for name in ("theta.weight", "theta.bias"):
            value = self.tensors[name]
            self.tensors[name] = (value.double() * factor).to(value.dtype)
        self.changes.append(f"theta is multiplied by {factor:.6g}: {why}")

    def _move_bias_into_norm(self) -> None:
        bias = self.tensors.pop("conv_out.bias")
        self.dropped["conv_out.bias"] = "zero, and there is no such bias beside a norm"
        if bias.any():
            mean = self.tensors["norm.running_mean"]
            self.tensors["norm.running_mean"] = (mean.double() - bias).to(mean.dtype)
            self.dropped["conv_out.bias"] = "subtracted from the norm's running mean"
            self.changes.append("the bias of conv_out is moved into the norm")

    def _reshape(self, name: str, dim: int) -> None:
        value = self.tensors.get(name)
        if value is not None and value.dim() > 2:
            if value[0, 0].numel() != 1:
                raise ValueError(f"{name} of shape {tuple(value.shape)} is not a 1x1 convolution")
            self.tensors[name] = value.reshape(*value.shape[:2], *[1] * dim)
