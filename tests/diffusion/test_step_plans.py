"""Plans of steps through diffusers' own pipelines: made, kept, installed, refused where they do not belong."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitfold
from pipelining import FAMILIES, PIPES, tiny_pipe
from vitfold.diffusion.forecast import taylor
from vitfold.diffusion.pipelines.choosing import solve
from vitfold.diffusion.pipelines.planning import HELD_OUT_SEED
from vitfold.diffusion.pipelines.recording import Recorder, Sketch, Trace
from vitfold.diffusion.pipelines.stacks import StackFinder
from vitfold.errors import ArgumentError, RecipeError, UnsupportedError

STEPS = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["flux", "sd3", "wan"])
def planned(request: Any, tmp_path_factory: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFOLD_CACHE", str(tmp_path_factory.mktemp("plans")))
        pipe, prompts, call = tiny_pipe(request.param)
        plan = vitfold.plan_steps(pipe, prompts, steps=STEPS, full=8, seeds=1, **call)
        yield pipe, prompts, call, plan
    vitfold.restore(pipe)


def draw(pipe: Any, prompt: Mapping[str, Any], call: Mapping[str, Any], steps: int = STEPS, seed: int = 5) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(**prompt, **call, num_inference_steps=steps, generator=generator)[0]


def count_blocks(pipe: Any, plan: Any) -> Any:
    """Count the calls of the last block of every stack."""
    calls = {}
    for name, stack in plan.stacks.items():
        blocks = [block for block, _ in stack.blocks(getattr(pipe, name))]
        for i in (0, len(blocks) - 1):
            former = blocks[i].forward

            def counted(*args: Any, key: Any = (name, i), former: Any = former, **kwargs: Any) -> Any:
                calls[key] = calls.get(key, 0) + 1
                return former(*args, **kwargs)

            blocks[i].forward = counted
    return calls


def test_a_plan_says_what_it_is_for_and_what_it_gains(planned: Any) -> None:
    _, _, call, plan = planned
    every, chosen, fewer, *equal_time = plan.held_out
    assert (every.full, chosen.full, fewer.full) == (STEPS, 8, 8)
    assert (every.steps, chosen.steps, fewer.steps) == (STEPS, STEPS, 8)
    assert all(8 < row.steps < STEPS for row in equal_time)
    assert len(equal_time) <= 1
    assert every.psnr_db is None
    assert chosen.psnr_db > fewer.psnr_db
    assert chosen.lowest_psnr_db <= chosen.psnr_db + 1e-6
    assert {0, 1, STEPS - 1} <= set(plan.full)
    assert plan.guidance["guidance_scale"] == call["guidance_scale"]
    assert plan.scheduler["class"] == "FlowMatchEulerDiscreteScheduler"
    best = max((fewer, *equal_time), key=lambda row: row.psnr_db)
    ahead = chosen.psnr_db - best.psnr_db
    assert (f"nearer to all steps than num_inference_steps={best.steps}" in str(plan)) == (ahead > 0.1)
    assert (f"are as good: num_inference_steps={best.steps}" in str(plan)) == (ahead <= 0.1)


def test_a_plan_is_a_small_file(planned: Any, tmp_path: Path) -> None:
    plan = planned[3]
    path = plan.save(tmp_path / "plan.json")
    assert vitfold.load_plan(path) == plan
    assert path.stat().st_size < 8000
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(RecipeError, match="has format 3, this version reads up to 2; update vitfold"):
        vitfold.load_plan(path)
    path.write_text("{}")
    with pytest.raises(RecipeError, match="is no plan of steps .*; make one by vitfold.plan_steps"):
        vitfold.load_plan(path)
    replace(plan, full=(0, 1, 99)).save(path)
    with pytest.raises(RecipeError, match="damaged"):
        vitfold.load_plan(path)
    replace(plan, rows=plan.rows[:-1]).save(path)
    with pytest.raises(RecipeError, match="damaged"):
        vitfold.load_plan(path)


def test_a_plan_of_format_1_is_a_plan_of_lines(planned: Any, tmp_path: Path) -> None:
    pipe, prompts, call, plan = planned
    lines = replace(plan, method="solved", rows=(), position="step")
    path = lines.save(tmp_path / "plan.json")
    values = json.loads(path.read_text())
    del values["method"], values["rows"]
    path.write_text(json.dumps({**values, "format": 1}))
    assert vitfold.load_plan(path) == lines
    expected = draw(vitfold.accelerate(pipe, path), prompts[3], call)
    rows = tuple(
        () if t in plan.full else taylor([p for p in plan.full if p < t][-2:], t, order=1) for t in range(plan.runs)
    )
    found = draw(vitfold.accelerate(pipe, replace(lines, rows=rows)), prompts[3], call)
    vitfold.restore(pipe)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["solved", "dpcache", "taylor:2:1", "spectrum", "magcache:0.3:4:0.1"])
def test_every_static_method_makes_plans(method: str, tmp_path: Path) -> None:
    pipe, prompts, call = tiny_pipe("flux")
    bound = {"full": 7} if ":" not in method and method != "spectrum" else {}
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, seeds=1, method=method, **bound, **call)
    assert plan.method == (method if method != "spectrum" else "spectrum:2:0.75:4:10")
    assert len(plan.full) == bound.get("full", len(plan.full)) < STEPS
    assert bool(plan.rows) == (method != "solved")
    assert vitfold.load_plan(plan.save(tmp_path / "plan.json")) == plan
    calls = count_blocks(pipe, plan)
    vitfold.accelerate(pipe, plan)
    assert torch.isfinite(draw(pipe, prompts[0], call)).all()
    vitfold.restore(pipe)
    assert set(calls.values()) == {len(plan.full) * plan.passes}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"method": "teacache"}, "'teacache' is no plan of steps: it decides per image.* one of .*fitted"),
        ({"method": "none"}, "is no plan of steps"),
        ({"method": "fitted:12"}, "name the full steps of 'fitted:12' as full="),
        ({"method": "taylor:3:1", "full": 5}, "of taylor:3:1 follow from its numbers; leave out full"),
        ({"method": "fited"}, "unknown reuse method 'fited'; did you mean fitted"),
    ],
)
def test_methods_that_make_no_plan(asked: dict[str, Any], said: str) -> None:
    pipe, prompts, call = tiny_pipe("flux")
    with pytest.raises(RecipeError, match=said):
        vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, **asked, **call)


def test_an_accelerated_pipeline_is_called_as_before_and_restored(planned: Any, tmp_path: Path) -> None:
    pipe, prompts, call, plan = planned
    plain, kind = draw(pipe, prompts[3], call), type(pipe)
    everything = replace(plan, full=tuple(range(STEPS)))
    assert torch.equal(draw(vitfold.accelerate(pipe, everything), prompts[3], call), plain)
    assert vitfold.accelerate(pipe, plan.save(tmp_path / "plan.json")) is pipe
    assert isinstance(pipe, kind)
    assert type(pipe).__name__ == kind.__name__
    fast = draw(pipe, prompts[3], call)
    assert not torch.equal(fast, plain)
    assert torch.equal(draw(pipe, prompts[3], call), fast)
    assert torch.isfinite(fast).all()
    assert vitfold.restore(pipe) is vitfold.restore(pipe)
    assert type(pipe) is kind
    assert vars(pipe.scheduler).keys().isdisjoint({"step", "set_timesteps"})
    assert not any("forward" in vars(module) for module in pipe.transformer.modules())
    assert torch.equal(draw(pipe, prompts[3], call), plain)


def test_blocks_of_reused_steps_compute_nothing(planned: Any) -> None:
    pipe, prompts, call, plan = planned
    calls = count_blocks(pipe, plan)  # below the hooks
    vitfold.accelerate(pipe, plan)
    draw(pipe, prompts[0], call)
    vitfold.restore(pipe)
    assert sum(calls.values()) == 2 * len(plan.full) * plan.passes
    for name, stack in plan.stacks.items():
        for block, _ in stack.blocks(getattr(pipe, name)):
            vars(block).pop("forward", None)


def test_hooks_that_others_lay_around_ours_survive_ours() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=6, seeds=1, **call)
    plain = draw(pipe, prompts[0], call)
    vitfold.accelerate(pipe, plan)
    fast = draw(pipe, prompts[0], call)
    calls = count_blocks(pipe, plan)
    assert torch.equal(draw(pipe, prompts[0], call), fast)
    vitfold.restore(pipe)
    assert torch.equal(draw(pipe, prompts[0], call), plain)
    assert sum(calls.values()) == 4 * STEPS


COMPILED = """
import torch, vitfold
from pipelining import tiny_pipe

for how in ("compile_repeated_blocks", "compile"):
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=12, full=6, seeds=1, **call)
    vitfold.accelerate(pipe, plan)
    draw = lambda: pipe(**prompts[0], **call, num_inference_steps=12, generator=torch.Generator().manual_seed(0))[0]
    fast = draw()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=6, fail_on_recompile_limit_hit=True):
        getattr(pipe.transformer, how)(backend="eager")
        torch.testing.assert_close(draw(), fast, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_blocks_within_the_hooks_compile() -> None:
    """In a process of its own: a compiler would trace the checks of shapes and types that tests put into functions."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    asked = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", COMPILED], check=False, **asked)
    assert done.returncode == 0, done.stderr


def test_parameters_that_come_later_are_refused() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=6, seeds=1, **call)
    vitfold.accelerate(pipe, plan)
    block = pipe.transformer.transformer_blocks[0]
    block.lora = torch.nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="other parameters than when the plan was installed, such as a LoRA's"):
        draw(pipe, prompts[0], call)
    del block.lora
    draw(pipe, prompts[0], call)


def test_what_was_confirmed_is_what_an_accelerated_pipeline_draws(planned: Any) -> None:
    pipe, prompts, call, plan = planned
    full = [draw(pipe, prompt, call, seed=HELD_OUT_SEED).numpy() for prompt in prompts[2:]]
    vitfold.accelerate(pipe, plan)
    fast = [draw(pipe, prompt, call, seed=HELD_OUT_SEED).numpy() for prompt in prompts[2:]]
    vitfold.restore(pipe)
    peak = max(one.max() for one in full) - min(one.min() for one in full)
    error = np.mean([(a - b) ** 2 for a, b in zip(full, fast, strict=True)])
    assert plan.held_out[1].psnr_db == pytest.approx(10 * np.log10(peak**2 / error), abs=0.05)


def test_what_does_not_go_with_a_plan_is_refused_with_the_cure(planned: Any) -> None:
    import diffusers

    pipe, prompts, call, plan = planned
    vitfold.accelerate(pipe, plan)
    with pytest.raises(RecipeError, match=f"the scheduler has 9; call the pipeline with num_inference_steps={STEPS}"):
        draw(pipe, prompts[0], call, steps=9)
    with pytest.raises(RecipeError, match=r"another guidance: guidance_scale = 2.0 \(plan: 3.*call vitfold.restore"):
        draw(pipe, prompts[0], {**call, "guidance_scale": 2.0})
    own = pipe.scheduler
    pipe.scheduler = copy.deepcopy(own)
    with pytest.raises(RecipeError, match="another scheduler than when the plan was installed; give it the plan's"):
        draw(pipe, prompts[0], call)
    pipe.scheduler = own
    vitfold.restore(pipe)
    for other, message in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), r"with shift = 1.0 \(plan: 3.0\); give the pipeline"),
        (diffusers.DDIMScheduler(), "is for FlowMatchEulerDiscreteScheduler, and the pipeline's scheduler is DDIM"),
    ):
        pipe.scheduler = other
        with pytest.raises(RecipeError, match=message):
            vitfold.accelerate(pipe, plan)
    pipe.scheduler = own
    weight = next(pipe.transformer.parameters())
    with torch.no_grad():
        weight.view(-1)[0] += 1
        with pytest.raises(RecipeError, match="other weights than those of this .*a LoRA counts as other weights"):
            vitfold.accelerate(pipe, plan)
        weight.view(-1)[0] -= 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("name", sorted(set(PIPES) - {"flux", "sd3", "wan"}))
def test_pipelines_of_all_families_take_plans(name: str) -> None:
    pipe, prompts, call = tiny_pipe(name)
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=7, seeds=1, **call)
    assert plan.held_out[1].psnr_db > plan.held_out[2].psnr_db
    plain = draw(pipe, prompts[0], call)
    everything = replace(plan, full=tuple(range(STEPS)))
    assert torch.equal(draw(vitfold.accelerate(pipe, everything), prompts[0], call), plain)
    assert not torch.equal(draw(vitfold.accelerate(pipe, plan), prompts[0], call), plain)
    vitfold.restore(pipe)


def test_a_negative_prompt_makes_two_passes_of_one() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    call = {**call, "true_cfg_scale": 2.0}
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=8, seeds=1, **call)
    vitfold.accelerate(pipe, plan)
    negative = {f"negative_{name}": value for name, value in prompts[1].items()}
    with pytest.raises(RecipeError, match="1 calls of the transformer at a step, here are 2"):
        draw(pipe, {**prompts[0], **negative}, call)


def test_the_same_weights_in_bfloat16_take_the_same_plan() -> None:
    pipe, prompts, call = tiny_pipe("sd3")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=8, seeds=1, **call)
    pipe.to(torch.bfloat16)
    vitfold.accelerate(pipe, plan)
    cast = {name: value.bfloat16() for name, value in prompts[0].items()}
    found = draw(pipe, cast, call)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found.float()).all()


@pytest.mark.parametrize("bound", [{"min_psnr": 50.0}, {"max_seconds": 60.0}, {}])
def test_bounds_are_kept(bound: dict[str, float]) -> None:
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:2], steps=STEPS, seeds=1, **bound, **call)
    chosen = plan.held_out[1]
    if "max_seconds" in bound:
        assert chosen.seconds <= 60
        assert len(plan.full) == STEPS - 1
    else:
        assert chosen.psnr_db >= bound.get("min_psnr", 30.0)
        less = len(plan.full) - 1
        if less >= 3:
            fewer = vitfold.plan_steps(pipe, prompts[:2], steps=STEPS, seeds=1, full=less, **call)
            assert fewer.held_out[1].psnr_db < bound.get("min_psnr", 30.0)


def test_bounds_that_no_plan_keeps() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    for bound, message in (
        ({"min_psnr": 500.0}, "even 11 of 12 steps in full give less than 500 dB; lower min_psnr"),
        ({"max_seconds": 1e-6}, "no plan takes 1e-06 s: 3 steps in full take .* allow more seconds"),
    ):
        with pytest.raises(RecipeError, match=message):
            vitfold.plan_steps(pipe, prompts[:2], steps=STEPS, seeds=1, **bound, **call)


def test_of_few_steps_none_is_reused() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=4, seeds=1, **call)
    assert plan.mask == (True,) * 4
    assert "4 steps leave nothing to reuse" in str(plan)
    plain = draw(pipe, prompts[0], call, steps=4)
    assert torch.equal(draw(vitfold.accelerate(pipe, plan), prompts[0], call, steps=4), plain)


def test_where_fewer_steps_are_as_good_the_plan_says_so() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    torch.nn.init.zeros_(pipe.transformer.proj_out.weight)
    torch.nn.init.zeros_(pipe.transformer.proj_out.bias)
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=6, seeds=1, **call)
    assert "as good" in plan.remark
    assert "gives equal images and this plan equal images; use them instead" in plan.remark


def test_interrupted_planning_goes_on() -> None:
    pipe, prompts, call = tiny_pipe("flux")
    draws, most = [0], [3]
    kind = type(pipe)

    class Interrupted(kind):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if draws[0] == most[0]:
                raise KeyboardInterrupt
            draws[0] += 1
            return kind.__call__(self, *args, **kwargs)

    Interrupted.__name__ = kind.__name__
    Interrupted.__call__.__wrapped__ = kind.__call__  # type: ignore[attr-defined]
    pipe.__class__ = Interrupted
    asked = {"steps": STEPS, "full": 8, "seeds": 2, **call}
    with pytest.raises(KeyboardInterrupt):
        vitfold.plan_steps(pipe, prompts[:1], **asked)
    assert vars(pipe.scheduler).keys().isdisjoint({"step", "set_timesteps"})
    most[0] = 100
    first = vitfold.plan_steps(pipe, prompts[:1], **asked)
    # One short draw to find the blocks, two recorded, then two images a row.
    drawn = 3 + 2 * len(first.held_out)
    assert draws[0] == drawn
    assert vitfold.plan_steps(pipe, prompts[:1], **asked) == first
    assert draws[0] == drawn


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompts": []}, "prompts must be a list of at least one prompt"),
        ({"prompts": "a fox"}, "prompts must be a list of at least one prompt"),
        ({"prompts": ["a fox", " "]}, "holds an empty prompt"),
        ({"held_out": []}, "held_out must be a list"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"full": 2}, "full must be a whole number of at least 3"),
        ({"full": 12}, "full = 12 of 12 steps leaves none to reuse"),
        ({"full": 4, "min_psnr": 30.0}, "full and min_psnr are given; name one"),
        ({"min_psnr": -1.0}, "min_psnr must be a positive number"),
        ({"heigth": 64}, "FluxPipeline takes no argument 'heigth'"),
        ({"num_inference_steps": 20}, "num_inference_steps is set by plan_steps itself"),
        ({"callback_on_step_end": print}, "an argument .* is a builtin_function_or_method"),
    ],
)
def test_arguments_that_mean_nothing(asked: dict[str, Any], message: str) -> None:
    pipe, prompts, call = tiny_pipe("flux")
    given = {"prompts": prompts[:1], "steps": STEPS, **call, **asked}
    with pytest.raises(ArgumentError, match=message):
        vitfold.plan_steps(pipe, **given)


def test_pipelines_that_have_no_blocks() -> None:
    with pytest.raises(UnsupportedError, match="is no pipeline of diffusers with a transformer and a scheduler"):
        vitfold.plan_steps(object(), ["a fox"])
    pipe, prompts, call = tiny_pipe("flux")
    pipe.transformer.compile()
    with pytest.raises(RecipeError, match="transformer is compiled.*accelerate first, then compile"):
        vitfold.plan_steps(pipe, prompts, steps=STEPS, **call)


def test_guidance_is_found_in_calls_apart_and_in_one_batch_of_any_order() -> None:
    family = FAMILIES["dit"]
    module = family.build()
    finder = StackFinder(module)
    with torch.no_grad():
        family.call(module, torch.zeros(family.latent), torch.tensor(500.0))
    assert finder.stack is not None

    def predict(x: torch.Tensor, t: Any, labels: list[int]) -> torch.Tensor:
        at = t.reshape(1).expand(len(labels))
        return module(x.expand(len(labels), -1, -1, -1), timestep=at, class_labels=torch.tensor(labels)).sample

    def trace(order: tuple[int, ...], *, together: bool) -> Trace:
        import diffusers

        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        recorder = Recorder(
            scheduler=scheduler, transformers={"transformer": module}, stacks={"transformer": finder.stack}
        )
        scheduler.set_timesteps(5)
        x = torch.randn(1, *family.latent[1:], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in scheduler.timesteps:
                if together:
                    rows = predict(x, t, list(order))
                else:
                    rows = torch.cat([predict(x, t, [label]) for label in order])
                null, label = (rows[order.index(one)][None] for one in (10, 4))
                x = scheduler.step(null + 3 * (label - null), t, x, return_dict=False)[0]
        recorder.close()
        return recorder.trace()

    traces = [trace(order, together=together) for order in ((10, 4), (4, 10)) for together in (True, False)]
    for other in traces[1:]:
        np.testing.assert_allclose(other.gram, traces[0].gram, rtol=1e-3)
    assert [one.passes for one in traces] == [1, 2, 1, 2]


def test_a_sketch_keeps_norms_of_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(3, 40_000, generator=generator) for _ in range(2))
    small = Sketch(size=4096)
    first, second = small(a), small(b)
    assert first.shape == (4096,)
    for x, y in ((a, first), (a - b, first - second), (2 * a + b, 2 * first + second)):
        assert float(np.sum(y**2)) == pytest.approx(float((x**2).sum()), rel=0.08)
    np.testing.assert_array_equal(Sketch()(a[:, :100]), a[:, :100].reshape(-1).numpy())


def test_forecasts_reach_over_no_change_of_transformer() -> None:
    rng = np.random.default_rng(0)
    residuals = np.cumsum(rng.standard_normal((10, 4)), 0)
    weights, active = rng.uniform(0.5, 2, 10), np.repeat([0.0, 1.0], [6, 4])
    trace = Trace(
        gram=residuals @ residuals.T,
        weights=weights,
        places={"step": np.arange(10.0)},
        active=active,
        stacks={},
        timesteps=10,
        first=0,
        passes=1,
    )
    found = solve(trace)

    def error(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for t in set(range(10)) - set(chosen):
            before = [step for step in chosen if step < t and active[step] == active[t]][-2:]
            line = taylor(before, t, order=1)
            forecast = sum(w * residuals[step] for w, step in zip(line, before, strict=True))
            total += weights[t] * float(np.sum((residuals[t] - forecast) ** 2))
        return total

    assert sorted(found) == [6, 7, 8, 9]
    for count, (_, chosen) in found.items():
        forced = {0, 1, 5, 6, 7, 9}
        others = [
            tuple(sorted(forced | set(more)))
            for more in combinations(sorted(set(range(10)) - forced), count - len(forced))
        ]
        assert error(chosen) == pytest.approx(min(map(error, others)), rel=1e-5)


def test_a_plan_in_the_words_of_cache_dit(planned: Any) -> None:
    plan = planned[3]
    found = plan.to_cache_dit()
    mask = found["cache_config"]["steps_computation_mask"]
    assert [i for i, one in enumerate(mask) if one] == list(plan.full)
    assert len(mask) == found["cache_config"]["num_inference_steps"] == STEPS


def test_cache_dit_computes_the_steps_of_a_plan() -> None:
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    pipe, prompts, call = tiny_pipe("flux")
    plan = vitfold.plan_steps(pipe, prompts[:1], steps=STEPS, full=6, seeds=1, **call)
    found, calls = plan.to_cache_dit(), [0] * 5
    for i, (block, _) in enumerate(plan.stacks["transformer"].blocks(pipe.transformer)):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(**found["cache_config"]),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(**found["calibrator_config"]),
    )
    try:
        assert torch.isfinite(draw(pipe, prompts[0], call)).all()
    finally:
        cache_dit.disable_cache(pipe)
    assert calls == [STEPS, 6, 6, 6, 6]  # its first block runs at every step
