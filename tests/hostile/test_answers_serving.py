"""Bundles of another task, given to what serves: one clear error each, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffusing import build_tiny_dit
from vitfold import pipeline
from vitfold.artifacts.steps import SamplingPlan
from vitfold.cli.app import app
from vitfold.diffusion.compression import compress
from vitfold.diffusion.methods import find_method
from vitfold.diffusion.writing import save_steps
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.model.preprocess import preprocess_of_arrays

pytest.importorskip("diffusers", reason="diffusers is not installed")


@pytest.fixture(scope="module")
def bundles(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    plan = SamplingPlan(reuse="stack:2", steps=5, sampler="ddim", guidance=1.5)
    model = build_tiny_dit()
    save_steps(model, plan, find_method("stack:2"), compress(model), folder / "steps.fold")
    encoder, arrays = tiny_model(outputs=0, output="image_embeds"), tiny_model()
    arrays = replace(arrays, preprocess=preprocess_of_arrays((3, *arrays.spec.image_size)))
    half = pipeline.optimize(tiny_model(), target="tensorrt-fp16")
    plans = {"encoder": pipeline.optimize(encoder), "arrays": pipeline.optimize(arrays), "gpu": half}
    for name, made in plans.items():
        pipeline.save(made, folder / f"{name}.fold")
    return folder


@dataclass(frozen=True)
class Given:
    id: str
    words: tuple[str, ...]
    said: str


STEPS = "holds the steps of a diffusion model"
SERVING = ("docker", "kserve", "bento", "ray-serve")
GIVEN = (
    Given("map of steps", ("map", "steps.fold", "photos", "-o", "out"), STEPS),
    Given("serve of steps", ("serve", "steps.fold"), STEPS),
    Given("evaluate of steps", ("evaluate", "steps.fold", "--images", "photos", "--changed"), STEPS),
    *(
        Given(f"{name} of steps", ("export", "steps.fold", "--format", name, "-o", "out"), STEPS)
        for name in (*SERVING, "web", "triton")
    ),
    *(
        Given(f"{name} of a GPU", ("export", "gpu.fold", "--format", name, "-o", "out"), "take --format triton")
        for name in SERVING
    ),
    Given("web of a GPU", ("export", "gpu.fold", "--format", "web", "-o", "out"), "make it with --target cpu"),
    Given("web of arrays", ("export", "arrays.fold", "--format", "web", "-o", "out"), "takes arrays"),
    Given("web without a package", ("export", "encoder.fold", "--format", "web", "--runtime", "photos", "-o", "out"),
          "is not the folder of the npm package"),
    Given("labels of an encoder", ("map", "encoder.fold", "photos", "--columns", "label", "-o", "out"), "no column"),
    Given("map of arrays over pictures", ("map", "arrays.fold", "photos", "-o", "out"), "holds no"),
    Given("changes of an encoder", ("evaluate", "encoder.fold", "--images", "photos", "--changed"), "--changed needs"),
)  # fmt: skip


@pytest.mark.parametrize("given", GIVEN, ids=lambda one: one.id)
def test_a_bundle_of_another_task_is_refused(
    given: Given, bundles: Path, photos: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given.words[0] == "map":
        pytest.importorskip("daft")
    monkeypatch.chdir(tmp_path)
    words = [str(bundles / word) if word.endswith(".fold") else word for word in given.words]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, done.stdout) == (1, "")
    said = " ".join(done.stderr.split())
    assert given.said in said
    assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
