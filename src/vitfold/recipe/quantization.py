"""How many bits weights and activations get, by which method."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from vitfold.errors import RecipeError

Format = Literal["integer", "float8"]

FLOAT = "float"
_BITS = range(2, 9)
WIDE = "w8a16"
WIDE_BITS = 16
"""Of activations of the few layers that 8 bits hurt most: two integer products instead of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantRecipe:
    """Bits of weights and activations, by which method, and what stays float.

    `attention` says whether the operands of the attention products are rounded too (None: as the target
    gains from it; resolved recipes say true or false); `sites` overrides single
    sites, glob -> "w8a8" or "float", the last match wins; `calibration_size` images are drawn with `seed`.
    `head_bits` is the least that the classifier gets, as every published table does it. `format` says what
    the bits are: integers, or 8-bit floats (E4M3). `outputs` says whether the products of qkv and fc1 are rounded
    too, before their scale and bias (None: as the target gains from it). `calibrate_merged` says whether ranges and
    rounding are found on the model that merges, or on the one that does not. `polish_minutes` is how long weights,
    scales, biases and norms are trained behind all that, on the same images and without labels.
    """

    weights: int = 8
    activations: int = 8
    method: str = "vitfold"
    attention: bool | None = None
    calibration_size: int = 128
    seed: int = 0
    head_bits: int = 8
    format: Format = "integer"
    outputs: bool | None = None
    calibrate_merged: bool = False
    polish_minutes: float = 0.0
    sites: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "head_bits"):
            value = getattr(self, name)
            wide = name == "activations" and value == WIDE_BITS
            if type(value) is not int or not (value in _BITS or wide):
                more = f", or {WIDE_BITS}" if name == "activations" else ""
                raise RecipeError(f"quant.{name} must be {_BITS.start} to {_BITS.stop - 1} bits{more}, found {value!r}")
        if type(self.calibration_size) is not int or self.calibration_size < 1:
            raise RecipeError(f"quant.calibration_size must be at least 1, found {self.calibration_size!r}")
        if type(self.seed) is not int:
            raise RecipeError(f"quant.seed must be an integer, found {self.seed!r}")
        if self.format not in get_args(Format):
            raise RecipeError(f"quant.format is integer or float8, found {self.format!r}")
        if self.format == "float8" and (self.weights, self.activations) != (8, 8):
            raise RecipeError("quant.format float8 has 8 bits for weights and activations; leave both out")
        if self.outputs not in (None, True, False):
            raise RecipeError("quant.outputs is true or false")
        if not isinstance(self.calibrate_merged, bool):
            raise RecipeError("quant.calibrate_merged is true or false")
        self._check_polish()
        if self.attention not in (None, True, False) or not isinstance(self.method, str):
            raise RecipeError("quant.attention is true or false, quant.method a name")
        if not isinstance(self.sites, Mapping):
            raise RecipeError('quant.sites is a section of globs, as in "blocks.0.*" = "float"')
        for glob, scheme in self.sites.items():
            if scheme != FLOAT:
                bits_from_scheme(scheme, name=f"quant.sites.{glob!r}")

    def _check_polish(self) -> None:
        minutes = self.polish_minutes
        if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 <= minutes < math.inf:
            raise RecipeError(f"quant.polish_minutes is a number of minutes, 0 for none, found {minutes!r}")
        if minutes and self.format == "float8":
            raise RecipeError(
                "quant.polish_minutes trains weights on grids of integers, and fp8 has none; leave it out, or give "
                "--quant w8a8"
            )
        object.__setattr__(self, "polish_minutes", float(minutes))

    def bits(self, site: str, *, weight: bool) -> int | None:
        """Return the bits of a site's weight or activation, None where it stays float."""
        found: int | None = self.weights if weight else self.activations
        if site in ("head", "head_dist"):
            found = max(self.head_bits, found or 0)
        for glob, scheme in self.sites.items():
            if fnmatchcase(site, glob):
                found = None if scheme == FLOAT else bits_from_scheme(scheme, name=glob)[0 if weight else 1]
        return found

    @property
    def executable(self) -> bool:
        """True if integer kernels of 8 bits execute every activation; weights of fewer bits are stored in 8."""
        return self._activation_bits <= {8, WIDE_BITS}

    @property
    def wide(self) -> bool:
        """True if some activations have 16 bits: each of their products takes two of 8 bits."""
        return WIDE_BITS in self._activation_bits

    @property
    def _activation_bits(self) -> set[int]:
        return {self.activations, *(bits_from_scheme(s)[1] for s in self.sites.values() if s != FLOAT)}

    @property
    def scheme(self) -> str:
        """The usual short form, as W8A8 or FP8."""
        if self.format == "float8":
            return "FP8"
        return f"W{self.weights}A{self.activations}"


def quant_from_scheme(scheme: str) -> QuantRecipe | None:
    """Return what `--quant` names: "w8a8" and its like, "fp8", or "none".

    Raises:
        RecipeError: naming the usual ones.
    """
    if scheme == "none":
        return None
    if scheme.lower() == "fp8":
        return QuantRecipe(format="float8")
    weights, activations = bits_from_scheme(scheme)
    return QuantRecipe(weights=weights, activations=activations)


def bits_from_scheme(scheme: str, *, name: str = "--quant") -> tuple[int, int]:
    """Return (weight bits, activation bits) of "w8a8" and its like.

    Raises:
        RecipeError: naming the usual ones.
    """
    found = re.fullmatch(r"w(\d+)a(\d+)", scheme.lower()) if isinstance(scheme, str) else None
    if found is None or int(found[1]) not in _BITS or int(found[2]) not in (*_BITS, WIDE_BITS):
        raise RecipeError(
            f"{name} cannot be {scheme!r}; give w8a8, w6a6, w4a8, w4a4 or the like, with 2 to 8 bits, w8a16, or fp8"
        )
    return int(found[1]), int(found[2])
