"""`vitfold cache`: what is kept between commands, and its removal."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from vitfold.artifacts.cache import LIMIT, cache_entries, cache_folder, cache_limit, clear_cache
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import note, out, print_json


@command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything that is kept.")] = False,
    json: options.Json = False,
) -> None:
    """Say where results are kept between commands and how much they take; --clear removes them.

    What was used longest ago goes by itself at 8 GB, or at as many as $VITFOLD_CACHE_GB says; $VITFOLD_CACHE moves the
    folder. Everything kept can be computed again.
    """
    from rich.table import Table

    limit = cache_limit()
    freed = clear_cache() if clear else 0
    entries = cache_entries()
    sizes, counts = Counter[str](), Counter(entry.kind for entry in entries)
    for entry in entries:
        sizes[entry.kind] += entry.size
    if json:
        kinds = {kind: {"entries": counts[kind], "bytes": size} for kind, size in sizes.most_common()}
        folder = str(cache_folder())
        total = sum(sizes.values())
        print_json({"folder": folder, "bytes": total, "limit_bytes": limit, "freed_bytes": freed, "kinds": kinds})
        return
    if clear:
        note(f"removed {freed / 1e6:.1f} MB")
    out.print(str(cache_folder()), soft_wrap=True)
    table = Table(pad_edge=False)
    table.add_column("kind")
    for name in ("entries", "MB"):
        table.add_column(name, justify="right")
    for kind, size in sizes.most_common():
        table.add_row(kind, str(counts[kind]), f"{size / 1e6:.1f}")
    if sizes:
        out.print(table)
    out.print(f"{sum(sizes.values()) / 1e9:.2f} of at most {limit / 1e9:g} GB; {LIMIT} sets another bound")
