"""The architecture of somebody's graph as data: its program, and what is known about its tokens and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from vitfold.errors import SourceError
from vitfold.model.sinks import Sinks

Shape = tuple[int, ...]
Kind = Literal["single_label", "multi_label", "regression", "map", "segmentation", "features"]
KIND = "graph"


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphEnd:
    """An input or output as the file has it: name, type by NumPy's name, lengths or the names of open ones."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSpec:
    """A program that came from outside, in the text form of `Program.to_dict`, with the shapes of its parameters.

    The first output is the one that is compared and classified. `prefix` tokens that never merge stand in front of a
    raster of `grid` patches, and `suffix` ones behind it; where `num_layers` is 0 or `unmergeable` says why, nothing
    merges. `num_heads`, `head_dim` and `mlp_dim` are those of the first block. `foreign` are the sites of nodes that
    were left as they are, with the reason.
    """

    program: str = field(repr=False)
    shapes: tuple[tuple[str, Shape], ...] = field(repr=False)
    inputs: tuple[GraphEnd, ...]
    outputs_of: tuple[GraphEnd, ...]
    opset: int
    image_size: tuple[int, int]
    channels: int
    num_layers: int
    num_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    tokens: int
    prefix: int
    grid: tuple[int, int]
    head: Kind = "features"
    unmergeable: str = ""
    suffix: int = 0
    foreign: tuple[tuple[str, str], ...] = ()

    def head_dim_of(self, _block: int) -> int:
        """Width of the heads of a block, taken to be that of the first one's."""
        return self.head_dim

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs_of:
            raise SourceError("a graph needs an input and an output")
        if self.head not in get_args(Kind):
            raise SourceError(f"unsupported head {self.head!r}; supported: {', '.join(get_args(Kind))}")
        if not self.unmergeable and self.tokens != self.fixed + math.prod(self.grid):
            raise SourceError(f"{self.tokens} tokens are not {self.fixed} and a grid of {self.grid}")

    @property
    def input(self) -> str:
        """The name of the first input."""
        return self.inputs[0].name

    @property
    def input_shape(self) -> Shape:
        """The shape of one example of the first input."""
        lengths = tuple(length for length in self.inputs[0].shape[1:] if isinstance(length, int))
        return lengths if len(lengths) == len(self.inputs[0].shape) - 1 else (self.channels, *self.image_size)

    @property
    def output(self) -> str:
        """The name of the first output."""
        return self.outputs_of[0].name

    @property
    def output_names(self) -> tuple[str, ...]:
        """The names of all outputs."""
        return tuple(end.name for end in self.outputs_of)

    @property
    def output_width(self) -> int:
        """Length of the last axis of the first output; of a segmentation the number of classes."""
        shape = self.outputs_of[0].shape
        last = shape[1] if self.head == "segmentation" and len(shape) > 1 else shape[-1] if shape else 1
        return last if isinstance(last, int) else 1

    @property
    def dense(self) -> bool:
        """True if the first output is more than one vector per image."""
        return len(self.outputs_of[0].shape) > 2

    @property
    def patches(self) -> int:
        """Patch tokens that enter the first block."""
        return self.tokens - self.fixed

    @property
    def fixed(self) -> int:
        """Tokens that never merge."""
        return self.prefix + self.suffix

    @property
    def class_token(self) -> bool:
        """Whether a token stands in front of the patches that rules may ask."""
        return self.prefix > 0

    @property
    def sinks(self) -> Sinks | None:
        """None: nothing is done about sinks of a model whose parts have no names."""
        return None

    @property
    def layer_scale(self) -> bool:
        """False: factors are operations of the program."""
        return False


def graph_spec_to_dict(spec: GraphSpec) -> dict[str, Any]:
    """Return plain JSON values."""
    values = {name: _listed(value) for name, value in asdict(spec).items()}
    return {"kind": KIND, **values}


def graph_spec_from_dict(values: Mapping[str, Any]) -> GraphSpec:
    """Rebuild a spec from `graph_spec_to_dict`.

    Raises:
        SourceError: if a key is unknown or a value none of its kind.
    """
    known = {f.name for f in fields(GraphSpec)}
    unknown = sorted(set(values) - known - {"kind"})
    if unknown:
        raise SourceError(f"unknown spec key {unknown[0]!r}; this vitfold is older than the file, upgrade vitfold")
    try:
        given = {name: _tupled(value) for name, value in values.items() if name != "kind"}
        for name in ("inputs", "outputs_of"):
            given[name] = tuple(
                GraphEnd(name=end["name"], dtype=end["dtype"], shape=_tupled(end["shape"])) for end in values[name]
            )
        return GraphSpec(**given)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"the spec is none of a graph ({error}); make the bundle again") from None


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _listed(one) for name, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value
