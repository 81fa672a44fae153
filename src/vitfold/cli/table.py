"""`vitfold table`: the tables of a JSON file again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vitfold.bench.environment import busy_remark
from vitfold.bench.measurement import Scope
from vitfold.cli.declaring import command
from vitfold.cli.terminal import out
from vitfold.errors import VitfoldError
from vitfold.report import tables
from vitfold.report.tables import SCOPES, environment_line, ladder
from vitfold.storage.ordinary import read_text


def print_ladders(result: Mapping[str, Any], *, title: str) -> None:
    """Print the environment and one table per scope."""
    out.print(environment_line(result["environment"]))
    busy = busy_remark(result["environment"])
    if busy is not None:
        out.print(busy, style="yellow", soft_wrap=True)
    for scope, name in SCOPES.items():
        chosen = [row for row in result["rows"] if row["scope"] == scope]
        if chosen:
            baseline = chosen[0]["speed_up"]["baseline"]
            out.print(ladder(chosen, title=f"{title}, {name}; median ± half IQR, speed-up against {baseline}"))


@command()
def table(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="JSON of bench or demo.")],
    scope: Annotated[Scope | None, typer.Option(help="Only this scope.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Markdown instead of a terminal table.")] = False,
) -> None:
    """Print the tables of a JSON file that bench or demo wrote."""
    try:
        result = json.loads(read_text(file))
        rows = [row for row in result["rows"] if scope in (None, row["scope"])]
        batch = {row["batch"] for row in rows}
        if markdown:
            for one in tables.SCOPES:
                chosen = [row for row in rows if row["scope"] == one]
                if chosen:
                    for line in tables.markdown(chosen).splitlines():
                        out.print(line, soft_wrap=True)
            return
        print_ladders({**result, "rows": rows}, title=f"batch {', '.join(map(str, sorted(batch)))}")
    except OSError as error:
        raise VitfoldError(f"cannot read {file}: {error}; write one with: vitfold bench BUNDLE -o FILE.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise VitfoldError(f"{file} is not the JSON of bench or demo ({error!r}); write it again") from None
