"""Quantization methods as recipes of parts: a table, not code.

The parts themselves are `linear`, `attention`, `ranges`, `folding`, `equalize` and `rounding`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from vitfold.errors import RecipeError, nearest
from vitfold.quant.ranges import Grid

Metric = Literal["minmax", "percentile", "mse", "output", "hessian"]
Softmax = Literal["uniform", "twin", "log2", "log_sqrt2", "adalog"]
Rounding = Literal["nearest", "gptq", "halving"]
Curvature = Literal["gauss-newton", "fisher"]
"""Whose diagonal weighs the squared error of a layer's output: see `quant.collect.probe`."""


_WEIGHTS = Grid(start=0.4, stop=1.0, count=61)
_ACTIVATIONS = Grid(start=0.3, stop=1.0, count=36)
_PUBLISHED = Grid(start=0.01, stop=1.2, count=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantMethod:
    """The parts of one method.

    `weights` and `activations` name the error that a range is chosen by: none (minmax), a percentile of
    the samples, the rounding error itself (mse), the error of the layer's output (output), or that
    weighted by the diagonal of a `curvature` of the model's output (hessian). `granularity` of weights is per output
    channel, or per tensor with one scale each for the Q, K and V rows of qkv. `softmax` lists the quantizers that the
    search may choose from. `rotate` turns streams and heads so that no channel is an outlier, `equalize` names the
    exact fold of LayerNorm's channels, `values` folds V's channels into proj, `head_scales` gives every attention head
    ranges of its own, `noise` adds a fixed vector before rounding, `rounding` and `correct` say how weights go to their
    grid. `log_gelu` lets post-GELU values have a logarithmic quantizer of a searched base, in simulations. `tied_twins`
    says whether the two scales behind GELU differ by a power of two, as those behind softmax always do.
    """

    name: str
    source: str
    granularity: Literal["channel", "tensor"] = "channel"
    symmetric_weights: bool = True
    symmetric: bool = False
    weights: Metric = "mse"
    activations: Metric = "mse"
    weight_grid: Grid = _WEIGHTS
    grid: Grid = _ACTIVATIONS
    rounds: int = 1
    equalize: Literal["none", "repq", "smooth", "searched"] = "none"
    values: bool = False
    rotate: bool = False
    head_scales: bool = False
    twin_gelu: bool = False
    tied_twins: bool = False
    log_gelu: bool = False
    curvature: Curvature = "gauss-newton"
    softmax: tuple[Softmax, ...] = ("uniform",)
    noise: bool = False
    rounding: Rounding = "nearest"
    correct: bool = False

    @property
    def gradients(self) -> Curvature | None:
        """The curvature by whose probes the search weighs errors, None if it needs no gradients."""
        return self.curvature if "hessian" in (self.weights, self.activations) else None

    @property
    def runs_softmax(self) -> bool:
        """True if an engine executes at least one of the method's softmax quantizers."""
        return bool({"uniform", "twin"} & set(self.softmax))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


_PTQ4VIT = QuantMethod(
    name="ptq4vit",
    source="PTQ4ViT, Yuan et al., ECCV 2022 (2111.12293): twin uniform quantizers in the paper's disjoint "
    "form, Hessian-guided alternating search with Gauss-Newton probes",
    granularity="tensor",
    symmetric=True,
    weights="hessian",
    activations="hessian",
    weight_grid=_PUBLISHED,
    grid=_PUBLISHED,
    rounds=3,
    head_scales=True,
    twin_gelu=True,
    softmax=("twin",),
)
METHODS: dict[str, QuantMethod] = {
    method.name: method
    for method in (
        QuantMethod(
            name="vitfold",
            source="residual streams and heads turned at random, LayerNorm channels shifted and scaled (strength "
            "searched), V's channels folded into proj, ranges searched by the error of each layer's output, GPTQ "
            "rounding with a ridge correction",
            weights="output",
            activations="output",
            rotate=True,
            equalize="searched",
            values=True,
            head_scales=True,
            twin_gelu=True,
            softmax=("uniform", "twin", "log_sqrt2"),
            rounding="gptq",
            correct=True,
        ),
        _PTQ4VIT,
        replace(
            _PTQ4VIT,
            name="ptq4vit-paper",
            source="PTQ4ViT as printed (2111.12293): squared gradients as the Fisher information of the model's "
            "classes, scales of both twins a power of two apart",
            tied_twins=True,
            curvature="fisher",
        ),
        QuantMethod(
            name="repq",
            source="RepQ-ViT, Li et al., ICCV 2023 (2212.08254): per-channel LayerNorm ranges folded into one, "
            "log-sqrt2 softmax, percentile ranges chosen by MSE",
            symmetric_weights=False,
            weights="percentile",
            activations="percentile",
            equalize="repq",
            softmax=("log_sqrt2",),
        ),
        QuantMethod(
            name="adalog",
            source="AdaLog, Wu et al., ECCV 2024 (2407.12951): logarithms of a searched base for softmax and for GELU "
            "moved by its minimum, RepQ-ViT's fold of LayerNorm, ranges by the error of each layer's output",
            weights="output",
            activations="output",
            equalize="repq",
            head_scales=True,
            softmax=("adalog",),
            log_gelu=True,
        ),
        QuantMethod(
            name="erq",
            source="ERQ, Zhong et al., ICML 2024 (2407.06794): RepQ-ViT's quantizers, weights refitted by ridge "
            "regression to the rounding of their inputs, then rounded by halves, each refitted to the one before",
            weights="mse",
            activations="percentile",
            equalize="repq",
            softmax=("log_sqrt2",),
            rounding="halving",
            correct=True,
        ),
        QuantMethod(
            name="noisy",
            source="NoisyQuant, Liu et al., CVPR 2023 (2211.16056): a fixed noise vector added before rounding and "
            "taken off again in the bias",
            symmetric=True,
            weights="mse",
            activations="output",
            noise=True,
        ),
        QuantMethod(
            name="smooth",
            source="SmoothQuant, Xiao et al., ICML 2023 (2211.10438): activation ranges moved into the weights, "
            "alpha = 0.5, after LayerNorm",
            weights="mse",
            activations="mse",
            equalize="smooth",
        ),
        QuantMethod(name="mse", source="ranges of least squared rounding error", weights="mse", activations="mse"),
        QuantMethod(
            name="percentile",
            source="0.9999 percentile of activations, minmax weights",
            weights="minmax",
            activations="percentile",
        ),
        QuantMethod(name="minmax", source="observed minimum and maximum", weights="minmax", activations="minmax"),
        QuantMethod(
            name="gptq",
            source="observed minimum and maximum, GPTQ rounding (2210.17323) with a ridge correction: clips nothing, "
            "for models whose rare large activations carry meaning, as diffusion models' do",
            weights="minmax",
            activations="minmax",
            rounding="gptq",
            correct=True,
        ),
    )
}


def find_method(name: str) -> QuantMethod:
    """Return the method of this name.

    Raises:
        RecipeError: offering the nearest names.
    """
    if name not in METHODS:
        raise RecipeError(f"unknown quantization method {name!r}; {nearest(name, METHODS)}")
    return METHODS[name]
