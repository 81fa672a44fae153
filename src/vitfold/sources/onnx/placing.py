"""Where the batch is in a value of an ONNX graph, and how that value stands in a program, whose batch is in front.

A graph may have the batch at any axis, also together with others: heads (B H, N, K), windows (B W, N, C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitfold.ops.protocol import Ops
from vitfold.program.trace import Traced

Shape = tuple[int, ...]


class UnliftableError(Exception):
    """A node has no counterpart in `Ops`; it stays foreign."""


@dataclass(frozen=True, slots=True)
class Place:
    """Axis `axis` is `before` x batch x `after` long."""

    axis: int
    before: int = 1
    after: int = 1

    @property
    def front(self) -> bool:
        """Whether the batch is an axis of its own in front."""
        return (self.axis, self.before, self.after) == (0, 1, 1)


@dataclass(frozen=True, slots=True)
class Lifted:
    """A value of a program that stands for one of a graph; `shape` is the latter's for one image."""

    value: Traced
    place: Place
    shape: Shape

    @property
    def rank(self) -> int:
        """Axes of the graph's value."""
        return len(self.shape)

    def axis_of(self, axis: int) -> int:
        """Return the program's axis for one of the graph's that is not the batch's.

        Raises:
            UnliftableError: if the batch is in it.
        """
        axis %= self.rank
        if axis == self.place.axis:
            raise UnliftableError("works along the batch")
        return 1 + axis if axis < self.place.axis else axis + self.extra

    @property
    def extra(self) -> int:
        """How many axes the batch's axis has left beside the batch."""
        return (self.place.before > 1) + (self.place.after > 1)


def rest_of(shape: Sequence[int], place: Place) -> Shape:
    """Return a program's shape behind the batch, for a graph's shape of one image."""
    parts = tuple(length for length in (place.before, place.after) if length > 1)
    return (*shape[: place.axis], *parts, *shape[place.axis + 1 :])


def place_in(shapes: tuple[Shape, Shape], batches: tuple[int, int], in_front: int) -> Place:
    """Find the batch in a shape that is known for two batches, where `in_front` elements stand in front of it.

    Raises:
        UnliftableError: if it is not there, or within what cannot be parted.
    """
    first, second = shapes
    if batches[0] == batches[1]:
        return _place_of_one(first, batches[0], in_front)
    differing = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if len(first) != len(second) or len(differing) != 1:
        raise UnliftableError("has the batch in no axis, or in several")
    (axis,) = differing
    ahead = math.prod(first[:axis])
    if first[axis] * batches[1] != second[axis] * batches[0] or in_front % ahead:
        raise UnliftableError("parts the batch")
    before, length = in_front // ahead, first[axis] // batches[0]
    if length % before:
        raise UnliftableError("parts the batch")
    return Place(axis, before, length // before)


def _place_of_one(shape: Shape, batch: int, in_front: int) -> Place:
    """Find the batch where only one is known: the axis that begins with it, else the first that can be parted."""
    found = []
    for axis, length in enumerate(shape):
        ahead = math.prod(shape[:axis])
        before = in_front // ahead if in_front % ahead == 0 else 0
        if before and length % (before * batch) == 0:
            found.append(Place(axis, before, length // (before * batch)))
    if not found:
        raise UnliftableError("parts the batch")
    return min(found, key=lambda place: (place.before > 1, place.after > 1, place.axis))


def in_front_of(lifted: Lifted) -> int:
    """Return how many elements of the graph's value stand in front of the batch."""
    return math.prod(lifted.shape[: lifted.place.axis]) * lifted.place.before


def reshaped(ops: Ops[Traced], lifted: Lifted, shape: Shape, place: Place) -> Lifted:
    """Give a value another shape; the order of its elements stays."""
    rest = rest_of(shape, place)
    value = lifted.value if lifted.value.shape[1:] == rest else ops.reshape(lifted.value, rest)
    return Lifted(value, place, shape)


def transposed(ops: Ops[Traced], lifted: Lifted, perm: Sequence[int]) -> Lifted:
    """Permute the axes of a graph's value."""
    shape, place = tuple(lifted.shape[i] for i in perm), lifted.place
    moved = Place(list(perm).index(place.axis), place.before, place.after)
    order: list[int] = [0]
    for axis in perm:
        first = 1 + place.axis
        order += range(first, first + lifted.extra) if axis == place.axis else [lifted.axis_of(axis)]
    value = lifted.value if order == sorted(order) else ops.transpose(lifted.value, tuple(order))
    return Lifted(value, moved, shape)


def with_rank(ops: Ops[Traced], lifted: Lifted, rank: int) -> Lifted:
    """Put axes of length 1 in front, as broadcasting does."""
    missing = rank - lifted.rank
    if not missing:
        return lifted
    place = Place(lifted.place.axis + missing, lifted.place.before, lifted.place.after)
    return reshaped(ops, lifted, (1,) * missing + lifted.shape, place)
