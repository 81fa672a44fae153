"""The command line in this process: what a user types, what comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from vitfold.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo"
RANDOM = ("timm:test_vit", "--weights", "random", "--image-size", "32", "--num-classes", "4")


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command that has to leave with this code; bugs come through as the exceptions they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, (result.stdout, result.stderr)
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    """Return the one JSON document on stdout."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def error(*arguments: object, code: int = 1) -> str:
    """Return what a command that fails says, on one line; stdout stays empty."""
    result = run(*arguments, code=code)
    assert result.stdout == ""
    return " ".join(result.stderr.split())


def saved_vit(path: Path, *, image_size: int) -> tuple[str, ...]:
    """Write a model of six blocks of width 64 to a file, and return the words that load it."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=image_size, num_classes=10).state_dict(), path)
    return (str(path), "--arch", "test_vit", "--image-size", str(image_size), "--num-classes", "10")
