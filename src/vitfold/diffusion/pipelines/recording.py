"""What the blocks of a pipeline add at every step of one image, in bounded memory: sketches and their products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from vitfold.diffusion.pipelines.stacks import Stack
from vitfold.diffusion.pipelines.stepping import Steps, rest
from vitfold.diffusion.solving import step_weights
from vitfold.errors import RecipeError, UnsupportedError
from vitfold.model import Array

SKETCH = 2**16
"""Numbers that are kept of a residual: squared norms of sums of sketches are right within 0.6 % (one deviation)."""
_EXPLAINED = 0.05
"""So much of a prediction may be left over by the sum of passes that it is taken for."""


class Sketch:
    """A random projection of residuals of one size: signs, and a sum over pieces. Smaller ones are kept whole.

    Equation: y_j = sum_k s_(jk) x_(j + k M); E |y|^2 = |x|^2, with a relative variance of at most 2 / M.
    """

    def __init__(self, size: int = SKETCH) -> None:
        self._size = size
        self._signs: torch.Tensor | None = None

    def __call__(self, values: torch.Tensor) -> Float[np.ndarray, " M"]:
        """Return the sketch of a residual, whatever its shape."""
        flat = values.reshape(-1)
        if len(flat) <= self._size:
            return flat.float().cpu().numpy()
        pieces = -(-len(flat) // self._size)
        if self._signs is None or self._signs.numel() != pieces * self._size or self._signs.device != flat.device:
            drawn = torch.randint(0, 2, (pieces, self._size), generator=torch.Generator().manual_seed(0))
            self._signs = (2 * drawn - 1).to(flat.device, torch.int8)
        total = torch.zeros(self._size, device=flat.device)
        for piece, signs in zip(torch.split(flat, self._size), self._signs, strict=True):  # no copy of the whole
            total[: len(piece)] += piece.float() * signs[: len(piece)]
        return total.cpu().numpy()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One image's residuals as products: `gram` of the guided residuals, and what the solver needs beside it.

    `active` numbers the transformer of every step, in the order of `stacks`; `first` is the first timestep taken of
    `timesteps`.
    """

    gram: Float[np.ndarray, "T T"]
    weights: Float[np.ndarray, " T"]
    places: Mapping[str, Float[np.ndarray, " T"]]
    active: Float[np.ndarray, " T"]
    stacks: Mapping[str, Stack]
    timesteps: int
    first: int
    passes: int


@dataclass(slots=True, kw_only=True, eq=False)
class Recorder:
    """Watches a pipeline while it draws one image with all steps; `trace` is what it saw."""

    scheduler: Any
    transformers: Mapping[str, nn.Module]
    stacks: dict[str, Stack] = field(default_factory=dict)
    sketch: Sketch = field(default_factory=Sketch)
    steps: Steps = field(init=False)
    hooks: list[Any] = field(default_factory=list)
    predicted: list[torch.Tensor] = field(default_factory=list)
    rows: list[list[Float[np.ndarray, " M"]]] = field(default_factory=list)
    factors: list[Float[np.ndarray, " R"] | None] = field(default_factory=list)
    active: list[str] = field(default_factory=list)
    passes: int = 0
    now: list[Float[np.ndarray, " M"]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = Steps(scheduler=self.scheduler, begin=self._begin)
        self.steps.install()
        for name, transformer in self.transformers.items():
            self.hooks.append(transformer.register_forward_hook(self._note(name)))
            if name in self.stacks:
                rest(self.steps, transformer, self.stacks[name], self._watch)

    def close(self) -> None:
        """Leave the pipeline as it was."""
        self.steps.remove()
        for hook in self.hooks:
            hook.remove()

    def trace(self) -> Trace:
        """Return what was seen.

        Raises:
            UnsupportedError: if no step was.
            RecipeError: if the scheduler cannot be asked how it weighs a prediction.
        """
        count, first = len(self.rows), self.steps.first
        if count == 0 or any(len(rows) != len(self.rows[0]) or not rows for rows in self.rows):
            raise UnsupportedError(
                "the blocks of this pipeline are not called as often at every step; draw with all steps"
            )
        try:
            weights = step_weights(self.steps.fresh)[first : first + count]
        except Exception as error:  # schedulers of any kind, of anybody
            raise RecipeError(
                f"{type(self.scheduler).__name__} takes no step of its own on a small sample ({error}), so its "
                "steps cannot be weighed; give the pipeline a scheduler such as DPMSolverMultistepScheduler"
            ) from error
        names = list(self.transformers)
        return Trace(
            gram=self._gram(),
            weights=weights,
            places={name: np.array(at[first : first + count]) for name, at in self.steps.places.items()},
            active=np.array([names.index(name) for name in self.active], float),
            stacks=self.stacks,
            timesteps=len(self.steps.fresh.timesteps),
            first=first,
            passes=self.passes,
        )

    def _watch(self, _: int, residual: torch.Tensor) -> None:
        self.now += [self.sketch(row) for row in residual]

    def _note(self, name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
            if isinstance(found, torch.Tensor):
                self.predicted += list(found.detach())
            self.active[self.steps.step :] = [name]
            self.passes = max(self.passes, sum(resting.call for resting in self.steps.resting))

        return note

    def _begin(self, prediction: Any, _: Any) -> None:
        """At the end of a step's calls: how their predictions add up to the one that the sampler takes."""
        self.rows.append(self.now)
        self.factors.append(_factors(self.predicted, prediction) if len(self.predicted) == len(self.now) else None)
        self.now, self.predicted = [], []

    def _gram(self) -> Float[np.ndarray, "T T"]:
        """Products of guided residuals; where guidance is no sum of passes, of all passes side by side."""
        factors = [found for found in self.factors if found is not None]
        if len(factors) == len(self.rows):
            guided = np.stack([f @ np.stack(rows) for f, rows in zip(factors, self.rows, strict=True)])
        else:
            guided = np.stack([np.concatenate(rows) for rows in self.rows])
        gram: Array = (guided @ guided.T).astype(np.float64)
        return gram


def _factors(predicted: list[torch.Tensor], prediction: Any) -> Float[np.ndarray, " R"] | None:
    """How the rows of a transformer's outputs add up to a prediction, by least squares; None where they do not.

    Guidance of any order, in one batch or in calls apart, is such a sum. A variance beside the prediction is left out.
    """
    if len(predicted) == 1:
        return np.ones(1, np.float32)
    if not isinstance(prediction, torch.Tensor) or not predicted:
        return None
    wanted = prediction[0].detach()
    rows = [row if row.shape == wanted.shape else row[: len(wanted)] for row in predicted]
    if any(row.shape != wanted.shape for row in rows):
        return None
    a, b = torch.stack([row.double().reshape(-1) for row in rows]).cpu(), wanted.double().reshape(-1).cpu()
    found = torch.linalg.lstsq(a.T, b[:, None], driver="gelsd").solution[:, 0]
    left = torch.linalg.vector_norm(b - found @ a) / torch.linalg.vector_norm(b).clamp_min(1e-30)
    return None if left > _EXPLAINED else found.numpy().astype(np.float32)
