"""Loading again what a bundle was made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitfold.errors import SourceError
from vitfold.sources.load import Loaded, load_source

_OPTIONS = ("arch", "num_classes", "image_size", "weights", "seed", "problem", "preprocess", "outputs", "part")


def load_origin(origin: Mapping[str, Any]) -> Loaded:
    """Load the model of `Origin.to_dict()` again.

    Raises:
        SourceError: if it came from a module in memory, or cannot be found any more.
    """
    source = str(origin["source"])
    if source == "memory":
        raise SourceError("it was made from a module in memory, which cannot be loaded again")
    arguments = dict(origin["arguments"])
    return load_source(source, **{name: arguments[name] for name in _OPTIONS if name in arguments})
