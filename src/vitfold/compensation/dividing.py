"""A share of all blocks' work that is to go, divided among their heads and hidden units by what the output loses."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, plain_program, program_of
from vitfold.compensation.factoring import Moments, factor_values, lower_scores, no_moments
from vitfold.compensation.narrowing import Narrowing, can_thin, prunable
from vitfold.compensation.pruning import CHOOSING_RIDGE, basis_of, kept_by_count, weight_of
from vitfold.compensation.ridge import PREFIX_WEIGHT, RidgeSums, as_params, no_sums, with_bias
from vitfold.compensation.showing import BATCH, divided, mean_error, named, run, showing
from vitfold.compensation.streams import Streams
from vitfold.errors import RecipeError
from vitfold.model import Array, Model
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.quant.network import Examples
from vitfold.recipe import HEAD_STEP, WIDTH_STEP, PruneRecipe
from vitfold.transforms.merging import stream_name

DIVIDING_IMAGES = 512
BlockLosses = Mapping[int, Mapping[int, float]]
"""What the output loses by how many heads (0) or units (1) of a block stay, or how wide its heads are (2)."""
_EIGHTHS = (7, 6, 5, 4, 3, 2, 1, 0.5)
_MOST_HEADS = 8
_LEAST_LOSS = 1e-12
_FEW = 3
"""So many counts are all measured."""
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The relative squared error of the output where so many heads or units of one block alone stay, by block.

    `head_dims` is that where its heads are so wide.
    """

    heads: tuple[Mapping[int, float], ...]
    units: tuple[Mapping[int, float], ...]
    head_dims: tuple[Mapping[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        kinds = {"heads": self.heads, "units": self.units, "head_dims": self.head_dims}
        return {kind: [{str(count): loss for count, loss in one.items()} for one in of] for kind, of in kinds.items()}

    def of_widths(self, widths: Collection[int]) -> Losses:
        """Return the same where heads may be so wide only, or as wide as they are."""
        kept = tuple({w: loss for w, loss in of.items() if w in widths or w == max(of)} for of in self.head_dims)
        return replace(self, head_dims=kept)


def losses_from_dict(values: Mapping[str, Any]) -> Losses:
    """Rebuild losses from `Losses.to_dict`."""

    def read(kind: str) -> tuple[Mapping[int, float], ...]:
        return tuple({int(count): loss for count, loss in one.items()} for one in values[kind])

    return Losses(heads=read("heads"), units=read("units"), head_dims=read("head_dims"))


@torch.inference_mode()
def measure_losses(
    model: Model,
    examples: Examples,
    *,
    step: Callable[[str], Any] = lambda _: None,
    advance: Callable[[int], Any] = lambda _: None,
    once: Callable[[int, Callable[[], BlockLosses]], BlockLosses] = lambda _, measure: measure(),
) -> Losses:
    """Let heads and hidden units of one block after another go, fit the others, and look at the output.

    It is looked at on every eighth image, which nothing was fitted to. Every second count is measured, `between` says
    what the others lose.

    Args:
        once: takes a block and what measures it, and may know the answer from before.

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
    found: list[BlockLosses] = []
    thinner = can_thin(model.spec) and 0 in kinds
    shown = {one.layer for way in ways for one in (way[kind] for kind in kinds) if one is not None}
    shown |= {rows.layer for heads, _ in ways if thinner and heads is not None for rows in heads.rows}
    whole = showing(program_of(model.spec, UNMERGED), shown)
    with Streams() as tokens, Streams() as exact:
        for number, group in enumerate(examples.batches(BATCH)):
            names = (stream_name(0, "x"), model.spec.output)
            x, y = replay(whole, Run(model.params), *group.inputs, only=names)
            tokens[number], exact[number] = {"x": x}, {"y": y[divided(len(x))[1]]}
            advance(group.size)
        for block, way in enumerate(ways):
            step(f"measuring what blocks can do without: {block + 1}/{len(ways)}")
            there = _Block(model=model, program=whole, block=block, tokens=tokens, exact=exact)
            wanted = {kind: one for kind in kinds if (one := way[kind]) is not None}
            found.append(once(block, partial(_block_losses, there, wanted, thinner=thinner)))
            there.advance()
    heads, units, head_dims = (tuple(one[kind] for one in found if kind in one) for kind in range(3))
    return Losses(heads=heads, units=units, head_dims=head_dims)


def _block_losses(there: _Block, wanted: Mapping[int, Narrowing], *, thinner: bool) -> BlockLosses:
    """What the output loses with fewer heads (0), fewer units (1) and narrower heads (2) of a block."""
    sums, found = there.sums([one.layer for one in wanted.values()]), dict[int, Mapping[int, float]]()
    for kind, one in wanted.items():
        counts = counts_of(one)
        first = 1 if one.width == 1 else 0  # what the first head costs says little of what the second does
        tried = _narrower(one, sums[one.layer], some_of(counts, first=first))
        found[kind] = between({count: there.loss(changed) for count, changed in tried}, counts, one.there)
    if thinner:
        heads = wanted[0]
        widths = tuple(range(heads.width - HEAD_STEP, 0, -HEAD_STEP))
        tried = _thinner(heads, there, sums[heads.layer], some_of(widths))
        found[2] = between({width: there.loss(changed) for width, changed in tried}, widths, heads.width)
    return found


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

    def moments(self, layer: str) -> Moments:
        """Sum what queries and keys are made of over the images that they are fitted to."""
        moments = no_moments(self.model.params[f"{layer}.weight"].shape[1])
        for number in range(len(self.tokens)):
            given = self._given(number, held=False)
            x = run(self.program, self.model.params, given, f"{layer}.x")[f"{layer}.x"]
            moments.add(x, _weights(x, self.model.spec.prefix))
        return moments

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
    """Take all rows."""
    into.add(*(value.flatten(0, 1) for value in (x, y, _weights(x, prefix))))


def _weights(x: Float[Tensor, "B N I"], prefix: int) -> Float[Tensor, "B N 1"]:
    """What rows count: those of the prefix more, since classifiers read them."""
    weight = torch.ones(*x.shape[:2], 1)
    weight[:, :prefix] = PREFIX_WEIGHT
    return weight


def some_of(counts: Sequence[int], *, first: int = 1) -> tuple[int, ...]:
    """Return every second of falling counts from the `first` on, and the last, where there are more than three."""
    return tuple(dict.fromkeys((*counts[first::2], counts[-1]))) if len(counts) > _FEW else tuple(counts)


def between(losses: Mapping[int, float], counts: Sequence[int], whole: int) -> Mapping[int, float]:
    """Return what is lost at every count, from some of them: a power of how many go, from one to the next.

    Equation: log L(g) is linear in log g between two measured numbers g = whole - count; L(g) ~ g below the first.

    Args:
        losses: at some of the counts, the last one among them.
        whole: the count at which nothing is lost.
    """
    if not counts:
        return {whole: 0.0}
    measured = sorted((whole - count, max(loss, _LEAST_LOSS)) for count, loss in losses.items())
    (first, least), *_ = measured
    gone, lost = (np.log([pair[end] for pair in measured]) for end in (0, 1))

    def at(count: int) -> float:
        if count in losses:
            return losses[count]
        goes = whole - count
        return least * goes / first if goes < first else float(np.exp(np.interp(np.log(goes), gone, lost)))

    return {whole: 0.0, **{count: at(count) for count in counts}}


def _narrower(one: Narrowing, sums: RidgeSums, counts: Sequence[int]) -> Iterator[tuple[int, Mapping[str, Array]]]:
    """Yield parameters of the layer with zeros for what goes, for every one of the counts."""
    for count, kept in kept_by_count(sums.square, sums.cross, counts, one.width):
        weight = weight_of(sums, one.values(kept), CHOOSING_RIDGE)
        yield count, as_params(one.layer, weight)


def _thinner(
    one: Narrowing, there: _Block, sums: RidgeSums, widths: Sequence[int]
) -> Iterator[tuple[int, Mapping[str, Array]]]:
    """Yield parameters of an attention of lower rank, as wide as it is, for every one of the widths of its heads."""
    (rows,) = one.rows
    made, moments = with_bias(there.model.params, rows.layer), there.moments(rows.layer)
    columns = one.values(torch.arange(one.there))
    reading = weight_of(sums, columns, CHOOSING_RIDGE)
    for width in widths:
        whole = lower_scores(made, moments, one.there, width).whole
        directions = factor_values(sums.square[columns][:, columns], reading[:, columns], one.there, width)
        basis = basis_of(directions, columns, len(sums.square))
        read = sums.along(basis).change(CHOOSING_RIDGE).double() @ basis.T
        yield width, {**as_params(rows.layer, whole), **as_params(one.layer, read.float())}


def counts_of(one: Narrowing) -> tuple[int, ...]:
    """Return how many units or heads may stay: units by eighths, in steps of 32."""
    if one.width > 1:
        step = -(-one.there // _MOST_HEADS)
        return tuple(range(one.there - step, 0, -step))
    counts = (round(one.there * share / 8 / WIDTH_STEP) * WIDTH_STEP for share in _EIGHTHS)
    return tuple(dict.fromkeys(count for count in counts if 0 < count < one.there))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What may stay of one part of a block, how many or how wide by kind, its cost, and what the output loses."""

    stays: Mapping[str, int]
    cost: float
    loss: float


def divide(losses: Losses, costs: Sequence[tuple[float, float]], share: float) -> PruneRecipe:
    """Return what stays of every block where a share of the cost of all goes, and the output loses least.

    Losses are taken to add up; the price of work at which the share goes is found by bisection.

    Args:
        costs: of attention and of the MLP, for every block.

    Raises:
        RecipeError: if so much cannot go, or so little.
    """
    items = [*_of_attention(losses, [cost for cost, _ in costs]), *_of_mlp(losses, [cost for _, cost in costs])]
    total, least = (sum(end(one.cost for one in choices) for choices in items) for end in (max, min))
    wanted = (1 - share) * total

    def at(price: float) -> list[_Choice]:
        return [min(choices, key=lambda one: (one.loss + price * one.cost, one.cost)) for choices in items]

    def cost_of(chosen: Sequence[_Choice]) -> float:
        return sum(one.cost for one in chosen)

    if not 0 < share < 1 or wanted < least:
        raise RecipeError(f"--prune takes a share of the blocks' work, below {1 - least / total:.2f}; found {share:g}")
    low, high = 0.0, 1.0
    while cost_of(at(high)) > wanted:
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_of(at(middle)) > wanted else (low, middle)
    chosen = at(high)
    heads, head_dims, units = (tuple(one.stays[kind] for one in chosen if kind in one.stays) for kind in _KINDS)
    return PruneRecipe(heads=heads, head_dims=head_dims, units=units)


_KINDS = ("heads", "head_dims", "units")


def _of_attention(losses: Losses, costs: Sequence[float]) -> Iterator[Sequence[_Choice]]:
    """How many heads of every block may stay, and how wide; both cost what is left of the whole."""
    for block, heads in enumerate(losses.heads):
        dims: Mapping[int, float] = losses.head_dims[block] if losses.head_dims else {}
        whole = costs[block] / max(heads)
        if not dims:
            yield [_Choice(stays={"heads": count}, cost=whole * count, loss=loss) for count, loss in heads.items()]
            continue
        yield [
            _Choice(
                stays={"heads": count, "head_dims": width}, cost=whole * count * width / max(dims), loss=loss + thinner
            )
            for count, loss in heads.items()
            for width, thinner in dims.items()
        ]


def _of_mlp(losses: Losses, costs: Sequence[float]) -> Iterator[Sequence[_Choice]]:
    for block, units in enumerate(losses.units):
        whole = costs[block] / max(units)
        yield [_Choice(stays={"units": count}, cost=whole * count, loss=loss) for count, loss in units.items()]
