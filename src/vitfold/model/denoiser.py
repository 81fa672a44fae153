"""A denoiser that came from a torch module as data: its program, and what a sampler has to know of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vitfold.errors import SourceError
from vitfold.model.params import Checkpoint, params_digest
from vitfold.model.schedule import flow_sampler, own_sampler
from vitfold.model.spec import Shape

KIND = "denoiser"
IMAGE, TIMESTEP = "image", "timestep"
"""What every denoiser reads beside its conditions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One input beside image and timestep, such as the embeddings of a text: its name and the shape of a row."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserSpec:
    """A transformer that predicts noise or velocity of latents under conditions that come as arrays.

    `module` is the class of the original. `outputs` channels come out: twice those of the image where a variance is
    predicted besides. The module is given `time_scale` times the scheduler's timestep. The stack of blocks goes from
    tokens to tokens of one shape, (tokens, embed_dim).

    Latents are (channels, height, width), or packed: rows of (tokens, channels). A pipeline draws the noise of packed
    latents in another order: `packing` are the length and the stride, in the drawn noise, of the axes that latents
    consist of, in their order.
    """

    module: str
    image_shape: tuple[int, ...]
    outputs: int
    tokens: int
    embed_dim: int
    num_layers: int
    conditions: tuple[Condition, ...]
    time_scale: float = 1.0
    packing: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.image_shape) not in (2, 3) or min(self.image_shape) < 1:
            raise SourceError(
                f"{self.module} takes images of shape {self.image_shape}; channels, height, width or tokens, channels "
                "needed"
            )
        if bool(self.packing) != self.packed or (self.packed and not _covers(self.packing, self.image_shape)):
            raise SourceError(f"{self.module} packs latents of {self.image_shape} by {self.packing}, which is no order")
        if self.outputs not in (self.channels, 0 if self.packed else 2 * self.channels):
            raise SourceError(
                f"{self.module} has {self.outputs} output channels for {self.channels} input channels; a model "
                "predicts as many, or twice as many with a learned variance of latents that are not packed"
            )
        names = [one.name for one in self.conditions]
        if len(set(names)) < len(names) or {IMAGE, TIMESTEP} & set(names):
            raise SourceError(f"the inputs of {self.module} need names of their own, found {', '.join(names)}")

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.image_shape[-1] if self.packed else self.image_shape[0]

    @property
    def packed(self) -> bool:
        """Whether latents are rows of tokens."""
        return len(self.image_shape) == 2

    @property
    def prediction_shape(self) -> tuple[int, ...]:
        """The shape of what comes out, without the batch."""
        return (self.image_shape[0], self.outputs) if self.packed else (self.outputs, *self.image_shape[1:])

    @property
    def learned_sigma(self) -> bool:
        """Whether the second half of the output channels is a variance."""
        return self.outputs == 2 * self.channels


def _covers(packing: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> bool:
    """Whether axes of a length and a stride each go through all numbers of a shape, each once."""
    reached = 1
    for length, stride in sorted(packing, key=lambda axis: axis[1]):
        if stride != reached or length < 2:
            return False
        reached *= length
    return reached == math.prod(shape)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenoiserModel(Checkpoint[DenoiserSpec]):
    """A denoiser as data: `program` is the text form of a program from image, timestep and conditions.

    Its outputs are `prediction`, and what `entered` and `left` the stack of blocks; `shapes` are those of parameters.
    """

    program: str = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)
    schedule: Mapping[str, Any]
    latent: bool = True
    decoder: str | None = None

    def __post_init__(self) -> None:
        Checkpoint.__post_init__(self)
        if flow_sampler(self.schedule) is None:
            own_sampler(self.schedule)

    def _shapes(self) -> tuple[dict[str, Shape], dict[str, Shape]]:
        return dict(self.shapes), {}

    def _labelled(self) -> tuple[int, str]:
        return 0, "classes: its conditions are arrays"

    def digest(self) -> str:
        """Return the sha256 over spec, program, noise schedule and every parameter, in hexadecimal."""
        return params_digest([denoiser_spec_to_dict(self.spec), self.program, dict(self.schedule)], self.params)


def denoiser_spec_to_dict(spec: DenoiserSpec) -> dict[str, Any]:
    """Return plain JSON values; without a key for packing where nothing is packed."""
    found = {"kind": KIND, **asdict(spec)}
    if not spec.packing:
        del found["packing"]
    return found


def denoiser_spec_from_dict(values: Mapping[str, Any]) -> DenoiserSpec:
    """Rebuild a spec from `denoiser_spec_to_dict`; an unknown key is an error, since it would change the function."""
    unknown = sorted(set(values) - {one.name for one in fields(DenoiserSpec)} - {"kind"})
    if unknown:
        raise SourceError(f"unknown spec key {unknown[0]!r}; this vitfold is older than the file, upgrade vitfold")
    given = {name: value for name, value in values.items() if name != "kind"}
    try:
        given["image_shape"] = tuple(values["image_shape"])
        given["packing"] = tuple((int(length), int(stride)) for length, stride in values.get("packing", ()))
        given["conditions"] = tuple(
            Condition(name=str(one["name"]), shape=tuple(one["shape"])) for one in values["conditions"]
        )
        return DenoiserSpec(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"the spec is none of a denoiser ({error!r}); make the bundle again") from None
