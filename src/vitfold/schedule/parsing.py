"""The words of a schedule: none, align, a constant, a list, or a constant with an inflection."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from itertools import groupby

from vitfold.errors import RecipeError
from vitfold.model import Architecture
from vitfold.recipe import check_mergeable, largest_r, tokens_per_block
from vitfold.schedule.landing import ROWS, leftover

ACCEPTED = (
    "accepted: none, a number (8: as many in every block), one number per block (8,8,0,4), align (in the first block "
    "what is left over from a multiple of 16 tokens), or number:inflection (8:-1 starts at 16 and ends at 0; the "
    "inflection lies in [-1, 1])"
)
_log = logging.getLogger("vitfold")
_INTEGER = re.compile(r"[+-]?[0-9]+")


def resolve_r(value: object, spec: Architecture) -> tuple[int, ...]:
    """Return the tokens that each block removes: L integers that the model can carry out.

    `None`, "none" and 0 remove nothing; "align" removes in the first block what is left over from a multiple of 16
    tokens, which kernels work on at a time. A number is the same r in every block, and "r:inflection" the
    linear schedule below; both remove less where too few tokens are left. A list is used as it stands,
    with zeros for the blocks behind its end.

    Equation: r_l = floor(r_min + (r_max - r_min) l / (L - 1)), r_min = floor(r (1 - inflection)),
    r_max = 2 r - r_min.

    Args:
        value: None, an integer, a sequence of integers, or text; anything else is refused.

    Raises:
        RecipeError: on other values, and where a list, or the first block, asks for more than is there.

    Source: ToMe (2210.09461), section 3.1, and the schedules of its appendix; an r that is too large
    for the very first block is an error here, not silently less.
    """
    if value is None:
        return (0,) * spec.num_layers
    if isinstance(value, str):
        return _from_text(value.strip(), spec)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return _literal([_integer(n, value) for n in value], spec)
    return _constant(_integer(value, value), spec)


def describe_r(r: Sequence[int]) -> str:
    """Return a short form without loss: "none", "8 x 12", "16,15,13,12", "16 x 10,7,0"."""
    if not any(r):
        return "none"
    parts: list[str] = []
    for removed, run in groupby(r):
        length = len(list(run))
        parts += [f"{removed} x {length}"] if length > 2 else [str(removed)] * length
    return ",".join(parts)


def _from_text(text: str, spec: Architecture) -> tuple[int, ...]:
    if text.lower() == "none":
        return (0,) * spec.num_layers
    if text.lower() == "align":
        return _aligned(spec)
    if "," in text:
        return _literal([_integer(part.strip(), text) for part in text.split(",")], spec)
    if ":" in text:
        r, inflection = text.split(":", 1)
        return _constant(_integer(r.strip(), text), spec, _inflection(inflection, text))
    return _constant(_integer(text, text), spec)


def _constant(r: int, spec: Architecture, inflection: float = 0.0) -> tuple[int, ...]:
    """Return the same in every block, or so many on the average where there is an inflection."""
    if r:
        check_mergeable(spec)
    return _clamped(_inflected(r, inflection, spec.num_layers), spec)


def _aligned(spec: Architecture) -> tuple[int, ...]:
    """Return the schedule of "align": one merge in the first block, none where no token is left over."""
    check_mergeable(spec)
    r = (leftover(spec.tokens, spec.fixed), *(0,) * spec.num_layers)[: spec.num_layers]
    if not any(r):
        _log.warning("align merges nothing: %d tokens are a multiple of %d, or too few", spec.tokens, ROWS)
    tokens_per_block(spec, r)
    return r


def _inflected(r: int, inflection: float, depth: int) -> tuple[int, ...]:
    """Return the linear schedule; rounding downwards as ToMe does, so that totals compare."""
    least = int(r * (1 - inflection))
    most = 2 * r - least
    if depth == 1:
        return (r,)
    return tuple(least + (most - least) * block // (depth - 1) for block in range(depth))


def _literal(r: list[int], spec: Architecture) -> tuple[int, ...]:
    if any(r):
        check_mergeable(spec)
    if len(r) > spec.num_layers:
        raise RecipeError(f"r has {len(r)} entries, the model has {spec.num_layers} blocks; give at most one per block")
    if len(r) < spec.num_layers:
        left = spec.num_layers - len(r)
        _log.warning("r names %d of %d blocks; the last %d merge nothing", len(r), spec.num_layers, left)
    padded = (*r, *(0,) * (spec.num_layers - len(r)))
    tokens_per_block(spec, padded)
    return padded


def _clamped(wanted: tuple[int, ...], spec: Architecture) -> tuple[int, ...]:
    tokens_per_block(spec, (*wanted[:1], *(0,) * (spec.num_layers - 1)))
    count, r = spec.tokens, []
    for removed in wanted:
        r.append(min(removed, largest_r(count, spec.fixed)))
        count -= r[-1]
    return tuple(r)


def _integer(value: object, whole: object) -> int:
    """Return one number of tokens out of `whole`, which the message shows."""
    if isinstance(value, str) and _INTEGER.fullmatch(value) and isinstance(whole, str):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecipeError(f"r = {whole!r} is not understood: {value!r} is not an integer; {ACCEPTED}")
    if value < 0:
        raise RecipeError(f"r = {whole!r} removes a negative number of tokens ({value}); {ACCEPTED}")
    return value


def _inflection(text: str, whole: str) -> float:
    try:
        inflection = float(text)
    except ValueError:
        inflection = math.nan
    if not -1 <= inflection <= 1:
        raise RecipeError(f"r = {whole!r} has the inflection {text.strip()!r}, not a number in [-1, 1]; {ACCEPTED}")
    return inflection
