"""The weights of one non-local block, and changes to them that keep what it computes.

Shapes: C in, D inner channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nl_detectron.weights.dialects import SAME_PARAMETERS, Dialect

EPS = 1e-5  # of batch norm, in every dialect
# Arguments of NonLocalBlock; an argument comes after those that it depends on.
OPTIONS = (
    *("dim", "pairwise", "reduction", "scale", "subsample", "subsample_position", "norm"),
    *("axes", "group_frames"),
)


@dataclass
class Block:
    """The weights and options of a non-local block, in our names.

    Attributes:
        tensors: by the parameter names of :class:`~nl_detectron.NonLocalBlock`.
        sources: parameter -> its key in the source.
        options: arguments of :class:`~nl_detectron.NonLocalBlock`, as far as they are known.
        assumed: options that were unknown and got the only value that the target supports.
        added: parameter without counterpart in the source -> what it is.
        dropped: parameter of the source that the block no longer has -> reason.
        changes: what was done to the weights to keep what the block computes.
    """

    tensors: dict[str, Tensor]
    sources: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> tuple[int, int]:
        """C and D."""
        inner, channels, *_ = self.tensors["g.weight"].shape
        return channels, inner

    def infer_options(self, dialect: Dialect, subsampled: bool | None) -> None:
        """Infer the options from the weights of a block of this dialect.

        Args:
            dialect: where the weights come from.
            subsampled: whether the parameter names show subsampling; ``None`` if they cannot.

        Raises:
            ValueError: no block of this dialect has such weights.
        """
        shape = tuple(self.tensors["g.weight"].shape)
        channels, inner = self.channels
        if len(shape) not in (3, 4, 5) or max(channels // max(channels // inner, 1), 1) != inner:
            raise ValueError(
                f"g of shape {shape}: NonLocalBlock cannot map {channels} to {inner} channels"
            )
        inferred: dict[str, Any] = {
            "dim": len(shape) - 2,
            "pairwise": self._infer_pairwise(dialect),
            "reduction": channels // inner,
            "subsample": None if subsampled is None else 1 + subsampled,
            "norm": self._infer_norm(dialect),
            "axes": None if len(shape) == 5 else "spacetime",
            "group_frames": None if len(shape) == 5 else 0,
        }
        known = {option: value for option, value in inferred.items() if value is not None}
        self.options = {**dialect.fixed, **known}

    def convert_from(self, dialect: Dialect) -> None:
        """Turn a block of the dialect, with its options inferred, into one of ours."""
        for name in ("theta", "phi", "g", "conv_out"):
            weight = self.tensors.get(f"{name}.weight")
            if weight is not None and f"{name}.bias" not in self.tensors:
                self.tensors[f"{name}.bias"] = weight.new_zeros(weight.shape[0])
                self.added[f"{name}.bias"] = "zero, since the source has no such bias"
        self._reshape("concat_project.weight", self.options["dim"])
        channels, inner = self.channels
        if dialect.scales_by_in_channels:
            self._multiply_theta((inner / channels) ** 0.5, "the scale is D ** -0.5, not C ** -0.5")
        if self.options["norm"] == "GN" and dialect.affine_norm:
            self.fold_norm()

    def apply_options(self, options: Mapping[str, Any]) -> None:
        """Set options that are unknown, and change others as long as the output stays the same.

        Raises:
            ValueError: no block with these options computes the same.
        """
        for option in options:
            if option not in OPTIONS:
                raise ValueError(f"option must be one of {tuple(OPTIONS)}, got {option!r}")
        for option in sorted(options, key=OPTIONS.index):
            value, current = options[option], self.options.get(option)
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
                self._add_identity_norm()
            elif option == "scale" and current is not None:
                self._change_scale(value)
            elif option == "pairwise" and current is None and value not in SAME_PARAMETERS:
                raise ValueError(
                    f"with these weights, pairwise must be one of {SAME_PARAMETERS}, got {value!r}"
                )
            elif current is not None and self.depends_on(option):
                raise ValueError(
                    f"{option} is {current!r}; {value!r} would change what the block computes"
                )
            self.options[option] = value

    def convert_to(self, dialect: Dialect) -> None:
        """Change the weights to those of a block of the dialect, still under our names.

        Raises:
            ValueError: the dialect has no such block.
        """
        unknown = [option for option in dialect.fixed if option not in self.options]
        self.apply_options(dialect.fixed)
        self.assumed = {name: self.options[name] for name in unknown if self.depends_on(name)}
        if self.options["norm"] not in dialect.norms:
            self.apply_options({"norm": dialect.norms[-1]})
        pairwise = self.options.get("pairwise")
        if pairwise and pairwise not in dialect.pairwise:
            raise ValueError(f"pairwise must be one of {dialect.pairwise}, got {pairwise!r}")
        subsample = self.options.get("subsample")
        if dialect.names_show_subsampling and subsample not in (1, 2):
            raise ValueError(
                f"subsample must be 1 or 2, got {subsample}: the target's parameter names depend "
                "on it, and weights do not show it; give it in options, as --block subsample=2"
            )
        channels, inner = self.channels
        if dialect.scales_by_in_channels:
            self._multiply_theta((channels / inner) ** 0.5, "the scale is C ** -0.5, not D ** -0.5")
        if dialect.concat_dim:
            self._reshape("concat_project.weight", dialect.concat_dim)
        if self.options["norm"] and not dialect.bias_before_norm:
            self._fold_bias_into_norm()

    def fold_norm(self) -> None:
        """Fold batch norm, with its running statistics, into the output convolution."""
        norm = {n: self.tensors.pop(n) for n in tuple(self.tensors) if n.startswith("norm.")}
        weight, bias = self.tensors["conv_out.weight"], self.tensors["conv_out.bias"]
        scale, shift = norm["norm.weight"].double(), norm["norm.bias"].double()
        if "norm.running_var" in norm:
            scale = scale * (norm["norm.running_var"].double() + EPS).rsqrt()
        mean = norm.get("norm.running_mean", torch.zeros_like(shift)).double()
        per_row = scale.view(-1, *[1] * (weight.dim() - 1))
        self.tensors["conv_out.weight"] = (weight * per_row).to(weight.dtype)
        self.tensors["conv_out.bias"] = ((bias - mean) * scale + shift).to(bias.dtype)
        self.dropped |= dict.fromkeys(norm, "folded into conv_out")
        if "conv_out.bias" in self.added:
            self.added["conv_out.bias"] = "from the folded norm"
        self.changes.append("the norm is folded into conv_out")
        self.options["norm"] = ""

    def depends_on(self, option: str) -> bool:
        """Whether the output depends on an option, given the others."""
        if option == "scale":
            return self.options.get("pairwise") in ("embedded_gaussian", None)
        return option != "subsample_position" or self.options.get("subsample") != 1

    def _infer_pairwise(self, dialect: Dialect) -> str | None:
        has_theta, has_phi = (f"{name}.weight" in self.tensors for name in ("theta", "phi"))
        if has_theta != has_phi:
            raise ValueError("one of theta and phi is missing")
        if "concat_project.weight" in self.tensors:
            pairwise = "concatenation"
        elif not has_theta:
            pairwise = "gaussian"
        else:
            return dialect.pairwise[0] if len(dialect.pairwise) == 1 else None
        if pairwise not in dialect.pairwise:
            raise ValueError(
                f"pairwise must be one of {dialect.pairwise}, got the keys of {pairwise!r}"
            )
        return pairwise

    def _infer_norm(self, dialect: Dialect) -> str:
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

    def _add_identity_norm(self) -> None:
        ones = torch.ones_like(self.tensors["conv_out.bias"])
        zeros = torch.zeros_like(ones)
        # running_var + EPS is 1, as in detectron2's FrozenBN
        values = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones - EPS}
        for name, value in values.items():
            self.tensors[f"norm.{name}"] = value.clone()
            self.added[f"norm.{name}"] = "a norm that is the identity until it is trained"

    def _change_scale(self, scale: bool) -> None:
        if not self.depends_on("scale"):
            return
        if "pairwise" not in self.options:
            raise ValueError(
                "scale can be folded into theta for pairwise 'embedded_gaussian' but has no effect "
                "for 'dot_product', and weights do not show which one this is; give pairwise in "
                "options, as --block pairwise=dot_product"
            )
        factor = self.channels[1] ** (0.5 if scale else -0.5)
        self._multiply_theta(factor, f"scale is {scale}, not {not scale}")

    def _multiply_theta(self, factor: float, reason: str) -> None:
        for name in ("theta.weight", "theta.bias"):
            value = self.tensors[name]
            self.tensors[name] = (value.double() * factor).to(value.dtype)
        self.changes.append(f"theta is multiplied by {factor:.6g} ({reason})")

    def _fold_bias_into_norm(self) -> None:
        bias = self.tensors.pop("conv_out.bias")
        self.dropped["conv_out.bias"] = "zero, and the target has no bias before a norm"
        if bias.any():
            mean = self.tensors["norm.running_mean"]
            self.tensors["norm.running_mean"] = (mean.double() - bias).to(mean.dtype)
            self.dropped["conv_out.bias"] = "subtracted from the norm's running mean"
            self.changes.append("the bias of conv_out is folded into the norm")

    def _reshape(self, name: str, dim: int) -> None:
        value = self.tensors.get(name)
        if value is not None and value.dim() > 2:
            if value[0, 0].numel() != 1:
                raise ValueError(f"{name} of shape {tuple(value.shape)} is not a 1x1 convolution")
            self.tensors[name] = value.reshape(*value.shape[:2], *[1] * dim)
