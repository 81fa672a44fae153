"""A model as a value: spec, parameters, preprocessing, labels, origin."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from vitfold.errors import SourceError
from vitfold.model.preprocess import Preprocess
from vitfold.model.spec import Architecture, Shape, param_shapes, spec_to_dict, with_first_names

Array = NDArray[Any]
S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where the weights came from: a source string that `load` understands again, and what loaded it."""

    source: str
    loader: str
    arguments: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"source": self.source, "loader": self.loader, "arguments": dict(self.arguments)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Checkpoint(ABC, Generic[S]):
    """What every model has: an architecture, the parameters that fit it, names of its classes, and an origin.

    Checked at construction, so that a half-made one can't exist.
    """

    spec: S
    params: Mapping[str, Array]
    labels: tuple[str, ...] | None
    origin: Origin

    def __post_init__(self) -> None:
        check_arrays(*self._shapes(), self.params)
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        count, of = self._labelled()
        if self.labels is not None and len(self.labels) != count:
            raise SourceError(f"{len(self.labels)} labels for {count} {of}; give one for each or none")

    @property
    def size_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(int(p.nbytes) for p in self.params.values())

    @abstractmethod
    def _shapes(self) -> tuple[dict[str, Shape], dict[str, Shape]]:
        """Return (required, optional) names and shapes of parameters."""

    @abstractmethod
    def _labelled(self) -> tuple[int, str]:
        """Return how many labels there may be, and of what."""

    @abstractmethod
    def digest(self) -> str:
        """Return the sha256 over all that decides what comes out, in hexadecimal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model(Checkpoint[Architecture]):
    """A Vision Transformer, or a graph, as data: from images to outputs."""

    preprocess: Preprocess

    def _shapes(self) -> tuple[dict[str, Shape], dict[str, Shape]]:
        return param_shapes(self.spec)

    def _labelled(self) -> tuple[int, str]:
        return self.spec.output_width, "outputs"

    def with_params(self, spec: Architecture, params: Mapping[str, Array]) -> Model:
        """Return this model with another spec and parameters; the shape of every fold."""
        return replace(self, spec=spec, params=params)

    def digest(self) -> str:
        """Return the sha256 over the spec, the preprocessing and every parameter, in hexadecimal."""
        return params_digest([with_first_names(spec_to_dict(self.spec)), self.preprocess.to_dict()], self.params)


def params_digest(head: Any, params: Mapping[str, Array]) -> str:
    """Return the sha256 over plain JSON values and every parameter, in hexadecimal."""
    total = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        total.update(f"{name}{array.dtype}{array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def check_params(spec: Architecture, params: Mapping[str, Array]) -> None:
    """Check names, shapes, types and finiteness of `params` against `spec`.

    Raises:
        SourceError: naming the first keys that are missing, left over, misshapen or not finite.
    """
    required, optional = param_shapes(spec)
    check_arrays(required, optional, params)


def check_arrays(required: Mapping[str, Shape], optional: Mapping[str, Shape], params: Mapping[str, Array]) -> None:
    """Check names, shapes, types and finiteness of `params` against those that an architecture has.

    Raises:
        SourceError: naming the first keys that are missing, left over, misshapen or not finite.
    """
    missing = sorted(set(required) - set(params))
    extra = sorted(set(params) - set(required) - set(optional))
    if missing or extra:
        raise SourceError(
            f"weights do not fit the architecture: missing {missing[:4] or 'none'}, unexpected {extra[:4] or 'none'}; "
            "check the architecture name and its options"
        )
    for name, array in params.items():
        shape = required.get(name) or optional[name]
        if tuple(array.shape) != shape:
            raise SourceError(
                f"weight {name} has shape {tuple(array.shape)}, the architecture needs {shape}; "
                "check the architecture, --num-classes and --image-size"
            )
        if array.dtype != np.float32:
            raise SourceError(f"weight {name} has type {array.dtype}; parameters are float32")
        # A sum is not finite as soon as one element is not, and costs one pass without a mask.
        if not np.isfinite(array.sum(dtype=np.float64)):
            bad = int((~np.isfinite(array)).sum())
            raise SourceError(
                f"weight {name} holds {bad} values that are NaN or infinite; "
                "the checkpoint is damaged or was saved after a diverged training: use another one"
            )
