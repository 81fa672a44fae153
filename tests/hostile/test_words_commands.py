"""Commands that are printed for somebody to type: they say all that was given, and the parser takes them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import timm
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from vitfold.cli.app import app

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo" / "images"
RANDOM = {"weights": "random", "image_size": 32, "num_classes": 4, "seed": 3}


def parsed(line: str) -> dict[str, object]:
    """What the command line's own parser makes of a printed line."""
    words = shlex.split(line)
    assert words[0] == "vitfold"
    root = typer.main.get_command(app)
    with root.make_context("vitfold", words[1:2]) as above:
        command = root.get_command(above, words[1])
        assert command is not None
        with command.make_context(words[1], words[2:], parent=above) as context:
            return dict(context.params)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("some [of] them")
    for path in sorted(path for path in DEMO.rglob("*") if path.is_file())[:6]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("form", ["a file", "random weights"])
def test_a_sweep_states_commands_that_make_its_bundles(form, images, tmp_path):
    source, given = "timm:test_vit", dict(RANDOM)
    if form == "a file":
        source, given = str(tmp_path / "it's mine.safetensors"), {"arch": "test_vit", "image_size": 32}
        module = timm.create_model("test_vit", num_classes=4, img_size=32)
        save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, source)
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    folder = tmp_path / "sweep"
    line = ["sweep", source, "-o", str(folder), "--images", str(images), "--calibration-images", str(images)]
    done = CliRunner().invoke(app, [*line, "--merge", "0,1", *options, "--exif", "ignore", "--json"])
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 2
    for row in rows:
        found = parsed(row["commands"][0])
        assert found["source"] == source
        assert found["exif"] == "ignore"
        assert {name: str(found[name]) for name in given} == {name: str(value) for name, value in given.items()}
        assert found["merge"] == ",".join(map(str, row["merge"]))
    again = shlex.split(rows[1]["commands"][0])[1:]
    plan = CliRunner().invoke(app, [*again, "--dry-run", "--json"])
    assert plan.exit_code == 0, plan.stderr
    assert json.loads(plan.stdout)["recipe"]["merge"]["r"] == rows[1]["merge"]
