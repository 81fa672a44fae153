"""Polishing a compensated model: all its layers behind the first merge together, by gradient descent.

Refitting goes layer by layer and changes linear layers that write to the residual stream. What the others could do,
and what layers could do together, is found by Adam on the unmerged model's outputs, from images without labels, in
minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, plain_program, program_of
from vitfold.compensation.refit import Compensated
from vitfold.compensation.showing import BATCH, divided, mean_error, named, relative_error, run, showing
from vitfold.compensation.streams import LIMIT_BYTES, Columns, Streams
from vitfold.errors import RecipeError
from vitfold.model import Array, Model
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.program.queries import output_linear
from vitfold.quant.network import Examples
from vitfold.recipe import MergeRecipe
from vitfold.transforms.merging import stream_name

RATE = 5e-4
"""The largest step, as a share of each parameter's root mean square: layers differ in scale by far."""
LEAST_SCALE = 1e-3
"""Parameters about zero count as this large."""
STEP_IMAGES = 16
WARMING_STEPS = 20
BETAS = (0.9, 0.99)
SEED = 0


def polish(
    model: Model,
    found: Compensated,
    merge: MergeRecipe,
    examples: Examples,
    *,
    limit_bytes: int = LIMIT_BYTES,
    step: Callable[[str], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> Compensated:
    """Go `merge.polish` times through the images; keep what comes of it if it helps held-out ones.

    Equation: mean over images of |y - y*|^2 / |y*|^2 + |h - h*|^2 / |h*|^2 falls, y the output and h what the layer
    that makes it reads, stars for the unmerged model.

    Args:
        model: the unmerged one.
        found: what refitting made of it.

    Raises:
        RecipeError: if no gradient comes from the output.
    """
    if not any(merge.r) or not merge.polish:
        return found
    with Streams(limit_bytes) as rows:
        polishing = _Polishing(model, found.model, merge, rows)
        step("polishing: what the unmerged model says")
        for group in examples.batches(BATCH):
            polishing.enter(group.inputs)
            advance(group.size)
        for number in range(merge.polish):
            step(f"polishing: pass {number + 1}/{merge.polish}")
            polishing.go_through(number, advance)
        params = polishing.learned()
        before, after = polishing.error(found.model.params), polishing.error(params)
    if after >= before:
        return found
    return replace(found, model=found.model.with_params(found.model.spec, params), error_after=after, polished=True)


class _Polishing:
    """What is learned, and from what: tokens in front of the first merge, and what should come of them."""

    def __init__(self, exact: Model, start: Model, merge: MergeRecipe, rows: Streams) -> None:
        self._exact, self._start, self._passes, self._rows = exact, start, merge.polish, rows
        last = output_linear(plain_program(exact.spec))
        layers = () if last is None else (last,)
        self._first = next(block for block, r in enumerate(merge.r) if r)
        self._whole = showing(program_of(exact.spec, UNMERGED), layers)
        self._shorter = showing(program_of(exact.spec, merge), layers)
        self._wanted = (exact.spec.output, *(f"{layer}.x" for layer in layers))
        self._fitted: list[int] = []
        self._held: list[int] = []
        self._learned = {
            name: torch.from_numpy(np.array(start.params[name])).requires_grad_()
            for name in _learnable(self._shorter, start.params)
        }
        self._ops = Run(start.params, learned=self._learned)
        self._rates = [RATE * _scale(value) for value in self._learned.values()]
        self._optimizer = torch.optim.Adam([{"params": [value]} for value in self._learned.values()], betas=BETAS)
        self._done = 0

    def enter(self, inputs: tuple[Tensor, ...]) -> None:
        """Take images: their tokens in front of the first merge, and what the unmerged model makes of them."""
        entry = stream_name(self._first, "x")
        names = (entry, *self._wanted)
        with torch.no_grad():
            found = replay(self._whole, Run(self._exact.params), *inputs, only=names)
        values: dict[str, Tensor] = dict(zip(names, found, strict=True))
        start = len(self._rows)
        for image in range(len(values[entry])):
            self._rows[start + image] = {name: value[image : image + 1].clone() for name, value in values.items()}
        fitted, held = divided(len(values[entry]))
        self._fitted += (start + fitted).tolist()
        self._held += (start + held).tolist()

    def go_through(self, number: int, advance: Callable[[int], Any]) -> None:
        """Go once through the images, in an order that is drawn."""
        order = np.random.default_rng((SEED, number)).permutation(self._fitted).tolist()
        steps = -(-len(order) // STEP_IMAGES)
        for start in range(0, len(order), STEP_IMAGES):
            share = min(1.0, (self._done + 1) / WARMING_STEPS) * (1.0 - self._done / (steps * self._passes))
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = share * rate
            images = order[start : start + STEP_IMAGES]
            self._descend(self._gathered(images))
            self._done += 1
            advance(len(images))

    def learned(self) -> Mapping[str, Array]:
        """Return all parameters, those that were learned as they are now."""
        moved = {name: value.detach().numpy() for name, value in self._learned.items() if value.grad is not None}
        return {**self._start.params, **moved}

    def error(self, params: Mapping[str, Array]) -> float:
        """Return the error of the output on held-out images."""
        output, pairs = self._wanted[0], []
        with torch.no_grad():
            for start in range(0, len(self._held), BATCH):
                rows = self._gathered(self._held[start : start + BATCH])
                pairs.append((rows[output], run(self._shorter, params, self._entering(rows), output)[output]))
        return mean_error(pairs)

    def _descend(self, rows: Columns) -> None:
        values = replay(self._shorter, self._ops, given=self._entering(rows), only=self._wanted)
        loss = torch.stack(
            [relative_error(rows[name], value).mean() for name, value in zip(self._wanted, values, strict=True)]
        ).sum()
        if not loss.requires_grad:
            raise RecipeError("no gradient comes from this model's output; leave merge.polish out")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _entering(self, rows: Columns) -> dict[str, Tensor]:
        return named(self._shorter, self._first, {"x": rows[stream_name(self._first, "x")]})

    def _gathered(self, images: list[int]) -> dict[str, Tensor]:
        rows = [self._rows[image] for image in images]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _learnable(program: Program, params: Mapping[str, Array]) -> list[str]:
    """The parameters of linear layers and norms."""
    sites = dict.fromkeys(node.site for node in program.nodes if node.op in ("linear", "heads", "layer_norm"))
    names = [f"{site}.{name}" for site in sites for name in ("weight", "bias")]
    return [name for name in names if name in params]


def _scale(value: Tensor) -> float:
    return max(float(value.detach().square().mean().sqrt()), LEAST_SCALE)
