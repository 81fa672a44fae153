"""Callbacks by which long work says where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Say = Callable[[str], Any]
"""Takes the name of a step."""
Advance = Callable[[int], Any]
"""Takes how many more images, or other items, are done."""
