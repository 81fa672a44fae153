"""The sites of a model that can be quantized, and what surrounds each.

Owns the list: which linear layers and attentions there are, which LayerNorm or activation function
feeds a layer, and what can therefore be folded. Sites are named in `quantizer`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitfold.architectures.sinks import PREFIX_ROWS
from vitfold.architectures.vit import vit
from vitfold.model import ViTSpec, param_shapes
from vitfold.ops.count import Count
from vitfold.recipe import MergeRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """A linear layer whose input and weight can be rounded.

    `norm` is the LayerNorm whose only consumer it is, `activation` the function whose output it takes,
    `values` the layer whose last third of rows its input is a convex combination of (the V rows of qkv). `apart`
    names the input of those tokens which have a range of their own there.
    """

    layer: str
    norm: str | None = None
    activation: str | None = None
    values: str | None = None
    groups: int = 1
    is_head: bool = False
    apart: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Its sites: input and weight, and the input of tokens apart."""
        names = (f"{self.layer}.x", f"{self.layer}.w")
        return names if self.apart is None else (*names, f"{self.apart}.x")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """An attention whose operands can be rounded."""

    site: str

    @property
    def names(self) -> tuple[str, ...]:
        """Its four sites."""
        return tuple(f"{self.site}.{operand}" for operand in ("q", "k", "v", "softmax"))


class _Sites(Count):
    """Lists layers in execution order, with the shapes of `Count`."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__(shapes)
        self.layers: list[str] = []
        self.attentions: list[str] = []

    def linear(self, layer: str, x: tuple[int, ...], rows: str = "") -> tuple[int, ...]:
        if not rows:
            self.layers.append(layer)
        return super().linear(layer, x, rows)

    def attention(
        self, site: str, q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], bias: tuple[int, ...] | None
    ) -> tuple[int, ...]:
        self.attentions.append(site)
        return super().attention(site, q, k, v, bias)


def find_sites(spec: ViTSpec) -> tuple[tuple[LinearSite, ...], tuple[AttentionSite, ...]]:
    """Return the quantizable layers and attentions in execution order.

    The patch embedding stays float (its input is the image, and it is under 1 % of the work), and so does the
    query of attention pooling, which is a constant.
    """
    required, optional = param_shapes(spec)
    walk = _Sites(dict(required | optional))
    vit(walk, spec, MergeRecipe(r=()), (1, spec.channels, *spec.image_size))
    found = tuple(_linear(spec, layer) for layer in walk.layers if layer != "pool.q")
    split = spec.sinks.layers if spec.sinks is not None and spec.sinks.split_prefix else ()
    linears = tuple(replace(s, apart=f"{s.layer}.{PREFIX_ROWS}") if s.layer in split else s for s in found)
    return linears, tuple(AttentionSite(site=site) for site in walk.attentions)


def _linear(spec: ViTSpec, layer: str) -> LinearSite:
    block, _, part = layer.rpartition("attn.") if ".attn." in layer else layer.rpartition("mlp.")
    if layer.startswith("blocks."):
        if part == "qkv":
            return LinearSite(layer=layer, norm=f"{block}norm1", groups=3)
        if part == "proj":
            return LinearSite(layer=layer, values=f"{block}attn.qkv")
        if part == "fc1":
            return LinearSite(layer=layer, norm=f"{block}norm2")
        return LinearSite(layer=layer, activation=spec.activation if spec.mlp == "plain" else None)
    if layer == "pool.mlp.fc1":
        return LinearSite(layer=layer, norm="pool.norm")
    if layer == "pool.mlp.fc2":
        return LinearSite(layer=layer, activation=spec.map_activation)
    return LinearSite(layer=layer, is_head=layer in ("head", "head_dist"))
