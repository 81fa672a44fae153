"""The sampling loop: against diffusers' own, against itself, and graphs against torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diffusing import ORIGIN, SCHEDULE, build_module, build_tiny_dit
from vitfold.diffusion import METHODS, find_method
from vitfold.diffusion.compare import SamplingConfig, diffuse, draw, settled
from vitfold.diffusion.compression import Compression, compress, network_of_step, states_along
from vitfold.diffusion.opening import open_parts, prepare_tokens
from vitfold.diffusion.sampling import content_filter
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.errors import EngineError, RecipeError
from vitfold.model import Array, DiTModel
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.quant import METHODS as QUANT_METHODS
from vitfold.sources.diffusers import translate

ASKED: dict[str, Any] = {"labels": (0, 2, 1), "seed": 3, "steps": 7, "sampler": "ddim", "guidance": 2.5, "batch": 2}


@pytest.fixture(scope="module")
def model() -> DiTModel:
    return build_tiny_dit()


def drawn(
    model: DiTModel,
    method: str = "none",
    *,
    engine: str = "torch",
    compression: Compression | None = None,
    **changed: Any,
) -> Any:
    found, asked = find_method(method), SamplingConfig(**{**ASKED, **changed})
    tokens = prepare_tokens(model, found, asked.steps)
    with open_parts(model, found, tokens=tokens, compression=compression, engine=engine) as executor:
        return draw(model, executor, settled(model, executor, found, asked), asked)


def by_diffusers(module: Any, scheduler: Any, label: int, seed: int, guidance: float) -> Array:
    """One image by diffusers' module and scheduler, in a loop of its own."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, 16, 16, generator=generator)
    labels = torch.tensor([label, 3])
    with torch.inference_mode():
        for t in scheduler.timesteps:
            with_class, without = module(x.repeat(2, 1, 1, 1), t.expand(2), labels, return_dict=False)[0].chunk(2)
            step = scheduler.step(without + guidance * (with_class - without), t, x)
            x = step.prev_sample
    return x.numpy()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_samples_as_diffusers_does(sampler: str) -> None:
    import diffusers

    from vitfold.diffusion.schedulers import SAMPLERS

    module = build_module()
    model = translate(module, SCHEDULE, origin=ORIGIN)
    found = drawn(model, sampler=sampler).samples
    for i, label in enumerate(ASKED["labels"]):
        scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(SCHEDULE)
        scheduler.set_timesteps(7)
        expected = by_diffusers(module, scheduler, label, 3 + i, 2.5)
        np.testing.assert_allclose(found[i : i + 1], expected, atol=1e-3 * np.abs(expected).max())


def test_an_image_depends_on_its_own_seed_alone(model: DiTModel) -> None:
    for sampler in ("ddim", "ddpm"):
        together = drawn(model, sampler=sampler).samples
        alone = drawn(model, sampler=sampler, labels=(2,), seed=4).samples
        np.testing.assert_allclose(together[1:2], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_learned_variance_is_not_guided(sampler: str, guidance: float) -> None:
    """Oracle: the steps of diffusers' DiTPipeline, which guides the first channels and leaves the others alone."""
    import torch

    from vitfold.diffusion.schedulers import build_scheduler

    module = build_module(out_channels=2)
    found = drawn(translate(module, SCHEDULE, origin=ORIGIN), sampler=sampler, guidance=guidance).samples
    for i, label in enumerate(ASKED["labels"]):
        scheduler = build_scheduler(sampler, SCHEDULE, 7, learned_sigma=True)
        generator = torch.Generator().manual_seed(3 + i)
        x = torch.randn(1, 1, 16, 16, generator=generator)
        for t in scheduler.timesteps:
            with torch.inference_mode():
                both = module(x.repeat(2, 1, 1, 1), t.expand(2), torch.tensor([label, 3]), return_dict=False)[0]
            eps, rest = both[:, :1], both[:, 1:]
            cond, uncond = eps.chunk(2)
            noise = torch.cat([uncond + guidance * (cond - uncond), rest[:1]], dim=1)
            if sampler == "ddim":
                x = scheduler.step(noise[:, :1], t, x).prev_sample
            else:
                x = scheduler.step(noise, t, x, generator=generator).prev_sample
        np.testing.assert_allclose(found[i : i + 1], x.numpy(), rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_the_first_block_decides_for_every_image_by_itself(model: DiTModel) -> None:
    """At this threshold the three images differ in the steps that they compute."""
    threshold, steps = "first-block:1.0", 12
    labels = ASKED["labels"]
    alone = [drawn(model, threshold, labels=(label,), seed=3 + i, steps=steps) for i, label in enumerate(labels)]
    together = drawn(model, threshold, batch=3, steps=steps)
    for i, one in enumerate(alone):
        np.testing.assert_allclose(together.samples[i : i + 1], one.samples, rtol=1e-5, atol=1e-5)
    assert len({one.full_steps for one in alone}) > 1
    assert together.full_steps == max(one.full_steps for one in alone)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers
def test_a_solver_with_noise_of_its_own_draws_from_the_seed(model: DiTModel) -> None:
    noisy = replace(model, schedule={**SCHEDULE, "algorithm_type": "sde-dpmsolver++"})
    first, again = (drawn(noisy, sampler="dpm++").samples for _ in range(2))
    np.testing.assert_array_equal(first, again)
    alone = drawn(noisy, sampler="dpm++", labels=(2,), seed=4).samples
    np.testing.assert_allclose(first[1:2], alone, rtol=1e-3, atol=1e-3)


def test_tokens_that_are_all_renewed_are_exactly_new(model: DiTModel) -> None:
    found = drawn(model, "tokencache:0:2:2")
    assert found.reused_steps > 0
    np.testing.assert_allclose(found.samples, drawn(model).samples, rtol=1e-4, atol=1e-5)


def test_samples_that_are_not_finite_are_an_error(model: DiTModel) -> None:
    broken = replace(
        model, params={**model.params, "head.proj.weight": model.params["head.proj.weight"] * np.float32(3e38)}
    )
    with pytest.raises(EngineError, match="NaN or infinite.*--sampler ddim"):
        drawn(broken)


@pytest.mark.parametrize(
    "method",
    [
        *(
            "stack:5",
            "taylor:4:2",
            "chebyshev:4:1",
            "fora:4",
            "guidance:3",
            "tokencache:1",
            "taylor-modules:4",
            "foca:5",
        ),
        *("first-block:0", "seacache:0", "speca:0", "dmd:9", "spectrum:9"),
    ],
)
def test_computing_every_step_changes_nothing(model: DiTModel, method: str) -> None:
    steps = 7 if method.endswith(":0") else 3
    expected = drawn(model, steps=steps)
    found = drawn(model, method, steps=steps)
    assert (found.full_steps, found.reused_steps) == (steps, 0)
    np.testing.assert_allclose(found.samples, expected.samples, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["first-block:10", "teacache:1000", "seacache:1000", "speca:1000"])
def test_a_threshold_that_nothing_reaches_computes_first_two_steps_and_last(model: DiTModel, method: str) -> None:
    found = drawn(model, method)
    assert (found.full_steps, found.reused_steps) == (3, 4)


@pytest.mark.parametrize("method", ["teacache:0.6", "seacache:0.6", "speca:2:1"])
def test_rules_decide_for_every_image_by_itself(model: DiTModel, method: str) -> None:
    alone = [drawn(model, method, labels=(label,), seed=3 + i) for i, label in enumerate(ASKED["labels"])]
    together = drawn(model, method, batch=3)
    for i, one in enumerate(alone):
        np.testing.assert_allclose(together.samples[i : i + 1], one.samples, rtol=1e-5, atol=1e-5)
    assert 3 < together.full_steps < 7


def test_modules_are_forecast_each_for_itself(model: DiTModel) -> None:
    """With held values it is FORA; one line through all that is added differs from lines through modules."""
    lines, held = drawn(model, "taylor-modules:3:1"), drawn(model, "fora:3")
    assert lines.full_steps == held.full_steps
    assert lines.kept_bytes > held.kept_bytes
    exact = drawn(model).samples
    assert not np.allclose(lines.samples, drawn(model, "taylor:3:1").samples, atol=1e-4)
    assert np.isfinite(lines.samples).all()
    assert np.abs(lines.samples - exact).max() > 1e-4


def test_frequencies_that_are_noise_are_left_out() -> None:
    scheduler = build_scheduler("ddim", SCHEDULE, 7)
    clear, noisy = (content_filter(8, scheduler, t)[0] for t in (0, 900))
    for matrix in (clear, noisy):
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
        assert np.linalg.eigvalsh(matrix).max() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-5)  # the mean passes
    finest = np.indices((8, 8)).sum(0).reshape(-1) % 2 * 2.0 - 1
    assert np.abs(noisy @ finest).max() < 0.2 * np.abs(clear @ finest).max()


def test_without_guidance_one_row_per_image_runs(model: DiTModel) -> None:
    found = drawn(model, "guidance:3", guidance=1.0)
    np.testing.assert_array_equal(found.samples, drawn(model, guidance=1.0).samples)


def test_the_stack_method_adds_the_kept_residual(model: DiTModel) -> None:
    """Oracle: the same by hand, from the whole step's own parts."""
    import torch

    from vitfold.architectures.dit import blocks, condition, embed, head, modulations
    from vitfold.model.dit import class_rows, timestep_embedding
    from vitfold.ops.run import Run

    ops, spec = Run(model.params), model.spec
    draw_image = np.random.default_rng(0)
    images = [torch.from_numpy(draw_image.standard_normal((2, 1, 16, 16)).astype(np.float32)) for _ in range(2)]
    t_freq = torch.from_numpy(timestep_embedding(spec, np.array([900, 900])))
    given = condition(ops, spec, t_freq, torch.from_numpy(class_rows(spec, np.array([0, 3]))))
    vectors = modulations(ops, spec, given)
    residual = blocks(ops, spec, embed(ops, images[0]), vectors, range(2)) - embed(ops, images[0])
    expected = head(ops, spec, embed(ops, images[1]) + 0.5 * residual, vectors)
    with open_parts(model, find_method("taylor:3:1")) as executor:
        executor.bind({"given": given.numpy(), "image": images[0].numpy(), "residual.0": np.zeros_like(residual)})
        executor.run("full", names={"residual": "residual.1"})
        executor.bind({"image": images[1].numpy(), "weights": np.array([[[7.0], [0.5]]], np.float32)})
        executor.run("resume")
        np.testing.assert_allclose(executor.fetch()["prediction"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [f"{name}:4" if name in ("solved", "fitted", "dpcache") else name for name in METHODS])
def test_graphs_draw_what_torch_draws(model: DiTModel, name: str) -> None:
    graph, eager = (drawn(model, name, engine=engine) for engine in ("onnxruntime", "torch"))
    np.testing.assert_allclose(graph.samples, eager.samples, rtol=1e-3, atol=1e-3)
    assert (graph.full_steps, graph.kept_bytes) == (eager.full_steps, eager.kept_bytes)


def test_fewer_steps_stand_beside_every_method(model: DiTModel) -> None:
    methods = [find_method(text) for text in ("stack:3", "guidance:2", "none", "stack:3")]
    rows = diffuse(model, methods, SamplingConfig(**ASKED), engine="torch", trials=1)
    assert [row.name for row in rows] == ["none", "stack:3", "none, 4 steps", "guidance:2", "none, 6 steps"]
    first, second = rows[0].to_dict(), rows[1].to_dict()
    assert (first["psnr_db"], first["speedup"]) == (None, 1.0)
    assert np.isfinite(second["psnr_db"])
    assert (second["full_steps"], second["reused_steps"]) == (4, 3)
    assert second["frechet"] is None
    assert second["frechet_reason"]


@pytest.mark.parametrize("method", ["none", "stack:2", "first-block", "fora"])
def test_merged_graphs_draw_what_torch_draws(model: DiTModel, method: str) -> None:
    merged = compress(model, r=5)
    graph, eager = (drawn(model, method, engine=engine, compression=merged) for engine in ("onnxruntime", "torch"))
    np.testing.assert_allclose(graph.samples, eager.samples, rtol=1e-3, atol=1e-3)
    assert not np.allclose(eager.samples, drawn(model, method).samples, atol=1e-3)


def test_integer_graphs_draw_what_the_simulation_draws(model: DiTModel) -> None:
    """One step apart by rounding at most: over many steps a flipped code spreads."""
    quantized = compress(model, quant="w8a8", steps=7)
    graph, simulated = (
        drawn(model, "none", engine=engine, compression=quantized, steps=1) for engine in ("onnxruntime", "torch")
    )
    exact = drawn(model, steps=1).samples
    scale = float(np.abs(exact).max())
    assert np.abs(graph.samples - simulated.samples).max() < 0.02 * scale
    assert 0 < np.abs(simulated.samples - exact).mean() < 0.1 * scale


def error_of_states(model: DiTModel, compression: Compression) -> float:
    """Relative error of a step's prediction along a trajectory that calibration has not seen."""
    network, states = network_of_step(model, 0), states_along(model, 24, r=0, steps=9, guidance=1.5, seed=5)
    assert compression.params is not None
    rounded = Simulate(compression.params, compression.quantizers or {})
    with torch.inference_mode():
        pairs = [
            (network.run(rounded, one.inputs), network.run(Run(model.params), one.inputs)) for one in states.batches(8)
        ]
    found, exact = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("method", QUANT_METHODS)
def test_a_diffusion_transformer_takes_every_method(model: DiTModel, method: str) -> None:
    found = compress(model, quant="w8a8", method=method, steps=7)
    assert found.suffix == ", w8a8"
    assert {site for site in found.quantizers or {} if site.endswith(".w")} == {
        f"blocks.{block}.{layer}.w" for block in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert error_of_states(model, found) < 0.1


def test_four_bits_need_rounding_by_second_moments(model: DiTModel) -> None:
    nearest, rounded = (
        error_of_states(model, compress(model, quant="w4a8", method=method, steps=7)) for method in ("minmax", "gptq")
    )
    assert rounded < 0.9 * nearest


def test_what_cannot_be_compressed(model: DiTModel) -> None:
    for changed, said in (
        ({"r": 9}, "--merge 9 is out of range; 16 tokens can merge 0 to 8"),
        ({"r": -1}, "--merge -1"),
    ):
        with pytest.raises(RecipeError, match=said):
            compress(model, **changed)
    with pytest.raises(RecipeError, match="w4a4 does not run: integer kernels take activations of 8 bits"):
        compress(model, quant="w4a4")


def test_a_compressed_sampler_stands_beside_the_plain_one(model: DiTModel) -> None:
    rows = diffuse(
        model,
        [find_method("stack:3")],
        SamplingConfig(**ASKED),
        compression=compress(model, r=4),
        engine="torch",
        trials=1,
    )
    assert [row.name for row in rows] == ["none", "none, r=4", "stack:3, r=4", "none, 4 steps"]
    assert rows[1].psnr_db is not None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"labels": ()}, "no class"),
        ({"labels": (3,)}, "class 3 is out of range; this model has 3 classes: 0 to 2"),
        ({"labels": (-1,)}, "class -1 is out of range"),
        ({"steps": 0}, "--steps 0 is out of range"),
        ({"steps": 1001}, "1 to 1000"),
        ({"sampler": "ddem"}, "did you mean ddpm or ddim"),
        ({"batch": 0}, "--batch"),
        ({"guidance": 0.5}, "--guidance"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn(model: DiTModel, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        diffuse(model, [], SamplingConfig(**{**ASKED, **changed}), engine="torch", trials=1)
