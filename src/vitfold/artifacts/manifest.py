"""What the manifests of all bundles have in common, checked as it is read.

`bundle` turns what is wrong into a message that names the file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from vitfold.model import DenoiserSpec, DiTSpec, GraphSpec, ViTSpec, spec_to_dict
from vitfold.model.denoiser import denoiser_spec_to_dict
from vitfold.storage.checked import ImplausibleError, Range, entry, section
from vitfold.target import ENGINES, Target

COUNT: Range = (0, 2**53)
_NAME = re.compile(r"[a-z0-9_:=,-]{1,200}")
_TARGET: dict[str, Range] = {"opset": (1, 1000), "weight_bits": (2, 8)}
_HEX = frozenset("0123456789abcdef")


def plain_fields(held: Any, *, but: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass as plain JSON values."""
    return {field.name: _plain(getattr(held, field.name)) for field in fields(held) if field.name not in but}


def _plain(value: Any) -> Any:
    if isinstance(value, ViTSpec | GraphSpec):
        return spec_to_dict(value)
    if isinstance(value, DiTSpec):
        return asdict(value)
    if isinstance(value, DenoiserSpec):
        return denoiser_spec_to_dict(value)
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def sha256_entry(values: Mapping[str, Any], key: str, where: str = "") -> str:
    """Return a digest of a manifest.

    Raises:
        ImplausibleError: if it is none.
    """
    found: str = entry(values, key, str, where)
    if len(found) != 64 or not set(found) <= _HEX:
        raise ImplausibleError(f"{where + '.' if where else ''}{key} has to be a sha256 of 64 digits")
    return found


def checked_origin(value: Any) -> dict[str, Any]:
    """Return where the weights came from: a source, a loader, its arguments.

    Raises:
        ImplausibleError: naming what is missing or something else.
    """
    values = section(value, "origin")
    for key in ("source", "loader"):
        entry(values, key, str, "origin")
    entry(values, "arguments", Mapping[str, Any], "origin")
    return values


def checked_target(value: Any) -> dict[str, Any]:
    """Return what the graph was written for; keys that only later versions know are left as they are.

    Raises:
        ImplausibleError: naming what is missing or something else.
    """
    values = section(value, "target")
    hints = get_type_hints(Target)
    entry(values, "name", str, "target")
    entry(values, "engine", str, "target")
    if values.get("batch") is not None:
        least, usual, most = entry(values, "batch", tuple[int, int, int], "target", (1, 2**20))
        if not least <= usual <= most:
            raise ImplausibleError(f"target.batch has to rise, found {least} {usual} {most}")
    if not _NAME.fullmatch(values["name"]) or values["engine"] not in ENGINES:
        raise ImplausibleError(f"target.name is a target, and target.engine one of {', '.join(ENGINES)}")
    for key, kind in {**hints, "trtexec": str}.items():
        if key in values:
            entry(values, key, kind, "target", _TARGET.get(key))
    return values


def checked_verified(value: Any) -> dict[str, Any]:
    """Return how a bundle was verified: numbers that are not negative, and the engine's name.

    Raises:
        ImplausibleError: naming what is something else.
    """
    values = section(value, "verified")
    entry(values, "images", int, "verified", COUNT)
    if "engine" in values:
        entry(values, "engine", str, "verified")
    for key, one in values.items():
        if key not in ("engine", "images"):
            entry(values, key, str if isinstance(one, str) else float | None, "verified", (0.0, 1e39))
    return values
