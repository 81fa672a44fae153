"""Found quantizers, kept so that an interrupted calibration resumes where it stopped.

Owns the key: everything that a search looks at, and the code that looks. Where files lie is `cache`'s
business.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitfold.cache import find_file, keep_file
from vitfold.errors import BundleError
from vitfold.quantizer import Quantizer, QuantParams, load_quant_params
from vitfold.version import __version__

_KIND = "search"


def search_once(inputs: tuple[object, ...], search: Callable[[], Mapping[str, Quantizer]]) -> Mapping[str, Quantizer]:
    """Return what `search` finds for these inputs, from the cache where it has been found before."""
    key = content_key(*inputs)
    path = find_file(_KIND, key)
    if path is not None:
        try:
            return load_quant_params(path)
        except BundleError:
            path.unlink(missing_ok=True)
    found = QuantParams(search())
    keep_file(_KIND, key, found.save)
    return found


def content_key(*parts: object) -> str:
    """Return the sha256 over numbers, texts, arrays, and dataclasses, mappings and tuples of them."""
    total = hashlib.sha256(f"{__version__}{_code()}".encode())
    for part in parts:
        _add(total, part)
    return total.hexdigest()


def _add(total: Any, part: object) -> None:
    if isinstance(part, torch.Tensor):
        part = part.numpy()
    if isinstance(part, np.ndarray):
        total.update(f"{part.dtype}{part.shape}".encode())
        total.update(np.asarray(part, order="C").data)
    elif is_dataclass(part):
        total.update(f"{type(part).__name__}{{".encode())
        for field in fields(part):
            total.update(f"{field.name}=".encode())
            _add(total, getattr(part, field.name))
        total.update(b"}")
    elif isinstance(part, Mapping):
        _add(total, tuple(sorted(part.items())))
    elif isinstance(part, (tuple, list)):
        total.update(b"(")
        for one in part:
            _add(total, one)
        total.update(b")")
    elif part is None or isinstance(part, (str, int, float)):
        total.update(f"{part!r},".encode())
    else:
        raise TypeError(f"a {type(part).__name__} is no part of a key")


@functools.cache
def _code() -> str:
    """The sha256 of this package's sources: another search is another key."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()
