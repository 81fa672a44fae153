"""The architecture of a Diffusion Transformer as data, and such a model as a value.

The features that the program `architectures.dit` can run, the names and shapes of its parameters, and the tables
that are computed and not learned: positions and the embedding of a timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from vitfold.errors import SourceError
from vitfold.model.params import Array, Checkpoint, params_digest
from vitfold.model.schedule import own_sampler
from vitfold.model.spec import Activation, Shape, with_first_names

MODULATIONS = 6
"""Vectors that adaLN-Zero gives a block: shift, scale and gate of the attention, then of the MLP."""

Condition = Literal["block", "shared"]
_LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTSpec:
    """A Diffusion Transformer with adaLN-Zero blocks: square images or latents, classes, no text.

    `condition` says whether every block embeds timestep and class itself, or all share one embedding. The row behind
    the last class is the null class of guidance. `outputs` are the channels that come out: twice those that go in
    where the model also predicts a variance (`learned_sigma`).
    """

    image_size: int
    patch_size: int
    channels: int
    outputs: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    classes: int
    freq_dim: int = 256
    freq_shift: int = 0
    condition: Condition = "shared"
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    mlp_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, kind in (("activation", Activation), ("condition", Condition)):
            value = getattr(self, name)
            if value not in get_args(kind):
                raise SourceError(f"unsupported {name} {value!r}; supported: {', '.join(get_args(kind))}")
        for name in (
            "image_size",
            "patch_size",
            "channels",
            "embed_dim",
            "num_layers",
            "num_heads",
            "mlp_dim",
            "classes",
        ):
            if getattr(self, name) <= 0:
                raise SourceError(f"{name} must be positive, found {getattr(self, name)}")
        if self.image_size % self.patch_size:
            raise SourceError(f"the patch size {self.patch_size} does not divide the sample size {self.image_size}")
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise SourceError(f"the width {self.embed_dim} must be a multiple of the {self.num_heads} heads and of 4")
        if self.outputs not in (self.channels, 2 * self.channels):
            raise SourceError(
                f"{self.outputs} output channels for {self.channels} input channels; a model predicts as many, or "
                "twice as many with a learned variance"
            )
        if self.freq_dim % 2 or self.freq_dim // 2 <= self.freq_shift:
            raise SourceError(f"the embedding of a timestep takes an even number of frequencies, found {self.freq_dim}")

    @property
    def grid(self) -> int:
        """Patches down, and as many across."""
        return self.image_size // self.patch_size

    @property
    def image_shape(self) -> Shape:
        """Channels, height and width of what is drawn."""
        return self.channels, self.image_size, self.image_size

    @property
    def tokens(self) -> int:
        """Tokens N of every block."""
        return self.grid**2

    @property
    def learned_sigma(self) -> bool:
        """Whether the second half of the output channels is a variance."""
        return self.outputs == 2 * self.channels

    @property
    def null_class(self) -> int:
        """The class that stands for no class."""
        return self.classes

    @property
    def modulations(self) -> int:
        """Vectors that condition one evaluation: those of every block, then shift and scale of the head."""
        return MODULATIONS * self.num_layers + 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiTModel(Checkpoint[DiTSpec]):
    """A Diffusion Transformer as data.

    `schedule` is the noise schedule that it was trained with, in the words of diffusers' schedulers. `decoder` is the
    folder of the VAE that turns latents into images, None where pixels come out or the folder is not there.
    """

    schedule: Mapping[str, Any]
    latent: bool = False
    decoder: str | None = None

    def __post_init__(self) -> None:
        Checkpoint.__post_init__(self)
        own_sampler(self.schedule)

    def _shapes(self) -> tuple[dict[str, Shape], dict[str, Shape]]:
        return dit_param_shapes(self.spec)

    def _labelled(self) -> tuple[int, str]:
        return self.spec.classes, "classes"

    def digest(self) -> str:
        """Return the sha256 over the spec, the noise schedule and every parameter, in hexadecimal."""
        return params_digest([with_first_names(asdict(self.spec)), dict(self.schedule)], self.params)


def dit_param_shapes(spec: DiTSpec) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return (required, optional) parameter names and shapes; linear weights are (out, in), their biases optional.

    `unit_norm` is the one LayerNorm of the model, without effect of its own: ones and zeros.
    """
    required: dict[str, Shape] = {}
    optional: dict[str, Shape] = {}
    width, pixels = spec.embed_dim, spec.patch_size**2

    def linear(layer: str, outputs: int, inputs: int) -> None:
        required[f"{layer}.weight"] = (outputs, inputs)
        optional[f"{layer}.bias"] = (outputs,)

    required["patch_embed.weight"] = (width, spec.channels, spec.patch_size, spec.patch_size)
    optional["patch_embed.bias"] = (width,)
    required["pos_embed"] = (1, spec.tokens, width)
    required["unit_norm.weight"] = required["unit_norm.bias"] = (width,)
    for site in condition_sites(spec):
        linear(f"{site}.time.fc1", width, spec.freq_dim)
        linear(f"{site}.time.fc2", width, width)
        required[f"{site}.label.weight"] = (width, spec.classes + 1)
    for block in range(spec.num_layers):
        site = f"blocks.{block}"
        linear(f"{site}.modulation", MODULATIONS * width, width)
        linear(f"{site}.attn.qkv", 3 * width, width)
        linear(f"{site}.attn.proj", width, width)
        linear(f"{site}.mlp.fc1", spec.mlp_dim, width)
        linear(f"{site}.mlp.fc2", width, spec.mlp_dim)
    linear("head.modulation", 2 * width, width)
    linear("head.proj", pixels * spec.outputs, width)
    return required, optional


def condition_sites(spec: DiTSpec) -> tuple[str, ...]:
    """Return where timestep and class are embedded: once, or in every block."""
    if spec.condition == "shared":
        return ("condition",)
    return tuple(f"blocks.{block}.condition" for block in range(spec.num_layers))


def unit_norm(width: int) -> dict[str, Array]:
    """Return the parameters of a LayerNorm that neither scales nor shifts."""
    return {"unit_norm.weight": np.ones(width, np.float32), "unit_norm.bias": np.zeros(width, np.float32)}


def sincos_positions(grid: int, width: int) -> Float[np.ndarray, "1 N D"]:
    """Return fixed positions: a quarter of the width each for sine and cosine of the column, then of the row.

    Equation: w_i = 10000^(-4i/D); p(y, x) = (sin x w, cos x w, sin y w, cos y w).

    Source: DiT (2212.09748), section 3.2, after MAE (2111.06377).
    """
    frequencies = _LONGEST_PERIOD ** (-np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    angles = [np.outer(place, frequencies) for place in (columns, rows)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1, dtype=np.float32)[None]


def timestep_embedding(spec: DiTSpec, timesteps: Int[np.ndarray, " T"]) -> Float[np.ndarray, "T W"]:
    """Return sines and cosines of a timestep, by which it enters the model: `t_freq`.

    Equation: w_i = 10000^(-i / (W/2 - s)); (cos t w, sin t w), with s = `freq_shift`.

    Source: DDPM (2006.11239), appendix B; in float32, as the models were trained.
    """
    half = spec.freq_dim // 2
    exponents = np.float32(-np.log(_LONGEST_PERIOD)) * np.arange(half, dtype=np.float32)
    exponents = exponents / np.float32(half - spec.freq_shift)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(np.float32)[:, None] * frequencies[None]
    return np.concatenate((np.cos(angles), np.sin(angles)), axis=1)


def class_rows(spec: DiTSpec, labels: Int[np.ndarray, " B"]) -> Float[np.ndarray, "B C"]:
    """Return one-hot rows, one column per class and one for the null class."""
    rows = np.zeros((len(labels), spec.classes + 1), np.float32)
    rows[np.arange(len(labels)), labels] = 1
    return rows


def dit_spec_from_dict(values: Mapping[str, Any]) -> DiTSpec:
    """Rebuild a spec from its fields; an unknown key is an error, since it would change the function."""
    unknown = sorted(set(values) - {f.name for f in fields(DiTSpec)})
    if unknown:
        raise SourceError(f"unknown spec key {unknown[0]!r}; this vitfold is older than the file, upgrade vitfold")
    return DiTSpec(**values)
