"""What the README says is executed or compared."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitfold.cli.app import app
from vitfold.report.document import fill

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples find what they name."""
    made = tmp_path_factory.mktemp("readme")
    (made / "assets").symlink_to(ROOT / "assets")
    for animal in ("cat", "dog"):
        shutil.copy(next((ROOT / "assets/demo/images" / animal).iterdir()), made / f"{animal}.jpg")
    return made


def test_python_examples_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VITFOLD_CACHE", str(folder / "cache"))

    def printed(code: str) -> str:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
        return capsys.readouterr().out

    serving, making = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "ship" in printed(making)
    shutil.copytree("out/readme.fold", "vit.fold")
    assert printed(serving).count("[(") == 2


def test_commands_and_options_exist() -> None:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("vitfold ")]
    assert len(commands) >= 4
    for line in commands:
        words = line.split("#")[0].split()
        named = words[1:3] if words[1] == "diffusion" else words[1:2]
        shown = "".join(
            CliRunner().invoke(app, [*named, asked], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
            for asked in ("--help", "--help-all")
        )
        assert "Usage:" in shown, line
        for option in (word for word in words if word.startswith("-")):
            assert option in shown, (line, option)


def test_my_own_model_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hide_packages: Callable[..., None]
) -> None:
    """A smaller architecture stands in; the extra that is installed there brings nothing else."""
    import timm
    import torch
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "cache"))
    hide_packages("onnxscript", "onnx", "sympy", "openvino", "nncf", "transformers", "torchvision")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), "mine.safetensors")
    folders = (ROOT / "assets/demo/images" / name for name in ("airplane", "bird", "ship"))
    for folder, name in zip(folders, ("birds", "boats", "cars"), strict=True):
        Path("val", name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:3]:
            shutil.copy(path, Path("val", name))
    shutil.copy(path, "photo.jpg")
    block = README.partition("## My own fine-tuned model")[2].partition("```console\n")[2].partition("```")[0]
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("vitfold ")]
    assert [words[1] for words in commands] == ["optimize", "evaluate", "bench", "predict"]
    for _, command, *words in commands:
        quick = ["--trials", "2", "--seconds", "0.1"] if command == "bench" else []
        smaller = ["test_vit" if word == "vit_small_patch16_224" else word for word in words]
        done = CliRunner().invoke(app, [command, *smaller, *quick])
        worse = command == "evaluate"  # random weights are
        assert done.exit_code == (3 if worse else 0), (command, done.output)
    assert "photo.jpg" in done.stdout


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", *[f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))]])
def test_tables_are_those_of_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert fill(text, ROOT) == text


def test_which_pages_hold_tables() -> None:
    """A page that lost its markers would pass the comparison."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    marked = {path.name for path in pages if "<!-- /" in path.read_text(encoding="utf-8")}
    assert marked >= {"README.md", "results.md", "nvidia.md", "quantization.md", "registers.md", "diffusion.md"}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), (page, target)
