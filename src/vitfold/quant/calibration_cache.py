"""Found quantizers, kept so that an interrupted calibration resumes where it stopped.

The key: everything that a search looks at, and the code that looks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from vitfold.artifacts.cache import find_file, keep_file, key_of
from vitfold.errors import BundleError
from vitfold.quantizer import Quantizer, QuantParams, load_quant_params

_KIND = "search"


def search_once(
    inputs: tuple[object, ...],
    search: Callable[[], Mapping[str, Quantizer]],
    say: Callable[[], object] = lambda: None,
) -> Mapping[str, Quantizer]:
    """Return what `search` finds for these inputs, from the cache where it has been found before.

    `say` is called before a search, and not where there is none.
    """
    key = key_of(_code(), *inputs)
    path = find_file(_KIND, key)
    if path is not None:
        try:
            return load_quant_params(path)
        except BundleError:
            path.unlink(missing_ok=True)
    say()
    found = QuantParams(search())
    keep_file(_KIND, key, found.save)
    return found


@functools.cache
def _code() -> str:
    """The sha256 of this package's sources: another search is another key."""
    total = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        total.update(path.read_bytes())
    return total.hexdigest()
