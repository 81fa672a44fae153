"""Plain values that came from a file, checked before anybody believes them."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

DEPTH = 24
TEXT_LENGTH = 2**16
ITEMS = 2**20
_DIGITS = 19
_SHOWN = 60
_KINDS = {dict: "a section", list: "a list", str: "text", bool: "true or false", int: "an integer", float: "a number"}

Range = tuple[int | float, int | float]


class ImplausibleError(ValueError):
    """A value that no file of this kind holds; the message says where, what was expected and what was found."""


def parse_json(text: str) -> Any:
    """Return JSON values that are bounded: in depth, in length, in the size of numbers; no key twice, no NaN.

    Raises:
        ImplausibleError: saying what is too much, or where it is not JSON.
    """
    try:
        value = json.loads(
            text, parse_int=_integer, parse_constant=_constant, parse_float=_float, object_pairs_hook=_section
        )
    except json.JSONDecodeError as error:
        raise ImplausibleError(f"it is not JSON: {error}") from None
    except RecursionError:
        raise ImplausibleError(f"it is nested more than {DEPTH} deep") from None
    _check_plain(value, 0)
    return value


def section(value: Any, where: str) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ImplausibleError: if it is something else.
    """
    if not isinstance(value, dict):
        _wrong(where, "a section", value)
    return value


def entry(values: Mapping[str, Any], key: str, kind: Any, where: str = "", within: Range | None = None) -> Any:
    """Return a value of a section: a type, a Literal, a tuple of them or one of them or None.

    Raises:
        ImplausibleError: if it is missing, of another type, or out of range.
    """
    name = f"{where}.{key}" if where else key
    if key not in values:
        if _takes_none(kind):
            return None
        raise ImplausibleError(f"{name} is missing")
    return as_type(values[key], kind, name, within)


def check_fields(kind: type, value: Any, where: str, ranges: Mapping[str, Range]) -> dict[str, Any]:
    """Check a section against the fields of a dataclass: those without a default are there, all have its types.

    `ranges` bounds numbers by field. Keys that the dataclass lacks are left to whoever builds it.

    Raises:
        ImplausibleError: naming the first field that is missing or wrong.
    """
    values = section(value, where)
    hints = _hints(kind)
    for field in fields(kind):
        name = f"{where}.{field.name}"
        if field.name in values:
            as_type(values[field.name], hints[field.name], name, ranges.get(field.name))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ImplausibleError(f"{name} is missing")
    return values


def as_type(value: Any, kind: Any, where: str, within: Range | None = None) -> Any:
    """Return a JSON value as a type: lists become tuples, integers floats where a float is wanted.

    Raises:
        ImplausibleError: if it is of another type, or out of range.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        (kind,) = (one for one in args if one is not types.NoneType)
        return as_type(value, kind, where, within)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            _wrong(where, " or ".join(map(str, args)), value)
        return value
    if origin is tuple:
        return _as_tuple(value, args, where, within)
    if origin is not None:  # a mapping, whose values are the reader's business
        return section(value, where)
    return _as_scalar(value, kind, where, within)


def _as_tuple(value: Any, args: tuple[Any, ...], where: str, within: Range | None) -> tuple[Any, ...]:
    if not isinstance(value, list):
        _wrong(where, "a list", value)
    endless = len(args) == 2 and args[1] is ...
    if not endless and len(value) != len(args):
        _wrong(where, f"a list of {len(args)}", value)
    kinds = (args[0],) * len(value) if endless else args
    return tuple(
        as_type(one, kind, f"{where}[{i}]", within) for i, (one, kind) in enumerate(zip(value, kinds, strict=True))
    )


def _as_scalar(value: Any, kind: Any, where: str, within: Range | None) -> Any:
    if not hasattr(kind, "__mro__") or kind not in _KINDS:
        return section(value, where)  # a dataclass within a dataclass
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits:
        _wrong(where, _KINDS[kind], value)
    if kind in (int, float) and within is not None and not within[0] <= value <= within[1]:
        _wrong(where, f"{_KINDS[kind]} of {within[0]:g} to {within[1]:g}", value)
    return float(value) if kind is float else value


def _takes_none(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType) and types.NoneType in get_args(kind)


def _wrong(where: str, wanted: str, value: Any) -> NoReturn:
    shown = json.dumps(value, default=str)
    found = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise ImplausibleError(f"{where} has to be {wanted}, found {found}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ImplausibleError(f"the number {text[:_DIGITS]}... is too large")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ImplausibleError(f"the number {text[:_DIGITS]} is too large")
    return value


def _constant(text: str) -> NoReturn:
    raise ImplausibleError(f"{text} is no number")


def _section(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ImplausibleError(f"the key {twice[:_SHOWN]!r} is there twice")
    return values


def _check_plain(value: Any, depth: int) -> None:
    if depth > DEPTH:
        raise ImplausibleError(f"it is nested more than {DEPTH} deep")
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, (list, dict)):
        if len(value) > ITEMS:
            raise ImplausibleError(f"a list or section of {len(value)} entries is too long")
        for one in value.values() if isinstance(value, dict) else value:
            _check_plain(one, depth + 1)
        for name in value if isinstance(value, dict) else ():
            _check_text(name)


def _check_text(text: str) -> None:
    if len(text) > TEXT_LENGTH:
        raise ImplausibleError(f"a text of {len(text)} characters is too long")
    if any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else "\0" in text:
        raise ImplausibleError("a text holds characters that are none")
