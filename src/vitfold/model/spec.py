"""The architecture of a plain Vision Transformer as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Num

from vitfold.errors import SourceError
from vitfold.model.graph import KIND, GraphSpec, graph_spec_from_dict, graph_spec_to_dict
from vitfold.model.sinks import Sinks, sinks_from_dict

Activation = Literal["gelu_erf", "gelu_tanh", "quick_gelu", "silu", "relu"]
Mlp = Literal["plain", "swiglu"]
PosEmbed = Literal["none", "all", "patches"]
Pool = Literal["token", "avg", "map", "token_avg", "token_dist", "none"]
HeadActivation = Literal["none", "tanh"]
Output = Literal["logits", "image_embeds", "last_hidden_state"]
"""What the first output of a model is; one that ends behind block L may call it "hidden_states.L"."""
Problem = Literal["single_label", "multi_label", "regression", "map", "segmentation"]
"""What an output stands for: one class, a yes or no each, numbers, a number per pixel, a class per pixel."""
Head = Literal["single_label", "multi_label", "regression", "map", "segmentation", "features"]
MAPS = ("map", "segmentation")
"""Kinds of outputs that are pictures, which only graphs give."""

Shape = tuple[int, ...]
HIDDEN = "hidden_states."
_ALSO = ("image_embeds", "last_hidden_state")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTSpec:
    """A pre-norm Vision Transformer encoder with a pooling and a head.

    Prefix tokens stand first: class token, distillation token, registers, in this order. `problem` says what the
    logits of a classifier stand for: one class among all, a yes or no each, or numbers. `sinks` says what is
    done about sink tokens, None as a model comes from its zoo. `also` are outputs behind the first one: "image_embeds"
    (what the head reads), "last_hidden_state" (all tokens behind the final norm), "hidden_states.L" (all tokens behind
    L blocks). `block_heads` and `block_mlp_dims` are the heads and the hidden units of each block where they differ;
    `num_heads` and `mlp_dim` then are the largest. `block_head_dims` are the widths of each block's heads where some
    are narrower than they were; `head_dim` is what they were.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int = 3
    embed_dim: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    class_token: bool = True
    dist_token: bool = False
    registers: int = 0
    pos_embed: PosEmbed = "all"
    pre_norm: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    activation: Activation = "gelu_erf"
    mlp: Mlp = "plain"
    norm_eps: float = 1e-6
    final_norm: bool = True
    pool: Pool = "token"
    pool_prefix: bool = False
    pool_norm: bool = False
    map_heads: int = 0
    map_mlp_width: int = 0
    map_activation: Activation = "gelu_erf"
    outputs: int = 0
    head_activation: HeadActivation = "none"
    output: str = "logits"
    problem: Problem = "single_label"
    sinks: Sinks | None = None
    also: tuple[str, ...] = ()
    block_heads: tuple[int, ...] = ()
    block_head_dims: tuple[int, ...] = ()
    block_mlp_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (
            ("activation", Activation),
            ("map_activation", Activation),
            ("mlp", Mlp),
            ("pos_embed", PosEmbed),
            ("pool", Pool),
            ("head_activation", HeadActivation),
            ("problem", Problem),
        ):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise SourceError(f"unsupported {name} {value!r}; supported: {', '.join(get_args(kind))}")
        for axis, (image, patch) in enumerate(zip(self.image_size, self.patch_size, strict=True)):
            if patch <= 0 or image < patch:
                raise SourceError(
                    f"image size {image} (axis {axis}) is smaller than the patch size {patch}; "
                    "choose a larger image size"
                )
        for name in ("channels", "embed_dim", "num_layers", "num_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) <= 0:
                raise SourceError(f"{name} must be positive, found {getattr(self, name)}")
        for name, most, reached in (
            ("block_heads", self.num_heads, True),
            ("block_head_dims", self.head_dim, False),
            ("block_mlp_dims", self.mlp_dim, True),
        ):
            own = getattr(self, name)
            fits = not own or (0 < min(own) <= max(own) <= most and (max(own) == most or not reached))
            if not fits or len(own) not in (0, self.num_layers):
                raise SourceError(f"{name} must be {self.num_layers} numbers from 1 to {most}, found {list(own)}")
        if self.pool in ("token", "token_avg", "token_dist") and not self.class_token:
            raise SourceError(f"pool {self.pool!r} needs a class token, which this model does not have")
        if (self.pool == "token_dist") and not self.dist_token:
            raise SourceError("pool 'token_dist' needs a distillation token, which this model does not have")
        if self.output == "logits" and not self.outputs:
            raise SourceError("a classifier needs outputs; a model without a head has the output 'image_embeds'")
        if self.pool == "map" and (self.map_heads <= 0 or self.embed_dim % self.map_heads):
            raise SourceError(f"attention pooling needs map_heads that divide the width {self.embed_dim}")
        if self.problem in MAPS:
            raise SourceError(f"this model gives logits or tokens, and a {self.problem} is an output of a graph")
        if self.output not in get_args(Output) and hidden_layer(self.output) != self.num_layers:
            raise SourceError(f"unsupported output {self.output!r}; supported: {', '.join(get_args(Output))}")
        for name in self.also:
            layer = hidden_layer(name)
            known = name in _ALSO and self.pool != "none" if layer is None else 1 <= layer <= self.num_layers
            if not known or name == self.output:
                raise SourceError(f"a model of {self.num_layers} blocks has no output {name} beside {self.output}")
        if self.sinks is not None:
            self._check_sinks(self.sinks)

    def _check_sinks(self, sinks: Sinks) -> None:
        site = sinks.deletion_site
        for name in ("start", "block"):
            behind = name == "block" and site is not None
            if getattr(sinks, name) >= self.num_layers + behind:
                raise SourceError(
                    f"there is no block {getattr(sinks, name)}: the model has {self.num_layers}, from 0 on"
                )
        if site is not None and sinks.block - block_layers(self).get(site, self.num_layers + 1) not in (0, 1):
            raise SourceError(f"no tokens can go at {site!r} so that block {sinks.block} has less")
        if sinks.deletions >= self.patches:
            raise SourceError(f"{sinks.deletions} of {self.patches} patch tokens cannot be deleted; delete fewer")
        if sinks.split_prefix and not self.prefix:
            raise SourceError("the model has no prefix tokens, so they cannot have a range of their own")
        for block, unit in sinks.neurons:
            if block >= self.num_layers or unit >= self.mlp_dim_of(block) or not self.registers:
                raise SourceError(f"block {block} cannot move the hidden unit {unit} to a register of the model")

    @property
    def head(self) -> Head:
        """What the outputs stand for: a single logit is a yes or no, since one class among one is always right."""
        if self.output != "logits":
            return "features"
        return "multi_label" if self.problem == "single_label" and self.outputs == 1 else self.problem

    @property
    def input(self) -> str:
        """The name of the input."""
        return "pixel_values"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image: channels, height, width."""
        return self.channels, *self.image_size

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of all outputs."""
        return (self.output, *self.also)

    @property
    def dense(self) -> bool:
        """True if the output is more than one vector per image."""
        return self.output not in ("logits", "image_embeds")

    @property
    def unmergeable(self) -> str:
        """Why tokens of this architecture never merge: nothing forbids it."""
        return ""

    @property
    def grid(self) -> tuple[int, int]:
        """Whole patches down and across; pixels beyond the last one are not seen, as in every zoo."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def patches(self) -> int:
        """Patch tokens that enter the first block."""
        return self.grid[0] * self.grid[1]

    @property
    def prefix(self) -> int:
        """Prefix tokens P: class, distillation and register tokens, never merged."""
        return int(self.class_token) + int(self.dist_token) + self.registers

    @property
    def suffix(self) -> int:
        """Tokens behind the patches: none."""
        return 0

    @property
    def fixed(self) -> int:
        """Tokens that never merge."""
        return self.prefix

    @property
    def tokens(self) -> int:
        """Tokens N that enter the first block."""
        return self.prefix + self.patches

    def with_widths(self, heads: Sequence[int], head_dims: Sequence[int], units: Sequence[int]) -> ViTSpec:
        """Return the architecture with so many heads, so wide, and so many hidden units per block: L numbers each."""
        return replace(
            self,
            num_heads=max(heads),
            mlp_dim=max(units),
            block_heads=_unlike(heads),
            block_head_dims=() if set(head_dims) == {self.head_dim} else tuple(head_dims),
            block_mlp_dims=_unlike(units),
        )

    def heads_of(self, block: int) -> int:
        """Heads of a block's attention."""
        return self.block_heads[block] if self.block_heads else self.num_heads

    def mlp_dim_of(self, block: int) -> int:
        """Hidden units of a block's MLP."""
        return self.block_mlp_dims[block] if self.block_mlp_dims else self.mlp_dim

    def head_dim_of(self, block: int) -> int:
        """Width K of the heads of a block's attention."""
        return self.block_head_dims[block] if self.block_head_dims else self.head_dim

    def attention_dim_of(self, block: int) -> int:
        """Width of a block's concatenated heads, H * K."""
        return self.heads_of(block) * self.head_dim_of(block)

    @property
    def pooled_width(self) -> int:
        """Width of what pooling hands to the head."""
        return 2 * self.embed_dim if self.pool == "token_avg" else self.embed_dim

    @property
    def output_width(self) -> int:
        """Width of the model's output vector."""
        return self.outputs or self.pooled_width


def hidden_state(layer: int) -> str:
    """Return the name of the tokens behind so many blocks."""
    return f"{HIDDEN}{layer}"


def hidden_layer(name: str) -> int | None:
    """Return behind how many blocks an output of this name stands, None if it is none of theirs."""
    count = name.removeprefix(HIDDEN)
    return int(count) if count != name and count.isdigit() else None


Architecture = ViTSpec | GraphSpec
"""What a model computes: a Vision Transformer by its dimensions, or somebody's graph by its program."""


def noise(spec: Architecture, count: int, seed: int = 0) -> Num[np.ndarray, "B ..."]:
    """Return so many random inputs: normal reals, or small whole numbers where the model takes whole ones."""
    dtype = spec.inputs[0].dtype if isinstance(spec, GraphSpec) else "float32"
    whole = np.dtype(dtype).kind in "iu" and dtype != "uint8"
    drawn = random_array((count, *spec.input_shape), dtype if whole else "float32", np.random.default_rng(seed))
    return drawn.astype(np.int64) if whole else drawn


def random_array(shape: Shape, dtype: str, random: np.random.Generator) -> Num[np.ndarray, ...]:
    """Return normal reals, pixels of eight bits, or small whole numbers, of the type that NumPy calls `dtype`."""
    if np.dtype(dtype).kind in "iu":
        return random.integers(0, 256 if dtype == "uint8" else 2, shape).astype(dtype)
    # One precision for all, so that a type changes numbers by its rounding alone.
    return random.standard_normal(shape, dtype=np.float32).astype(dtype)


def classes_of(spec: Architecture) -> int:
    """Return how many classes, labels or numbers a model answers with; 0 if it gives features."""
    if isinstance(spec, ViTSpec):
        return spec.outputs if spec.output == "logits" else 0
    return 0 if spec.head == "features" else spec.output_width


def as_vit(spec: Architecture, purpose: str) -> ViTSpec:
    """Return the dimensions of a Vision Transformer.

    Raises:
        SourceError: if the model is somebody's graph, whose parts have no names of vitfold's.
    """
    if isinstance(spec, ViTSpec):
        return spec
    raise SourceError(
        f"{purpose} a Vision Transformer of timm, transformers, torchvision or open_clip, and this model came as a "
        "graph; load it from there instead"
    )


def sigmoid(x: Float[np.ndarray, ...]) -> Float[np.ndarray, ...]:
    """Return 1 / (1 + exp(-x)), without overflow."""
    tail = np.exp(-np.abs(x))
    result: Float[np.ndarray, ...] = np.where(x >= 0, 1 / (1 + tail), tail / (1 + tail))
    return result


_EARLIER_NAMES = {
    "width": "embed_dim",
    "depth": "num_layers",
    "heads": "num_heads",
    "head_width": "head_dim",
    "mlp_width": "mlp_dim",
    "waves": "freq_dim",
    "wave_shift": "freq_shift",
}


def with_names_of_today(values: Any) -> Any:
    """Return a spec's values under the names of today; bundles of vitfold 0.1 have earlier ones."""
    if not isinstance(values, dict):
        return values
    return {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}


def with_first_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a spec's values under the names of vitfold 0.1, which digests of models are made of."""
    earlier = {name: first for first, name in _EARLIER_NAMES.items()}
    return {earlier.get(name, name): value for name, value in values.items()}


def spec_from_dict(values: dict[str, Any]) -> Architecture:
    """Rebuild an architecture from `spec_to_dict`; an unknown key is an error, since it would change the function."""
    return graph_spec_from_dict(values) if values.get("kind") == KIND else vit_spec_from_dict(values)


def _unlike(widths: Sequence[int]) -> tuple[int, ...]:
    """Widths of blocks, where they are not all alike."""
    return () if len(set(widths)) == 1 else tuple(widths)


_BY_BLOCK = ("block_heads", "block_head_dims", "block_mlp_dims")


def vit_spec_from_dict(values: dict[str, Any]) -> ViTSpec:
    """Rebuild a spec from `spec_to_dict`; an unknown key is an error, since it would change the function."""
    known = {f.name for f in fields(ViTSpec)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SourceError(f"unknown spec key {unknown[0]!r}; this vitfold is older than the file, upgrade vitfold")
    values = dict(values)
    for name in ("image_size", "patch_size", "also", *_BY_BLOCK):
        if name in values:
            values[name] = tuple(values[name])
    if values.get("sinks") is not None:
        values["sinks"] = sinks_from_dict(values["sinks"])
    return ViTSpec(**values)


def spec_to_dict(spec: Architecture) -> dict[str, Any]:
    """Return the spec as plain JSON values; `sinks`, `problem` and tuples only where they say something."""
    if isinstance(spec, GraphSpec):
        return graph_spec_to_dict(spec)
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(replace(spec, sinks=None)).items()}
    del values["sinks"]
    for name in ("also", *_BY_BLOCK):
        if not values[name]:
            del values[name]
    if spec.problem == "single_label":
        del values["problem"]
    return values if spec.sinks is None else {**values, "sinks": spec.sinks.to_dict()}


def block_layers(spec: Architecture) -> dict[str, int]:
    """Return the linear layers of all blocks in order of execution, each with its block."""
    if isinstance(spec, GraphSpec):
        return {}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return {f"blocks.{block}.{part}": block for block in range(spec.num_layers) for part in parts}


def param_shapes(spec: Architecture) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return (required, optional) parameter names and shapes; linear weights are (out, in).

    Biases of linear layers are optional; those of LayerNorm are required.
    """
    if isinstance(spec, GraphSpec):
        return dict(spec.shapes), _absent_biases(dict(spec.shapes))
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    width = spec.embed_dim

    def linear(layer: str, outputs: int, inputs: int) -> None:
        required[f"{layer}.weight"] = (outputs, inputs)
        optional[f"{layer}.bias"] = (outputs,)

    def norm(layer: str, size: int) -> None:
        required[f"{layer}.weight"] = (size,)
        required[f"{layer}.bias"] = (size,)

    required["patch_embed.weight"] = (width, spec.channels, *spec.patch_size)
    optional["patch_embed.bias"] = (width,)
    if spec.class_token:
        required["cls_token"] = (1, 1, width)
    if spec.dist_token:
        required["dist_token"] = (1, 1, width)
    if spec.registers:
        required["reg_token"] = (1, spec.registers, width)
    if spec.pos_embed != "none":
        required["pos_embed"] = (1, spec.tokens if spec.pos_embed == "all" else spec.patches, width)
    if spec.pre_norm:
        norm("pre_norm", width)
    for i in range(spec.num_layers):
        block = f"blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * spec.attention_dim_of(i), width)
        if spec.qk_norm:
            norm(f"{block}.attn.q_norm", spec.head_dim_of(i))
            norm(f"{block}.attn.k_norm", spec.head_dim_of(i))
        linear(f"{block}.attn.proj", width, spec.attention_dim_of(i))
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", spec.mlp_dim_of(i) * (2 if spec.mlp == "swiglu" else 1), width)
        linear(f"{block}.mlp.fc2", width, spec.mlp_dim_of(i))
        if spec.layer_scale:
            required[f"{block}.ls1"] = (width,)
            required[f"{block}.ls2"] = (width,)
        if spec.sinks is not None and spec.sinks.cached(i):
            for name in ("cached_k", "cached_v"):
                required[f"{block}.attn.{name}"] = (1, spec.heads_of(i), spec.sinks.rows, spec.head_dim_of(i))
    if spec.final_norm:
        norm("norm", width)
    _pool_shapes(spec, required, linear, norm)
    return required, optional


def _absent_biases(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The biases that linear layers of a graph could have and have not."""
    layers = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight")}
    return {
        f"{layer}.bias": shape[:1]
        for layer, shape in layers.items()
        if len(shape) == 2 and f"{layer}.bias" not in shapes
    }


def _pool_shapes(
    spec: ViTSpec, required: dict[str, Shape], linear: Callable[[str, int, int], None], norm: Callable[[str, int], None]
) -> None:
    """Add what pooling and the head have."""
    width = spec.embed_dim
    if spec.pool == "map":
        required["pool.latent"] = (1, 1, width)
        linear("pool.q", width, width)
        linear("pool.kv", 2 * width, width)
        linear("pool.proj", width, width)
        if spec.map_mlp_width:
            norm("pool.norm", width)
            linear("pool.mlp.fc1", spec.map_mlp_width, width)
            linear("pool.mlp.fc2", width, spec.map_mlp_width)
    if spec.pool_norm:
        norm("pool_norm", spec.pooled_width)
    if spec.outputs:
        linear("head", spec.outputs, spec.pooled_width)
        if spec.pool == "token_dist":
            linear("head_dist", spec.outputs, spec.pooled_width)
