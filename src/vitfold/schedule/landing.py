"""Numbers of tokens that kernels like: multiples of as many rows as they work on at a time."""

from __future__ import annotations

from vitfold.recipe import largest_r

ROWS = 16
"""Rows of a tile of AMX, and a good number elsewhere: of the usual 65, 197, 257 and 577 tokens few are left over."""


def landings(tokens: int, prefix: int, rows: int) -> range:
    """Return how many of so many tokens one merge may remove, `prefix` never merging, to leave a multiple of `rows`."""
    return range(tokens % rows or rows, largest_r(tokens, prefix) + 1, rows)


def leftover(tokens: int, prefix: int, rows: int = ROWS) -> int:
    """Return how many tokens are too many for a multiple of `rows`; 0 where one merge cannot remove them."""
    over = tokens % rows
    return over if over <= largest_r(tokens, prefix) else 0
