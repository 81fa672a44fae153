"""Blocks that are chosen as a step goes: turns, budgets, and a slow sampler of its own beside the parts."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusing import build_tiny_dit
from vitfold.architectures.dit import blocks, condition, embed, head, modulations
from vitfold.diffusion import find_method, full_steps
from vitfold.diffusion.compare import SamplingConfig, draw
from vitfold.diffusion.opening import TokenPlan, open_parts, prepare_tokens, reused_work
from vitfold.diffusion.planners import spread
from vitfold.diffusion.sampling import Sampled
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.token_choice import BlockChoice, choose_blocks
from vitfold.diffusion.token_refresh import predicted_scores
from vitfold.errors import RecipeError
from vitfold.model import Array, DiTModel, DiTSpec
from vitfold.model.dit import class_rows, timestep_embedding
from vitfold.ops.run import Run

GUIDANCE, STEPS = 2.5, 9
FORMS = ("0.5:2:4:0.75", "0.3:3:6:0.34:norm", "0.4:3:4:0.5:random:uniform", "0.5:4:4:0.67:norm:one-phase", "0.5:2:4:1")


@pytest.fixture(scope="module")
def model() -> DiTModel:
    return build_tiny_dit(num_layers=3)


@pytest.fixture(scope="module")
def tokens(model: DiTModel) -> TokenPlan:
    """Random weights that differ more than trained ones of a tiny model."""
    rng = np.random.default_rng(7)
    shapes = {"predictor.fc1.weight": (64, 32), "predictor.fc1.bias": (64,), "predictor.fc2.bias": (3,)}
    params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return TokenPlan(counts=(), params={**params, "predictor.fc2.weight": rng.normal(0, 1, (3, 64)).astype(np.float32)})


def drawn(model: DiTModel, tokens: TokenPlan, form: str, engine: str = "torch", **changed: Any) -> Sampled:
    method = find_method(f"tokencache-blocks:{form}")
    assert method.choice is not None
    assert method.ratio is not None
    count = method.choice.renewed_tokens(model.spec, method.ratio)
    plan = TokenPlan(counts=(count,) * 3, params=tokens.params if method.choice.scoring == "predictor" else {})
    asked: dict[str, Any] = {"labels": (0, 2), "seed": 3, "steps": STEPS, "sampler": "ddim", "guidance": GUIDANCE}
    with open_parts(model, method, tokens=plan, engine=engine) as executor:
        return draw(model, executor, method, SamplingConfig(**{**asked, "batch": 2, **changed}))


def slowly(model: DiTModel, tokens: TokenPlan, form: str, label: int, seed: int) -> Array:
    """One image by a loop over steps, blocks and tokens; every block is computed whole, and rows are copied."""
    method, spec = find_method(f"tokencache-blocks:{form}"), model.spec
    choice = method.choice
    assert choice is not None
    assert method.ratio is not None
    scheduler = build_scheduler("ddim", model.schedule, STEPS, learned_sigma=False)
    ops, chance = Run({**model.params, **tokens.params}), np.random.default_rng((seed, 1))
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    reused = choice.reused_blocks(3)
    left_out = round(method.ratio * 3 * 16 / reused)
    kept, ages = [torch.zeros(2, 16, 32) for _ in range(3)], [0, 0, 0]
    rows = torch.from_numpy(class_rows(spec, np.array([label, spec.null_class])))
    for step, (t, full) in enumerate(zip(scheduler.timesteps, full_steps(method, STEPS), strict=True)):
        t_freq = torch.from_numpy(timestep_embedding(spec, np.full(2, int(t))))
        vectors = modulations(ops, spec, condition(ops, spec, t_freq, rows))
        tokens_of = embed(ops, x.repeat(2, 1, 1, 1))
        if choice.scoring == "random":
            scores = torch.from_numpy(chance.random((16, 3), np.float32)).expand(2, -1, -1) if not full else None
        elif choice.scoring == "norm":
            scores = torch.stack([one.norm(dim=2) for one in kept], 2)
        else:
            scores = predicted_scores(ops, spec, tokens_of, *vectors[:2])
        chosen: set[int] = set()
        if not full:
            assert scores is not None
            shown = scores.double().sigmoid() if choice.scoring == "predictor" else scores.double()
            turns = choice.schedule == "one-phase" or (choice.schedule == "tprr" and 2 * step >= STEPS)
            order = sorted(range(3), key=lambda b: (ages[b] if turns else 0, float(shown[:, :, b].mean())))
            chosen = set(order[:reused])
        for block in range(3):
            new = blocks(ops, spec, tokens_of, vectors, range(block, block + 1)) - tokens_of
            if block in chosen:
                for row in range(2):
                    worst = scores[row, :, block].argsort()[:left_out]
                    new[row, worst] = kept[block][row, worst]
            ages[block] = ages[block] + 1 if block in chosen else 0
            kept[block], tokens_of = new, tokens_of + new
        with_class, without = head(ops, spec, tokens_of, vectors).chunk(2)
        x = scheduler.step(without + GUIDANCE * (with_class - without), t, x).prev_sample
    return x.numpy()


@pytest.mark.parametrize("form", FORMS)
def test_parts_draw_what_a_slow_loop_draws(model: DiTModel, tokens: TokenPlan, form: str) -> None:
    expected = np.concatenate([slowly(model, tokens, form, label, 3 + i) for i, label in enumerate((0, 2))])
    found = drawn(model, tokens, form)
    assert found.reused_steps > 0
    np.testing.assert_allclose(found.samples, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("form", FORMS[:3])
def test_graphs_choose_as_torch_does(model: DiTModel, tokens: TokenPlan, form: str) -> None:
    graph, eager = (drawn(model, tokens, form, engine) for engine in ("onnxruntime", "torch"))
    np.testing.assert_allclose(graph.samples, eager.samples, rtol=2e-3, atol=2e-3)
    assert graph.kept_bytes == eager.kept_bytes


@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]])
def test_an_image_chooses_by_itself(model: DiTModel, tokens: TokenPlan, form: str) -> None:
    together = drawn(model, tokens, form, labels=(0, 2, 1), batch=3).samples
    alone = drawn(model, tokens, form, labels=(1,), seed=5).samples
    np.testing.assert_allclose(together[2:], alone, rtol=1e-3, atol=1e-3)


def test_a_block_that_runs_in_full_is_exactly_new(model: DiTModel, tokens: TokenPlan) -> None:
    """Without tokens to leave out, whatever is chosen changes nothing."""
    found = drawn(model, tokens, "0:2:4:0.5")
    with open_parts(model, find_method("none")) as executor:
        asked = SamplingConfig(labels=(0, 2), seed=3, steps=STEPS, sampler="ddim", guidance=GUIDANCE, batch=2)
        expected = draw(model, executor, find_method("none"), asked)
    assert found.reused_steps > 0
    np.testing.assert_allclose(found.samples, expected.samples, rtol=1e-3, atol=1e-3)


@given(st.integers(1, 12), st.data())
@settings(max_examples=80, deadline=None)
def test_by_turns_no_block_is_reused_for_long(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ages = [0] * depth
    for _ in range(4 * depth):
        chosen = choose_blocks(rng.random(depth), ages, count, by_turns=True)
        assert len(chosen) == count
        ages = [age + 1 if block in chosen else 0 for block, age in enumerate(ages)]
        if count < depth:
            assert max(ages) <= math.ceil(depth / (depth - count)) - 1


@given(st.integers(1, 12), st.data())
@settings(max_examples=40, deadline=None)
def test_by_scores_the_blocks_that_matter_least_are_reused(depth: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, depth))
    importance = np.random.default_rng(data.draw(st.integers(0, 99))).random(depth)
    chosen = choose_blocks(importance, [9] * depth, count, by_turns=False)
    others = [importance[block] for block in range(depth) if block not in chosen]
    assert len(chosen) == count
    assert not others or max(importance[block] for block in chosen) <= min(others)


@functools.cache
def build_spec(depth: int) -> DiTSpec:
    return replace(build_tiny_dit().spec, num_layers=depth)


@given(st.integers(1, 28), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_budgets_hold_whatever_share_of_blocks_spends_them(depth: int, a: float, b: float) -> None:
    ratio, share = sorted((a, b))
    spec = build_spec(depth)
    choice = BlockChoice(share=share, scoring="norm", schedule="tprr")
    count, reused = choice.renewed_tokens(spec, ratio), choice.reused_blocks(depth)
    assert 0 <= count <= spec.tokens
    assert abs(reused * (spec.tokens - count) - ratio * depth * spec.tokens) <= reused / 2 + 1e-6


@given(st.integers(2, 200), st.data())
@settings(max_examples=60, deadline=None)
def test_steps_are_spread(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(min(3, steps), steps))
    found = spread(steps, count)
    assert len(found) == count
    assert {0, 1, steps - 1} <= set(found)
    gaps = np.diff(found[1:])
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_schedules_compute_as_many_steps() -> None:
    shown = {
        name: "".join(
            "F" if full else "." for full in full_steps(find_method(f"tokencache-blocks:0.5:2:4:1:norm:{name}"), 16)
        )
        for name in ("tprr", "uniform", "one-phase")
    }
    assert shown == {"tprr": "FF.F.F.F...F...F", "uniform": "FF..F..F.F..F..F", "one-phase": "FF..F..F.F..F..F"}


def test_work_is_that_of_the_budget(model: DiTModel) -> None:
    """Where every block renews as many tokens, or a part of them runs whole, the work differs by keys alone."""
    works = []
    for share in (0.67, 1):
        method = find_method(f"tokencache-blocks:0.5:2:4:{share}:random")
        tokens = prepare_tokens(model, method, STEPS)
        assert tokens is not None
        works.append(reused_work(model.spec, method, tokens.counts))
    chosen, every = works
    assert chosen is not None
    assert every is not None
    assert 0.5 < chosen == pytest.approx(every, rel=0.1)
    assert every < 0.75


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("0.8:2:4:0.5", "0.8 of all tokens cannot be left out by 0.5 of the blocks"),
        ("0.5:2:4:0.75:chance", "'chance' is none of predictor, random, norm"),
        ("0.5:2:4:0.75:norm:tprs", "'tprs' is none of tprr, one-phase, uniform"),
        ("0.5:2:4:nan", "out of range"),
    ],
)
def test_what_no_choice_is(form: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        find_method(f"tokencache-blocks:{form}")
