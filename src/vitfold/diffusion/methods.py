"""Methods of step reuse as values, and the words by which users name them.

Runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

from vitfold.diffusion import forecast, planners
from vitfold.diffusion.forecast import Place, Weights
from vitfold.diffusion.parts import Cut
from vitfold.diffusion.planners import Planner, evenly, spread
from vitfold.diffusion.token_choice import BlockChoice, Schedule, Scoring, check_share
from vitfold.errors import RecipeError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseMethod:
    """A way to reuse steps: `text` is its name with its numbers, as users write it.

    Every `interval`-th step is computed; where `threshold` is set, the first block of every step is, and the rest only
    if that block's residual moved further than the threshold since the last full step. `guidance` keeps the difference
    between the prediction without and with a class instead of anything within the model. In the second half of the
    steps `late_interval` replaces the interval; where `ratio` is set, the other steps leave out that share of tokens;
    `choice` says of which blocks, where they are chosen as it goes.

    A `planner` chooses full steps and weights for a model; `mask` and `rows` are those, once it has, and `budget` the
    number of full steps where that is asked for. `decay` lowers the threshold from step to step; `rescale` are the
    coefficients that a change is judged by, the constant last, fitted where `fits` says so.
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
    choice: BlockChoice | None = None
    budget: int | None = None
    planner: Planner | None = None
    mask: tuple[int, ...] | None = None
    rows: tuple[Weights, ...] = ()
    decay: float = 1.0
    fits: bool = False
    rescale: tuple[float, ...] = ()

    @property
    def reuses(self) -> bool:
        """Whether any step reuses another one."""
        return self.interval > 1 or self.threshold is not None or self.planner is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is left to a model that nobody has asked yet."""
        return (self.planner is None or self.mask is not None) and (not self.fits or bool(self.rescale))

    @property
    def graphs(self) -> tuple[str, int, str]:
        """What decides which graphs it runs."""
        tokens = "" if self.ratio is None else f"{self.ratio:g}"
        if self.choice is not None:
            tokens = f"{tokens} {self.choice.share:g} {self.choice.scoring}"
        return self.cut, self.history, tokens

    @property
    def decides(self) -> bool:
        """Whether each image decides by itself what is computed, so that images are drawn one by one."""
        return self.threshold is not None or (self.choice is not None and self.choice.decides)

    @property
    def is_static(self) -> bool:
        """Whether the same steps are computed for every image, by what the whole stack adds."""
        return self.cut == "stack" and self.threshold is None


def every_step(method: ReuseMethod) -> ReuseMethod:
    """Return what computes all steps in full with the graphs of a method."""
    return replace(method, text="none", interval=1, late_interval=None, threshold=None, guidance=False, planner=None)


def full_steps(method: ReuseMethod, steps: int) -> tuple[bool, ...]:
    """Return which steps are computed in full: the first two, every interval-th behind them, and the last.

    Methods that decide as they go compute at least the first two and the last.

    Raises:
        RecipeError: if full steps were chosen for another number of steps.
    """
    if method.planner is not None:
        if method.mask is None or method.mask[-1] != steps - 1:
            chosen = "not chosen yet" if method.mask is None else f"chosen for {method.mask[-1] + 1}"
            raise RecipeError(f"the full steps of {method.text} are {chosen}, not for {steps}; leave out --steps")
        return tuple(step in method.mask for step in range(steps))
    interval = steps if method.threshold is not None else method.interval
    full = evenly(steps, interval, method.late_interval)
    if method.choice is not None and method.choice.schedule != "tprr":
        full = spread(steps, len(full))
    return tuple(step in full for step in range(steps))


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
class Word:
    """A choice of a method: its value where it is left out, and all that there are."""

    default: str
    words: tuple[str, ...]

    def read(self, word: str) -> str:
        """Return the word.

        Raises:
            RecipeError: if it is none of them.
        """
        if word not in self.words:
            raise RecipeError(f"{word!r} is none of {', '.join(self.words)}")
        return word


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How a method is written: NAME[:NUMBER[:NUMBER]]; `build` takes that text and the numbers, or words."""

    build: Callable[..., ReuseMethod]
    numbers: tuple[Number | Word, ...] = ()


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


def _taylor_modules(text: str, interval: int, order: int) -> ReuseMethod:
    """Forecast the output of every attention and MLP before its gate by a Taylor series.

    Source: TaylorSeer (2503.06923).
    """
    return replace(_taylor(text, interval, order), cut="modules")


def _solved(text: str, count: int) -> ReuseMethod:
    """Forecast what all blocks add by a line, from `count` full steps that are chosen for the model."""
    return replace(_taylor(text, 1, 1), budget=count, planner=partial(planners.line, count=count))


def _planned(text: str, planner: Planner, history: int, budget: int | None = None) -> ReuseMethod:
    """Forecast what all blocks add by the weights of a plan."""
    return ReuseMethod(text=text, cut="stack", interval=1, history=history, planner=planner, budget=budget)


def _fitted(text: str, count: int, history: int) -> ReuseMethod:
    """Forecast by weights that are fitted to the model, from `count` full steps that are chosen for it."""
    return _planned(text, partial(planners.fitted, count=count, history=history), history, count)


def _dpcache(text: str, count: int, order: int) -> ReuseMethod:
    """Choose `count` full steps by costs that know the path to them.

    Source: DPCache (2602.22654).
    """
    return _planned(text, partial(planners.path_aware, count=count, order=order), order + 1, count)


def _magcache(text: str, threshold: float, most: int, retained: float) -> ReuseMethod:
    """Hold what all blocks add as long as magnitudes change little.

    Source: MagCache (2506.09045).
    """
    return _planned(text, partial(planners.magnitude, threshold=threshold, most=most, retained=retained), 1)


def _dmd(text: str, interval: int, history: int) -> ReuseMethod:
    """Forecast what all blocks add by its dynamic modes.

    Source: Schmid (2010); the DMD calibrator of cache-dit.
    """
    return _planned(text, partial(planners.modes, interval=interval, history=history), history)


def _spectrum(text: str, window: float, growth: float, degree: int, history: int) -> ReuseMethod:
    """Forecast what all blocks add by a ridge regression onto Chebyshev polynomials.

    Source: Spectrum (2603.01623).
    """
    planner = partial(planners.spectrum, window=window, growth=growth, degree=degree, history=history)
    return _planned(text, planner, history)


def _foca(text: str, interval: int) -> ReuseMethod:
    """Forecast what all blocks add by a predictor with a corrector.

    Source: FoCa (2508.16211).
    """
    return ReuseMethod(text=text, cut="stack", interval=interval, history=3, forecast=forecast.corrected)


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


def _teacache(text: str, threshold: float) -> ReuseMethod:
    """Let what the first block reads decide: how far it moved from step to step, added up since the last full one.

    A polynomial of fourth degree, fitted to the model, makes of that move the one of what all blocks add.

    Source: TeaCache (2411.19108).
    """
    return ReuseMethod(text=text, cut="input", interval=1, threshold=threshold, fits=True)


def _seacache(text: str, threshold: float) -> ReuseMethod:
    """Let what the first block reads decide, less the frequencies that are noise at that step.

    Source: SeaCache (2602.18993).
    """
    return ReuseMethod(text=text, cut="filtered", interval=1, threshold=threshold)


def _speca(text: str, threshold: float, decay: float, order: int) -> ReuseMethod:
    """Forecast what enters the last block and what it adds, run it, and compute the step where both differ too much.

    Source: SpeCa (2509.11628): the threshold at step t of T is `threshold` times `decay` to the power of t / T.
    """
    drafted = _taylor(text, 1, order)
    return replace(drafted, cut="verified", threshold=threshold, decay=decay)


def _tokencache(text: str, ratio: float, interval: int, late_interval: int) -> ReuseMethod:
    """Keep what every block adds to every token, and compute anew the tokens that a trained predictor scores highest.

    The intervals of both phases are not published; these are numbers of ours.

    Source: TokenCache (2409.18523).
    """
    return ReuseMethod(text=text, cut="tokens", interval=interval, late_interval=late_interval, ratio=ratio)


def _tokencache_blocks(
    text: str,
    ratio: float,
    interval: int,
    late_interval: int,
    share: float,
    scoring: Scoring,
    schedule: Schedule,
) -> ReuseMethod:
    """Choose at every reused step which blocks leave out tokens, by their scores or by turns.

    What is the paper's and what is ours: docs/adr/0033-blocks-chosen-as-they-go.md.

    Source: TokenCache (2409.18523).
    """
    check_share(share, ratio)
    choice = BlockChoice(share=share, scoring=scoring, schedule=schedule)
    return replace(_tokencache(text, ratio, interval, late_interval), cut="blocks", choice=choice)


def _guidance(text: str, interval: int) -> ReuseMethod:
    """Keep the difference that the class makes to the prediction, so that most steps run the pass with a class alone.

    Source: FasterCache (2410.19355), without its weights per frequency.
    """
    return ReuseMethod(text=text, cut="whole", interval=interval, guidance=True)


_TOKENS = (
    Number(default=0.5, least=0.0, most=1.0),
    Number(default=2, least=2, most=1000),
    Number(default=4, least=2, most=1000),
)
METHODS: Mapping[str, Form] = {
    "none": Form(build=_none),
    "fora": Form(build=_fora, numbers=(Number(default=3, least=2, most=1000),)),
    "stack": Form(build=_stack, numbers=(Number(default=2, least=2, most=1000),)),
    "taylor": Form(build=_taylor, numbers=(Number(default=3, least=2, most=1000), Number(default=1, least=1, most=4))),
    "taylor-modules": Form(
        build=_taylor_modules, numbers=(Number(default=3, least=2, most=1000), Number(default=1, least=1, most=4))
    ),
    "fitted": Form(build=_fitted, numbers=(Number(default=18, least=4, most=1000), Number(default=4, least=2, most=8))),
    "solved": Form(build=_solved, numbers=(Number(default=18, least=4, most=1000),)),
    "chebyshev": Form(
        build=_chebyshev, numbers=(Number(default=3, least=2, most=1000), Number(default=1, least=1, most=4))
    ),
    "foca": Form(build=_foca, numbers=(Number(default=3, least=2, most=1000),)),
    "dmd": Form(build=_dmd, numbers=(Number(default=3, least=2, most=1000), Number(default=6, least=4, most=16))),
    "spectrum": Form(
        build=_spectrum,
        numbers=(
            Number(default=2.0, least=1.0, most=1000.0),
            Number(default=0.75, least=0.0, most=100.0),
            Number(default=4, least=1, most=8),
            Number(default=10, least=2, most=64),
        ),
    ),
    "dpcache": Form(
        build=_dpcache, numbers=(Number(default=18, least=4, most=1000), Number(default=2, least=1, most=4))
    ),
    "magcache": Form(
        build=_magcache,
        numbers=(
            Number(default=0.06, least=0.0, most=1000.0),
            Number(default=3, least=1, most=1000),
            Number(default=0.2, least=0.0, most=1.0),
        ),
    ),
    "teacache": Form(build=_teacache, numbers=(Number(default=0.2, least=0.0, most=1000.0),)),
    "seacache": Form(build=_seacache, numbers=(Number(default=0.2, least=0.0, most=1000.0),)),
    "speca": Form(
        build=_speca,
        numbers=(
            Number(default=0.3, least=0.0, most=1000.0),
            Number(default=0.5, least=0.0, most=1.0),
            Number(default=1, least=1, most=4),
        ),
    ),
    "first-block": Form(build=_first_block, numbers=(Number(default=0.1, least=0.0, most=10.0),)),
    "tokencache": Form(build=_tokencache, numbers=_TOKENS),
    "tokencache-blocks": Form(
        build=_tokencache_blocks,
        numbers=(
            *_TOKENS,
            Number(default=0.75, least=0.0, most=1.0),
            Word(default="predictor", words=get_args(Scoring)),
            Word(default="tprr", words=get_args(Schedule)),
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
    values: list[int | float | str] = [number.default for number in form.numbers]
    try:
        for place, word in enumerate(given):
            values[place] = form.numbers[place].read(word)
        shown = (value if isinstance(value, str) else f"{value:g}" for value in values)
        return form.build(":".join((name, *shown)), *values)
    except RecipeError as error:
        raise RecipeError(f"in reuse method {text!r}, {error}") from None
