"""Methods of step reuse as values, and the words by which users name them.

Runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from vitfold.diffusion import forecast
from vitfold.diffusion.forecast import Place, Weights
from vitfold.diffusion.parts import Cut
from vitfold.errors import RecipeError, nearest

WARM_UP = 2
"""First steps that are always computed: everything changes there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseMethod:
    """A way to reuse steps: `text` is its name with its numbers, as users write it.

    Every `interval`-th step is computed; where `threshold` is set, the first block of every step is, and the rest only
    if that block's residual moved further than the threshold since the last full step. `guidance` keeps the difference
    between the prediction without and with a class instead of anything within the model. In the second half of the
    steps `late_interval` replaces the interval; where `ratio` is set, the other steps leave out that share of tokens.
    Where `budget` is set, so many steps are computed; `mask` are those, once `solving` has chosen them for a model.
    """

    text: str
    cut: Cut
    interval: int
    history: int = 1
    forecast: Callable[[Sequence[Place], Place], Weights] = forecast.hold
    threshold: float | None = None
    guidance: bool = False
    late_interval: int | None = None
    ratio: float | None = None
    budget: int | None = None
    mask: tuple[int, ...] | None = None

    @property
    def reuses(self) -> bool:
        """Whether any step reuses another one."""
        return self.interval > 1 or self.threshold is not None or self.budget is not None


def every_step(method: ReuseMethod) -> ReuseMethod:
    """Return what computes all steps in full with the graphs of a method."""
    return replace(method, text="none", interval=1, late_interval=None, threshold=None, guidance=False, budget=None)


def full_steps(method: ReuseMethod, steps: int) -> tuple[bool, ...]:
    """Return which steps are computed in full: the first two, every interval-th behind them, and the last.

    Methods that decide as they go compute at least the first two and the last.

    Raises:
        RecipeError: if full steps were chosen for another number of steps.
    """
    if method.budget is not None:
        if method.mask is None or method.mask[-1] != steps - 1:
            chosen = "not chosen yet" if method.mask is None else f"chosen for {method.mask[-1] + 1}"
            raise RecipeError(f"the full steps of {method.text} are {chosen}, not for {steps}; leave out --steps")
        return tuple(step in method.mask for step in range(steps))
    found: list[bool] = []
    last = 0
    for step in range(steps):
        interval = method.interval if method.late_interval is None or 2 * step < steps else method.late_interval
        due = method.threshold is None and step - last >= interval
        found.append(step < WARM_UP or due or step == steps - 1)
        last = step if found[-1] else last
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A number of a method: its value where it is left out, and its range; whole where the default is an integer."""

    default: int | float
    least: int | float
    most: int | float

    def read(self, word: str) -> int | float:
        """Return the number that a word stands for.

        Raises:
            RecipeError: if it is none, or out of range.
        """
        kind = type(self.default)
        try:
            value = kind(word)
        except ValueError:
            raise RecipeError(
                f"{word!r} is no {'whole ' if kind is int else ''}number, such as {self.default}"
            ) from None
        if not self.least <= value <= self.most:
            raise RecipeError(f"{word} is out of range; from {self.least:g} to {self.most:g}")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a method is written: NAME[:NUMBER[:NUMBER]]; `build` takes that text and the numbers."""

    build: Callable[..., ReuseMethod]
    numbers: tuple[Number, ...] = ()


def _none(text: str) -> ReuseMethod:
    """Compute every step."""
    return ReuseMethod(text=text, cut="whole", interval=1)


def _fora(text: str, interval: int) -> ReuseMethod:
    """Keep the outputs of every attention and MLP.

    Source: FORA (2407.01425).
    """
    return ReuseMethod(text=text, cut="modules", interval=interval)


def _stack(text: str, interval: int) -> ReuseMethod:
    """Keep what all blocks add: one tensor."""
    return ReuseMethod(text=text, cut="stack", interval=interval)


def _taylor(text: str, interval: int, order: int) -> ReuseMethod:
    """Forecast what all blocks add by a Taylor series.

    Source: TaylorSeer (2503.06923), which forecasts every attention and MLP instead.
    """
    return ReuseMethod(
        text=text,
        cut="stack",
        interval=interval,
        history=order + 1,
        forecast=lambda places, at: forecast.taylor(places, at, order=order),
    )


def _solved(text: str, count: int) -> ReuseMethod:
    """Forecast what all blocks add by a line, from `count` full steps that are chosen for the model."""
    return replace(_taylor(text, 1, 1), budget=count)


def _chebyshev(text: str, interval: int, degree: int) -> ReuseMethod:
    """Forecast what all blocks add by a polynomial through one full step more than it needs."""
    return ReuseMethod(
        text=text,
        cut="stack",
        interval=interval,
        history=degree + 2,
        forecast=lambda places, at: forecast.chebyshev(places, at, degree=degree),
    )


def _first_block(text: str, threshold: float) -> ReuseMethod:
    """Let the first block decide whether the others run.

    Source: FBCache and DBCache of cache-dit, which compare mean absolute changes where this takes root mean squares.
    """
    return ReuseMethod(text=text, cut="first", interval=1, threshold=threshold)


def _tokencache(text: str, ratio: float, interval: int, late_interval: int) -> ReuseMethod:
    """Keep what every block adds to every token, and compute anew the tokens that a trained predictor scores highest.

    The intervals of both phases are not published; these are numbers of ours.

    Source: TokenCache (2409.18523).
    """
    return ReuseMethod(text=text, cut="tokens", interval=interval, late_interval=late_interval, ratio=ratio)


def _guidance(text: str, interval: int) -> ReuseMethod:
    """Keep the difference that the class makes to the prediction, so that most steps run the pass with a class alone.

    Source: FasterCache (2410.19355), without its weights per frequency.
    """
    return ReuseMethod(text=text, cut="whole", interval=interval, guidance=True)


METHODS: Mapping[str, Form] = {
    "none": Form(build=_none),
    "fora": Form(build=_fora, numbers=(Number(default=3, least=2, most=1000),)),
    "stack": Form(build=_stack, numbers=(Number(default=2, least=2, most=1000),)),
    "taylor": Form(build=_taylor, numbers=(Number(default=3, least=2, most=1000), Number(default=1, least=1, most=4))),
    "solved": Form(build=_solved, numbers=(Number(default=18, least=4, most=1000),)),
    "chebyshev": Form(
        build=_chebyshev, numbers=(Number(default=3, least=2, most=1000), Number(default=1, least=1, most=4))
    ),
    "first-block": Form(build=_first_block, numbers=(Number(default=0.1, least=0.0, most=10.0),)),
    "tokencache": Form(
        build=_tokencache,
        numbers=(
            Number(default=0.5, least=0.0, most=1.0),
            Number(default=2, least=2, most=1000),
            Number(default=4, least=2, most=1000),
        ),
    ),
    "guidance": Form(build=_guidance, numbers=(Number(default=2, least=2, most=1000),)),
}


def find_method(text: str) -> ReuseMethod:
    """Return the method that a user names, as `taylor`, `taylor:3` or `taylor:3:2`.

    Raises:
        RecipeError: if it is unknown, or a number is left over or out of range.
    """
    name, *given = text.strip().split(":")
    form = METHODS.get(name)
    if form is None:
        raise RecipeError(f"unknown reuse method {name!r}; {nearest(name, METHODS)}")
    if len(given) > len(form.numbers):
        raise RecipeError(f"{name} takes {len(form.numbers)} numbers, found {len(given)} in {text!r}; leave some out")
    values = [number.default for number in form.numbers]
    for place, word in enumerate(given):
        try:
            values[place] = form.numbers[place].read(word)
        except RecipeError as error:
            raise RecipeError(f"in reuse method {text!r}, {error}") from None
    return form.build(":".join((name, *(f"{value:g}" for value in values))), *values)
