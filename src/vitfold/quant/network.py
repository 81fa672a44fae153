"""What quantization works on: a program with its parameters and sites, and the inputs that it is calibrated with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from vitfold.architectures.programs import program_of
from vitfold.artifacts.cache import key_of
from vitfold.images import ImageSet, batches
from vitfold.model import Array, Model, Preprocess
from vitfold.model.spec import Head
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.quant.sites import AttentionSite, LinearSite, find_sites
from vitfold.recipe import MergeRecipe
from vitfold.transforms.rewriting import only_outputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """A program with its parameters, and what of it can be rounded.

    `leave_out` tokens per image are left out of every range. `head` says what its outputs are: of features only the
    direction counts. `digest` stands for everything, None where parameters were changed since.
    """

    program: Program
    params: Mapping[str, Array]
    linears: tuple[LinearSite, ...]
    attentions: tuple[AttentionSite, ...]
    leave_out: int = 0
    head: Head = "regression"
    digest: str | None = None

    def run(self, ops: Run, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the first output."""
        output: Tensor = replay(self.program, ops, *inputs)[0]
        return output

    def with_params(self, params: Mapping[str, Array]) -> Network:
        """Return the network with other parameters."""
        return replace(self, params=params, digest=None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Inputs of a program, each with `size` rows, and what a message calls the first of them."""

    inputs: tuple[Tensor, ...]
    size: int
    first: str


@runtime_checkable
class Examples(Protocol):
    """Inputs that a network is calibrated with."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def digest(self) -> str:
        """Return what stands for all of them in keys."""
        ...

    def batches(self, size: int) -> Iterator[Batch]:
        """Return them in order, `size` at a time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageExamples:
    """Images, preprocessed as a model wants them."""

    images: ImageSet
    preprocess: Preprocess

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.images.paths)

    def digest(self) -> str:
        """Return the digest of the images; their preprocessing belongs to the model's."""
        return self.images.digest()

    def batches(self, size: int) -> Iterator[Batch]:
        """Return them in order, `size` at a time."""
        for group in batches(self.images, self.preprocess, batch=size):
            pixels = torch.from_numpy(group.pixel_values)
            yield Batch(inputs=(pixels,), size=len(group.index), first=str(self.images.paths[group.index[0]]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ArrayExamples:
    """One array per input of a program, a row per example; `name` is what messages call them."""

    arrays: tuple[Array, ...]
    name: str

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.arrays[0])

    def digest(self) -> str:
        """Return the digest of the arrays."""
        found = hashlib.sha256()
        for array in self.arrays:
            found.update(f"{array.dtype} {array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()

    def batches(self, size: int) -> Iterator[Batch]:
        """Return them in order, `size` at a time."""
        for start in range(0, self.count, size):
            inputs = tuple(torch.from_numpy(array[start : start + size]) for array in self.arrays)
            yield Batch(inputs=inputs, size=len(inputs[0]), first=f"{self.name} {start}")


def network_of(model: Model, merge: MergeRecipe) -> Network:
    """Return a Vision Transformer with its merging."""
    spec = model.spec
    linears, attentions = find_sites(spec)
    return Network(
        program=only_outputs(program_of(spec, merge), *spec.output_names),
        params=model.params,
        linears=linears,
        attentions=attentions,
        leave_out=0 if spec.sinks is None else spec.sinks.leave_out,
        head=spec.head,
        digest=key_of(model.digest(), merge),
    )
