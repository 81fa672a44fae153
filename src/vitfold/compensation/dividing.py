"""A share of all blocks' work that is to go, divided among their heads and hidden units by what the output loses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, plain_program, program_of
from vitfold.compensation.narrowing import Narrowing, prunable
from vitfold.compensation.pruning import CHOOSING_RIDGE, kept_by_count, weight_of
from vitfold.compensation.ridge import PREFIX_WEIGHT, RidgeSums, no_sums
from vitfold.compensation.showing import BATCH, divided, mean_error, named, run, showing
from vitfold.compensation.streams import Streams
from vitfold.errors import RecipeError
from vitfold.model import Array, Model
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.quant.network import Examples
from vitfold.recipe import WIDTH_STEP, PruneRecipe
from vitfold.transforms.merging import stream_name

DIVIDING_IMAGES = 512
_EIGHTHS = (7, 6, 5, 4, 3, 2, 1, 0.5)
_MOST_HEADS = 8
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The relative squared error of the output where so many heads or units of one block alone stay, by block."""

    heads: tuple[Mapping[int, float], ...]
    units: tuple[Mapping[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kinds = {"heads": self.heads, "units": self.units}
        return {kind: [{str(count): loss for count, loss in one.items()} for one in of] for kind, of in kinds.items()}


def losses_from_dict(values: Mapping[str, Any]) -> Losses:
    """Rebuild losses from `Losses.to_dict`."""

    def read(kind: str) -> tuple[Mapping[int, float], ...]:
        return tuple({int(count): loss for count, loss in one.items()} for one in values[kind])

    return Losses(heads=read("heads"), units=read("units"))


@torch.inference_mode()
def measure_losses(
    model: Model,
    examples: Examples,
    *,
    step: Callable[[str], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
) -> Losses:
    """Let heads and hidden units of one block after another go, fit the others, and look at the output.

    It is looked at on every eighth image, which nothing was fitted to.

    Raises:
        RecipeError: if neither heads nor units can go in every block.
    """
    ways = prunable(model.spec, plain_program(model.spec))
    kinds = [kind for kind in (0, 1) if all(way[kind] is not None for way in ways)]
    if not kinds:
        raise RecipeError(
            "neither heads nor hidden units of this model can go: attention or MLP are of a form that is not known; "
            "leave --prune out"
        )
    found: tuple[list[Mapping[int, float]], ...] = ([], [])
    shown = {one.layer for way in ways for one in (way[kind] for kind in kinds) if one is not None}
    whole = showing(program_of(model.spec, UNMERGED), shown)
    with Streams() as tokens, Streams() as exact:
        for number, group in enumerate(examples.batches(BATCH)):
            names = (stream_name(0, "x"), model.spec.output)
            x, y = replay(whole, Run(model.params), *group.inputs, only=names)
            tokens[number], exact[number] = {"x": x}, {"y": y[divided(len(x))[1]]}
            advance(group.size)
        for block, way in enumerate(ways):
            step(f"measuring what block {block + 1}/{len(ways)} can do without")
            there = _Block(model=model, program=whole, block=block, tokens=tokens, exact=exact)
            wanted = {kind: one for kind in kinds if (one := way[kind]) is not None}
            sums = there.sums([one.layer for one in wanted.values()])
            for kind, one in wanted.items():
                losses = {count: there.loss(changed) for count, changed in _narrower(one, sums[one.layer])}
                found[kind].append({one.there: 0.0, **losses})
            there.advance()
    return Losses(heads=tuple(found[0]), units=tuple(found[1]))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Block:
    """A block with the tokens in front of it, and the outputs of the images that are held out."""

    model: Model
    program: Program
    block: int
    tokens: Streams
    exact: Streams

    def sums(self, layers: Sequence[str]) -> Mapping[str, RidgeSums]:
        """Sum inputs and outputs of layers over the images that they are fitted to."""
        sums = {layer: no_sums(*reversed(self.model.params[f"{layer}.weight"].shape)) for layer in layers}
        names = [f"{layer}.{end}" for layer in layers for end in "xy"]
        for number in range(len(self.tokens)):
            seen = run(self.program, self.model.params, self._given(number, held=False), *names)
            for layer, into in sums.items():
                _add(into, seen[f"{layer}.x"], seen[f"{layer}.y"], self.model.spec.prefix)
        return sums

    def loss(self, changed: Mapping[str, Array]) -> float:
        """Return what the output of the images that are held out loses with other parameters."""
        params, output = {**self.model.params, **changed}, self.model.spec.output
        found = (run(self.program, params, self._given(n, held=True), output)[output] for n in range(len(self.tokens)))
        return mean_error((self.exact[number]["y"], y) for number, y in enumerate(found))

    def advance(self) -> None:
        """Let the tokens pass the block."""
        following = stream_name(self.block + 1, "x")
        for number in range(len(self.tokens)):
            given = named(self.program, self.block, self.tokens[number])
            x = run(self.program, self.model.params, given, following)[following]
            self.tokens[number] = {"x": x}

    def _given(self, number: int, *, held: bool) -> dict[str, Tensor]:
        given = named(self.program, self.block, self.tokens[number])
        return {name: value[divided(len(value))[held]] for name, value in given.items()}


def _add(into: RidgeSums, x: Float[Tensor, "B N I"], y: Float[Tensor, "B N O"], prefix: int) -> None:
    """Take all rows; those of the prefix count more, since classifiers read them."""
    weight = torch.ones(*x.shape[:2], 1)
    weight[:, :prefix] = PREFIX_WEIGHT
    into.add(*(value.flatten(0, 1) for value in (x, y, weight)))


def _narrower(one: Narrowing, sums: RidgeSums) -> Iterator[tuple[int, Mapping[str, Array]]]:
    """Yield parameters of the layer with zeros for what goes, for every count that is tried."""
    for count, kept in kept_by_count(sums.square, sums.cross, counts_of(one), one.width):
        weight = weight_of(sums, one.values(kept), CHOOSING_RIDGE)
        yield count, {f"{one.layer}.weight": weight[:, :-1].numpy(), f"{one.layer}.bias": weight[:, -1].numpy()}


def counts_of(one: Narrowing) -> tuple[int, ...]:
    """Return how many units or heads are tried to stay: units by eighths, in steps of 32."""
    if one.width > 1:
        step = -(-one.there // _MOST_HEADS)
        return tuple(range(one.there - step, 0, -step))
    counts = (round(one.there * share / 8 / WIDTH_STEP) * WIDTH_STEP for share in _EIGHTHS)
    return tuple(dict.fromkeys(count for count in counts if 0 < count < one.there))


def divide(losses: Losses, costs: Sequence[tuple[float, float]], share: float) -> PruneRecipe:
    """Return what stays of every block where a share of the cost of all goes, and the output loses least.

    Losses are taken to add up; the price of work at which the share goes is found by bisection.

    Args:
        costs: of a head and of a hidden unit, for every block.

    Raises:
        RecipeError: if so much cannot go, or so little.
    """
    kinds = [(kind, of) for kind, of in ((0, losses.heads), (1, losses.units)) if of]
    items = [(costs[block][kind], one) for kind, of in kinds for block, one in enumerate(of)]
    total = sum(cost * max(one) for cost, one in items)
    wanted = (1 - share) * total

    def stays(price: float) -> list[int]:
        return [min(one, key=lambda count: (one[count] + price * cost * count, count)) for cost, one in items]

    def cost_of(counts: Sequence[int]) -> float:
        return sum(cost * count for (cost, _), count in zip(items, counts, strict=True))

    least = cost_of([min(one) for _, one in items])
    if not 0 < share < 1 or wanted < least:
        raise RecipeError(f"--prune takes a share of the blocks' work, below {1 - least / total:.2f}; found {share:g}")
    low, high = 0.0, 1.0
    while cost_of(stays(high)) > wanted:
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(stays(middle)) > wanted else (low, middle)
    counts = stays(high)
    depth = len(losses.heads or losses.units)
    found = {kind: tuple(counts[i * depth : (i + 1) * depth]) for i, (kind, _) in enumerate(kinds)}
    return PruneRecipe(heads=found.get(0, ()), units=found.get(1, ()))
