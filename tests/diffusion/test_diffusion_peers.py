"""What others do on the same weights, beside a bundle: the same noise, the same images where all steps are computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusing import write_folder
from vitfold.artifacts.bundle import Bundle
from vitfold.artifacts.steps import SamplingPlan
from vitfold.diffusion import find_method
from vitfold.diffusion.bench import bench_steps
from vitfold.diffusion.compare import SamplingConfig
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.writing import save_steps
from vitfold.errors import RecipeError
from vitfold.sources.dit import load_dit

STEPS = 12
ASKED = SamplingConfig(labels=(0, 2), seed=3, steps=STEPS, sampler="ddim", guidance=2.0, batch=2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("peers")
    model = load_dit(f"hf:{write_folder(folder / 'dit')}")
    plan = SamplingPlan(reuse="fitted:7:2", steps=STEPS, sampler="ddim", guidance=2.0)
    return save_steps(model, plan, find_method(plan.reuse), Compression(), folder / "a.fold")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_peers_draw_beside_a_bundle(bundle: Bundle) -> None:
    rows = {row.name: row for row in bench_steps([bundle], ASKED, trials=1, peers=["diffusers"])}
    every = rows["diffusers, every step"]
    assert every.psnr_db is None or every.psnr_db > 60
    assert (every.sampled.full_steps, every.sampled.reused_steps) == (STEPS, 0)
    assert every.sampled.kept_bytes is None
    seer = rows["diffusers, TaylorSeer interval 3"]
    assert 3 <= seer.sampled.full_steps < STEPS
    assert seer.psnr_db is not None
    assert sum("FirstBlockCache" in name for name in rows) == 4
    assert rows["a"].sampled.full_steps == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_cache_dit_takes_the_steps_of_a_bundle(bundle: Bundle) -> None:
    pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    rows = {row.name: row for row in bench_steps([bundle], ASKED, trials=1, peers=["cache-dit"])}
    assert rows["cache-dit, the bundle's steps"].sampled.full_steps == 7
    assert rows["cache-dit, the bundle's steps"].psnr_db is not None


def test_a_peer_that_nobody_knows(bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="unknown peer 'cachedit'; did you mean cache-dit"):
        bench_steps([bundle], ASKED, trials=1, peers=["cachedit"])
