"""No function is longer than a reader can hold at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitfold

MOST = 60
"""Lines of a body, its docstring among them. A signature is a table of options and does not count."""


def too_long(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.body[0].lineno + 1
            if lines > MOST:
                yield node.name, lines


def test_every_body_is_short():
    root = Path(vitfold.__file__).parent
    files = sorted(root.rglob("*.py"))
    assert len(files) > 100
    found = {
        f"{path.relative_to(root)}:{name}": lines
        for path in files
        for name, lines in too_long(path.read_text(encoding="utf-8"))
    }
    assert found == {}


@pytest.mark.parametrize(("options", "lines", "long"), [(0, 60, False), (100, 60, False), (0, 61, True)])
def test_signatures_do_not_count(options: int, lines: int, long: bool):
    signature = "".join(f"    option{i}: int,\n" for i in range(options))
    text = f"def table(\n{signature}) -> None:\n" + "    pass\n" * lines
    assert [name for name, _ in too_long(text)] == ["table"] * long
