"""Which way to draw a search takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusing import build_tiny_dit
from vitfold.bench.pictures import moments
from vitfold.diffusion import find_method
from vitfold.diffusion.compare import SamplerRow, SamplingConfig, compare
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.judge import Judge
from vitfold.diffusion.search import (
    HELD_OUT_SEED,
    Bounds,
    Setup,
    StepSpace,
    describe_bounds,
    fastest_method,
    screen,
    search_steps,
)
from vitfold.errors import JournalError, RecipeError
from vitfold.model import DiTModel, Model

ASKED = SamplingConfig(labels=(0, 2), seed=0, steps=6, sampler="ddim", guidance=2.0, batch=2)
TORCH = Setup(engine="torch")


@pytest.fixture(scope="module")
def model() -> DiTModel:
    return build_tiny_dit()


FEW = replace(TORCH, space=StepSpace(methods=("stack:2", "stack:3", "guidance:2"), fitted=(), fewer=(0.5,)))


def faster(speed_of: Callable[[SamplerRow], float]) -> Setup:
    """Let speed-ups be what a test says, since times of a tiny model mean nothing."""

    def told(*args: Any, **kwargs: Any) -> list[SamplerRow]:
        rows = compare(*args, **kwargs)
        return [rows[0], *(replace(row, speedup={"median": speed_of(row), "iqr": 0.0}) for row in rows[1:])]

    return replace(FEW, measure=told)


def full(row: SamplerRow) -> float:
    return ASKED.steps / row.sampled.full_steps


def test_every_candidate_and_plain_steps_are_measured_beside_the_plain_sampler(model: DiTModel) -> None:
    tried = screen(model, ASKED, Bounds(min_psnr_db=10.0), [Compression(), Compression(r=4)], FEW)
    names = {"stack:2", "stack:3", "guidance:2", "none, 3 steps"}
    merged = {f"{name}, r=4" for name in names}
    assert {one.row.name for one in tried} == names | merged | {"none, r=4"}
    assert all(one.psnr_drop_db is None for one in tried)
    assert {
        one.row.name for one in screen(model, ASKED, Bounds(min_psnr_db=1.0), [Compression()], FEW, fewer=False)
    } == (names - {"none, 3 steps"})


def test_the_fastest_that_keeps_the_bound_is_confirmed_on_other_seeds(model: DiTModel) -> None:
    seeds: list[int] = []
    setup = faster(full)

    def seen(model: DiTModel, ways: Any, **kwargs: Any) -> list[SamplerRow]:
        seeds.append(ways[0].asked.seed)
        return setup.measure(model, ways, **kwargs)

    watched = replace(setup, measure=seen)
    found = search_steps(model, ASKED, Bounds(min_psnr_db=0.0), [Compression()], watched, samples=4)
    assert found.winner is not None
    assert found.winner.row.name == "none, 3 steps"
    assert len(found.winner.row.sampled.samples) == 4
    assert seeds[-1] == HELD_OUT_SEED
    assert 0 in seeds
    strict = search_steps(model, ASKED, Bounds(min_psnr_db=200.0), [Compression()], setup, samples=2)
    assert strict.winner is None
    assert "nothing that keeps the bounds" in strict.reason


def test_nothing_slower_than_the_plain_sampler_wins(model: DiTModel) -> None:
    setup = faster(lambda row: 0.9)
    found = search_steps(model, ASKED, Bounds(min_psnr_db=0.0), [Compression()], setup, samples=2)
    assert found.winner is None
    assert found.plain.name == "none"
    assert fastest_method(found.tried, Bounds(min_psnr_db=0.0)).text == "none"


def test_one_that_breaks_the_bound_on_held_out_seeds_gives_way(model: DiTModel) -> None:
    setup = faster(full)

    def told(*args: Any, **kwargs: Any) -> list[SamplerRow]:
        plain, *rows = setup.measure(*args, **kwargs)
        confirmed = [len(row.sampled.samples) == 3 and row.sampled.full_steps <= 3 for row in rows]
        return [plain, *(replace(row, psnr_db=1.0 if bad else 50.0) for row, bad in zip(rows, confirmed, strict=True))]

    bounds = Bounds(min_psnr_db=40.0)
    found = search_steps(model, ASKED, bounds, [Compression()], replace(setup, measure=told), samples=3)
    assert found.winner is not None
    assert found.winner.row.sampled.full_steps > 3
    assert [one.row.sampled.full_steps <= 3 for one in found.refused] == [True] * len(found.refused)
    assert found.refused


def test_an_interrupted_screening_goes_on_where_it_was(model: DiTModel, tmp_path: Path) -> None:
    few = replace(FEW, space=StepSpace(methods=("stack:2", "stack:3", "guidance:2"), fitted=(0.7,), fewer=(0.5,)))
    setup, bounds = replace(few, folder=tmp_path), Bounds(max_psnr_drop_db=3.0)
    made: list[list[SamplerRow]] = []

    def counted(*args: Any, **kwargs: Any) -> list[SamplerRow]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(compare(*args, **kwargs))
        return made[-1]

    with pytest.raises(KeyboardInterrupt):
        screen(model, ASKED, bounds, [Compression()], replace(setup, measure=counted))
    first = [row for rows in made for row in rows[1:]]
    made.clear()

    def watched(*args: Any, **kwargs: Any) -> list[SamplerRow]:
        made.append(compare(*args, **kwargs))
        return made[-1]

    setup = replace(setup, measure=watched)
    found = screen(model, ASKED, bounds, [Compression()], setup)
    assert made, "what was not measured yet is"
    made.clear()
    again = screen(model, ASKED, bounds, [Compression()], setup)
    assert not made, "nothing is measured twice"
    assert [one.row.to_dict() for one in found[: len(first)]] == [row.to_dict() for row in first]
    assert [one.to_dict() for one in again] == [one.to_dict() for one in found]
    assert [one.row.method.mask for one in again] == [one.row.method.mask for one in found]
    assert any(one.row.method.mask for one in again), "with the steps that were chosen"
    fresh = screen(model, ASKED, bounds, [Compression()], few)
    assert {one.row.name: one.psnr_drop_db for one in again} == {one.row.name: one.psnr_drop_db for one in fresh}
    (tmp_path / "screened.jsonl").write_text('{"group": "x"}\n')
    with pytest.raises(JournalError, match="screened.jsonl holds a line that is no group of rows"):
        screen(model, ASKED, bounds, [Compression()], setup)


def test_chosen_steps_are_candidates(model: DiTModel) -> None:
    setup = replace(TORCH, space=StepSpace(methods=(), fitted=(0.7,)))
    tried = screen(model, ASKED, Bounds(min_psnr_db=1.0), [Compression()], setup, fewer=False)
    assert [one.row.name for one in tried] == ["fitted:4:4"]
    assert tried[0].row.method.mask is not None


def test_the_drop_is_towards_images_of_more_steps(model: DiTModel) -> None:
    bounds = Bounds(max_psnr_drop_db=3.0)
    tried = {one.row.name: one for one in screen(model, ASKED, bounds, [Compression()], FEW)}
    drops = {name: one.psnr_drop_db for name, one in tried.items()}
    assert all(drop is not None and np.isfinite(drop) for drop in drops.values())
    assert drops["none, 3 steps"] > 0
    assert tried["none, 3 steps"].within(Bounds(max_psnr_drop_db=drops["none, 3 steps"] + 0.1))
    assert not tried["none, 3 steps"].within(Bounds(max_psnr_drop_db=drops["none, 3 steps"] - 0.1))


def test_bounds_that_cannot_be_measured(model: DiTModel, tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(RecipeError, match="converges with more steps: --sampler ddim"):
        search_steps(model, replace(ASKED, sampler="ddpm"), Bounds(max_psnr_drop_db=1.0), [Compression()], TORCH)
    with pytest.raises(RecipeError, match="--max-fid-rise needs --real and --features"):
        search_steps(model, ASKED, Bounds(max_fid_rise=1.0), [Compression()], TORCH)
    real = moments(np.random.default_rng(0).normal(size=(40, 8)))
    judged = replace(TORCH, judge=Judge(model=tiny_model(), real=real))
    with pytest.raises(RecipeError, match="--samples 10 are too few for a Frechet distance; give at least 30"):
        search_steps(model, ASKED, Bounds(max_fid_rise=1.0), [Compression()], judged, samples=10)
    with pytest.raises(ValueError, match="needs a bound"):
        Bounds()


def test_bounds_in_words() -> None:
    assert describe_bounds(Bounds(min_psnr_db=30.0, max_fid_rise=0.5).to_dict()) == (
        "at least 30 dB to the unaccelerated images, a Frechet distance at most 0.5 larger"
    )


@pytest.mark.usefixtures("own_cache")
def test_tokencache_is_a_candidate_whose_predictor_is_trained_once(model: DiTModel) -> None:
    names = ("tokencache:0.5:2:3", "tokencache-blocks:0.5:2:3")
    assert {name.split(":")[0] for name in StepSpace().methods} >= {"tokencache", "tokencache-blocks"}
    said: list[str] = []
    setup = replace(
        faster(lambda row: 9.0 if "blocks" in row.name else full(row)),
        space=StepSpace(methods=names, fitted=(), fewer=(0.5,)),
        say=said.append,
    )
    found = search_steps(model, ASKED, Bounds(min_psnr_db=0.0), [Compression()], setup, samples=2)
    assert found.winner is not None
    assert found.winner.row.method == find_method(names[1])
    assert 0 < (found.winner.row.reused_work or 0) < 1
    assert {one.row.name.split(":")[0] for one in found.tried} == {"tokencache", "tokencache-blocks", "none, 3 steps"}
    assert sum("round 1/" in text for text in said) == 1
