"""Diffusion folders, bundles and wishes that cannot be drawn as asked: refused before anything is, or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusing import SCHEDULE, build_tiny_dit, write_folder
from vitfold.artifacts.steps import SamplingPlan
from vitfold.cli.app import app
from vitfold.diffusion import find_method
from vitfold.diffusion.compression import compress
from vitfold.diffusion.writing import save_steps
from vitfold.errors import SourceError
from vitfold.model.schedule import OWN, REPLACED, own_sampler

pytest.importorskip("diffusers", reason="diffusers is not installed")
QUICK = ("--steps", "5", "--trials", "1", "--engine", "torch")


def run(*arguments: object, code: int) -> str:
    """Return what a command says that has to leave with this code, on one line."""
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, (result.stdout, result.stderr)
    return " ".join(result.stderr.split())


@dataclass(frozen=True)
class Schedule:
    id: str
    changed: dict[str, Any]
    said: tuple[str, ...]


REFUSED = (
    Schedule("flow matching", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, ("flow matching", "trained for one")),
    Schedule("flow by Heun", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, ("flow matching",)),
    Schedule("flow sigmas", {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, ("flow matching",)),
    Schedule("flow prediction", {"prediction_type": "flow_prediction"}, ("flow matching",)),
    Schedule("a distilled one", {"_class_name": "LCMScheduler"}, ("LCMScheduler", "noise schedules of diffusion")),
    Schedule("noise of VQ", {"_class_name": "VQDiffusionScheduler"}, ("VQDiffusionScheduler",)),
    Schedule("EDM", {"_class_name": "EDMEulerScheduler"}, ("EDMEulerScheduler",)),
    Schedule("one of the user's", {"_class_name": "MyScheduler"}, ("MyScheduler",)),
    Schedule("another prediction", {"prediction_type": "score"}, ("prediction_type 'score'", "v_prediction")),
)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_schedules_that_cannot_be_followed_are_refused(tmp_path, case):
    with pytest.raises(SourceError) as caught:
        own_sampler({**SCHEDULE, **case.changed})
    folder = write_folder(tmp_path / "dit")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULE, **case.changed}))
    said = run("diffuse", f"hf:{folder}", *QUICK, code=1)
    for words in case.said:
        assert words in str(caught.value)
        assert words in said


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within diffusers
@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_the_folders_scheduler_is_followed_or_named(tmp_path, kind):
    folder = write_folder(tmp_path / "dit")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({**SCHEDULE, "_class_name": kind}))
    said = run("diffuse", f"hf:{folder}", *QUICK, "-o", tmp_path / "out", code=0)
    drawn = json.loads((tmp_path / "out" / "diffuse.json").read_text())
    assert drawn["sampler"] == OWN.get(kind, "ddim")
    assert (f"the folder's {kind} is replaced by ddim; choose another one with --sampler" in said) == (kind in REPLACED)
    said = run("diffuse", f"hf:{folder}", *QUICK, "--sampler", "ddim", code=0)
    assert "is replaced" not in said, "what was asked for is nobody's replacement"


def test_every_class_is_followed_or_replaced_but_not_both():
    import diffusers

    assert not set(OWN) & REPLACED
    assert [name for name in (*OWN, *REPLACED) if not hasattr(diffusers, name)] == []


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles of one model: a plan for ddim, and one for dpm++."""
    folder, model = tmp_path_factory.mktemp("bundles"), build_tiny_dit()
    for name, sampler in (("ddim", "ddim"), ("dpm", "dpm++")):
        plan = SamplingPlan(reuse="stack:2", steps=5, sampler=sampler, guidance=1.5)
        save_steps(model, plan, find_method("stack:2"), compress(model), folder / f"{name}.fold")
    return folder


@dataclass(frozen=True)
class Command:
    id: str
    words: Callable[[Path], tuple[object, ...]]
    said: tuple[str, ...]
    code: int = 1


COMMANDS = (
    Command("no such bundle", lambda f: ("diffuse", f / "none.fold"), ("no such bundle", "none.fold")),
    Command("a bundle's name misspelt", lambda f: ("diffuse", f / "dim.fold"), ("no such bundle", "did you mean ddim")),
    Command("no such folder", lambda f: ("diffuse", f / "none"), ("there is no such bundle",)),
    Command("an empty bundle", lambda f: ("diffuse", f / "empty.fold"), ("is not a bundle", "manifest.json")),
    Command("no bundle to bench", lambda f: ("bench", f / "none.fold"), ("no such bundle",)),
    Command(
        "another sampler than the plan's",
        lambda f: ("diffuse", f / "ddim.fold", "--sampler", "dpm++"),
        ("plan of this bundle (stack:2)", "chosen for the sampler ddim, not for dpm++", "leave out --sampler"),
    ),
    Command(
        "noise where the plan has none",
        lambda f: ("diffuse", f / "dpm.fold", "--sampler", "ddpm"),
        ("chosen for the sampler dpm++, not for ddpm",),
    ),
    Command("an unknown sampler", lambda f: ("diffuse", f / "ddim.fold", "--sampler", "x"), ("not for x",)),
    Command(
        "plans of two samplers",
        lambda f: ("bench", f / "ddim.fold", f / "dpm.fold", "--trials", "1"),
        ("dpm.fold was chosen for the sampler dpm++", "compare bundles of one sampler"),
    ),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within diffusers
@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.id)
def test_bundles_that_cannot_draw_this_are_refused(bundles, case):
    (bundles / "empty.fold").mkdir(exist_ok=True)
    said = run(*case.words(bundles), code=case.code)
    for words in case.said:
        assert words in said
