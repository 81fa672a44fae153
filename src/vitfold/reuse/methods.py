"""Methods of step reuse as values, and the words by which users name them.

Owns which steps are computed in full, what is kept of them, and how the others are filled in. Runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitfold.errors import RecipeError, nearest
from vitfold.programs.dit_parts import Cut
from vitfold.reuse import forecast
from vitfold.reuse.forecast import Weights

WARM_UP = 2
"""First steps that are always computed: everything changes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to reuse steps: `text` is its name with its numbers, as users write it.

    Every `interval`-th step is computed; where `threshold` is set, the first block of every step is, and the rest only
    if that block's residual moved further than the threshold since the last full step. `guidance` keeps the difference
    between the prediction without and with a class instead of anything within the model.
    """

    text: str
    cut: Cut
    interval: int
    order: int = 0
    history: int = 1
    forecast: Callable[[Sequence[int], int], Weights] = forecast.hold
    threshold: float | None = None
    guidance: bool = False

    @property
    def reuses(self) -> bool:
        """Whether any step reuses another one."""
        return self.interval > 1 or self.threshold is not None


def full_steps(method: Method, steps: int) -> tuple[bool, ...]:
    """Return which steps are computed in full: the first two, every interval-th behind them, and the last.

    Methods that decide as they go compute at least the first two and the last.
    """

    def computed(step: int) -> bool:
        due = method.threshold is None and (step - WARM_UP + 1) % method.interval == 0
        return step < WARM_UP or due or step == steps - 1

    return tuple(computed(step) for step in range(steps))


def _none(text: str, _: Sequence[float]) -> Method:
    return Method(text=text, cut="whole", interval=1)


def _fora(text: str, numbers: Sequence[float]) -> Method:
    return Method(text=text, cut="modules", interval=int(numbers[0]))


def _stack(text: str, numbers: Sequence[float]) -> Method:
    return Method(text=text, cut="stack", interval=int(numbers[0]))


def _taylor(text: str, numbers: Sequence[float]) -> Method:
    order = int(numbers[1])
    return Method(
        text=text,
        cut="stack",
        interval=int(numbers[0]),
        order=order,
        history=order + 1,
        forecast=lambda places, at: forecast.taylor(places, at, order=order),
    )


def _chebyshev(text: str, numbers: Sequence[float]) -> Method:
    degree = int(numbers[1])
    return Method(
        text=text,
        cut="stack",
        interval=int(numbers[0]),
        order=degree,
        history=degree + 2,
        forecast=lambda places, at: forecast.chebyshev(places, at, degree=degree),
    )


def _first_block(text: str, numbers: Sequence[float]) -> Method:
    return Method(text=text, cut="first", interval=1, threshold=numbers[0])


def _guidance(text: str, numbers: Sequence[float]) -> Method:
    return Method(text=text, cut="whole", interval=int(numbers[0]), guidance=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a method is written: NAME[:NUMBER[:NUMBER]], the numbers left out, the least that each may be, its source."""

    build: Callable[[str, Sequence[float]], Method]
    defaults: tuple[float, ...] = ()
    least: tuple[float, ...] = ()
    most: tuple[float, ...] = ()
    why: str


METHODS: Mapping[str, Form] = {
    "none": Form(build=_none, why="every step is computed"),
    "fora": Form(
        build=_fora, defaults=(3,), least=(2,), most=(1000,),
        why="outputs of every attention and MLP kept for INTERVAL steps (FORA, 2407.01425)",
    ),
    "stack": Form(
        build=_stack, defaults=(2,), least=(2,), most=(1000,),
        why="what all blocks add, one tensor, kept for INTERVAL steps",
    ),
    "taylor": Form(
        build=_taylor, defaults=(3, 1), least=(2, 1), most=(1000, 4),
        why="the same, forecast from full steps every INTERVAL to an ORDER (TaylorSeer, 2503.06923)",
    ),
    "chebyshev": Form(
        build=_chebyshev, defaults=(3, 1), least=(2, 1), most=(1000, 4),
        why="the same, by a least-squares polynomial of a DEGREE through DEGREE + 2 full steps",
    ),
    "first-block": Form(
        build=_first_block, defaults=(0.1,), least=(0.0,), most=(10.0,),
        why="blocks behind the first run if its residual moved by more than THRESHOLD (FBCache)",
    ),
    "guidance": Form(
        build=_guidance, defaults=(2,), least=(2,), most=(1000,),
        why="the pass without a class runs every INTERVAL steps, its difference is kept between them",
    ),
}  # fmt: skip


def find_method(text: str) -> Method:
    """Return the method that a user names, as `taylor`, `taylor:3` or `taylor:3:2`.

    Raises:
        RecipeError: if it is unknown, or a number is missing, left over or out of range.
    """
    name, *given = text.strip().split(":")
    form = METHODS.get(name)
    if form is None:
        raise RecipeError(f"unknown reuse method {name!r}; {nearest(name, METHODS)}")
    if len(given) > len(form.defaults):
        raise RecipeError(f"{name} takes {len(form.defaults)} numbers, found {len(given)} in {text!r}; leave some out")
    numbers = list(form.defaults)
    for place, word in enumerate(given):
        try:
            numbers[place] = float(word)
        except ValueError:
            raise RecipeError(
                f"{word!r} in {text!r} is no number; write for example {_written(name, numbers)}"
            ) from None
        whole = form.defaults[place] != int(form.defaults[place]) or numbers[place] == int(numbers[place])
        if not (form.least[place] <= numbers[place] <= form.most[place] and whole):
            raise RecipeError(
                f"{word} in {text!r} is out of range; from {form.least[place]:g} to {form.most[place]:g}"
                f"{', a whole number' if form.defaults[place] == int(form.defaults[place]) else ''}"
            )
    return form.build(_written(name, numbers), numbers)


def _written(name: str, numbers: Sequence[float]) -> str:
    return ":".join((name, *(f"{number:g}" for number in numbers)))
