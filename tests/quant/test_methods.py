"""What each published method is for shows on data that has the trouble it was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitfold.architectures.programs import forward
from vitfold.errors import RecipeError
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.quant import METHODS, QuantConstraints, QuantMethod, calibrate, find_method
from vitfold.quant.activations import activation_minimum
from vitfold.quant.attention import search_attention
from vitfold.quant.collect import AttentionSamples, LinearSamples
from vitfold.quant.linear import LinearProblem, search_linear
from vitfold.quant.ranges import LOG_STEPS, Grid, search_log
from vitfold.quant.sites import LinearSite
from vitfold.quantizer import Log, Quantizer, Shifted, Twin, Uniform
from vitfold.recipe import MergeRecipe, QuantRecipe


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32))


def heavy_tailed(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """GELU of Student's t with three degrees of freedom: a lump at zero and a long tail on one side."""
    x = np.random.default_rng(seed).standard_t(3, (rows, width))
    return torch.nn.functional.gelu(torch.from_numpy(x.astype(np.float32)))


def problem_of(x: torch.Tensor, bits: int, activation: str | None = None) -> LinearProblem:
    samples = LinearSamples(x=x, share=torch.ones(len(x), 1), low=x.amin(0), high=x.amax(0), grad=None)
    return LinearProblem(
        site=LinearSite(layer="l", activation=activation),
        samples=samples,
        weight=drawn(20, x.shape[1]) / 5,
        weight_bits=8,
        bits=bits,
        symmetric=False,
        uniform_only=False,
    )


def sqnr_db(exact: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum()))


def linear_sqnr_db(
    method: QuantMethod, problem: LinearProblem, x: torch.Tensor
) -> tuple[float, Mapping[str, Quantizer]]:
    """Of the layer's output on rows that the search has not seen."""
    found = search_linear(problem, method, preset=None)
    weight = fake_quantize(problem.weight, found["l.w"])
    return sqnr_db(x @ problem.weight.T, fake_quantize(x, found["l.x"]) @ weight.T), found


def test_the_table_names_every_method_once():
    assert list(METHODS) == [method.name for method in METHODS.values()]
    assert METHODS["ptq4vit"].gradients == "gauss-newton"
    assert METHODS["ptq4vit-paper"].gradients == "fisher"
    assert METHODS["vitfold"].gradients is None
    assert not METHODS["repq"].runs_softmax
    assert find_method("repq").to_dict()["equalize"] == "repq"
    with pytest.raises(RecipeError, match="ptq4vit"):
        find_method("ptq4vi")


def test_folds_beat_minmax_where_layer_norms_have_outlier_channels(tiny_model, photos, own_cache):
    """A few channels fifty times as large, as large as the others in what the weights make of them."""
    model = tiny_model(outputs=40)
    params = dict(model.params)
    for i in range(2):
        for norm, layer in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            channels = np.ones(32, np.float32)
            channels[[2, 11, 29]] = 50
            for part in ("weight", "bias"):
                params[f"blocks.{i}.{norm}.{part}"] = params[f"blocks.{i}.{norm}.{part}"] * channels
            params[f"blocks.{i}.{layer}.weight"] = params[f"blocks.{i}.{layer}.weight"] / channels
    model = model.with_params(model.spec, params)
    pixels = drawn(12, 3, 32, 32) * 0.3
    merge = MergeRecipe(r=())
    found = {}
    with torch.inference_mode():
        exact = forward(Run(model.params), model.spec, merge, pixels)
        for name in ("minmax", "repq", "smooth", "vitfold"):
            quant = QuantRecipe(weights=6, activations=6, method=name, attention=False)
            done = calibrate(model, merge, quant, photos, scheme=QuantConstraints(uniform_only=False))
            found[name] = sqnr_db(
                exact, forward(Simulate(done.model.params, done.quantizers), model.spec, merge, pixels)
            )
    for name in ("repq", "smooth", "vitfold"):
        assert found[name] > found["minmax"] + 3, found


@pytest.mark.parametrize("bits", [8, 6])
def test_twin_ranges_beat_one_symmetric_range_behind_gelu(bits):
    method = METHODS["ptq4vit"]
    problem = problem_of(torch.nn.functional.gelu(drawn(600, 48) - 1.5), bits, "gelu_erf")
    x = torch.nn.functional.gelu(drawn(600, 48, seed=1) - 1.5)
    plain, _ = linear_sqnr_db(replace(method, twin_gelu=False), problem, x)
    twin, found = linear_sqnr_db(method, problem, x)
    quantizer = found["l.x"]
    assert isinstance(quantizer, Twin)
    assert quantizer.rule == "sign"
    assert quantizer.bits == bits
    assert float(quantizer.inner.scale) * quantizer.inner.low == pytest.approx(-0.169971, rel=1e-5)
    assert twin > plain + 3


def attention_of(seed: int = 0, keys: int = 30) -> AttentionSamples:
    """Sharp heads and blunt ones, whose operands have ranges of their own."""
    spread = torch.tensor([0.3, 1.0, 3.0]).reshape(1, 3, 1, 1)
    shapes = ((4, 3, 30, 16), (4, 3, keys, 16), (4, 3, keys, 16))
    q, k, v = (
        drawn(*s, seed=seed + i) * spread**p for i, (s, p) in enumerate(zip(shapes, (0.5, 0.5, 1.0), strict=True))
    )
    logits = q @ k.transpose(-1, -2) * 16**-0.5
    return AttentionSamples(q=q, k=k, v=v, logits=logits, grad_logits=None, grad_output=None)


def attention_sqnr_db(
    method: QuantMethod, bits: int, *, exact_operands: bool = False, uniform_only: bool = False, keys: int = 30
) -> tuple[float, Mapping[str, Quantizer]]:
    found = search_attention("a", attention_of(0, keys), bits, method, symmetric=False, uniform_only=uniform_only)
    kept = {"a.softmax": found["a.softmax"]} if exact_operands else found
    fresh = attention_of(7, keys)
    exact = fresh.logits.softmax(-1) @ fresh.v
    return sqnr_db(exact, Simulate({}, kept).attention("a", fresh.q, fresh.k, fresh.v, None)), found


@pytest.mark.parametrize("bits", [8, 6])
def test_twin_ranges_beat_one_symmetric_range_behind_softmax(bits):
    method = METHODS["ptq4vit"]
    plain, _ = attention_sqnr_db(replace(method, softmax=("uniform",)), bits, exact_operands=True)
    twin, found = attention_sqnr_db(method, bits, exact_operands=True)
    quantizer = found["a.softmax"]
    assert isinstance(quantizer, Twin)
    assert quantizer.bits == bits
    ratio = np.log2(float(quantizer.outer.scale) / float(quantizer.inner.scale))
    assert ratio == pytest.approx(round(ratio)), "a shift aligns the codes of both ranges"
    assert float(quantizer.outer.scale) == 2.0 ** -(bits - 1)
    assert twin > plain + 3


def test_logarithms_beat_uniform_codes_behind_softmax_with_four_bits():
    method = METHODS["repq"]
    plain, _ = attention_sqnr_db(METHODS["percentile"], 4, exact_operands=True, keys=200)
    logarithmic, found = attention_sqnr_db(method, 4, exact_operands=True, keys=200)
    assert isinstance(found["a.softmax"], Log)
    assert logarithmic > plain + 1


def test_vitfold_takes_the_best_softmax_that_there_is():
    method, found = METHODS["vitfold"], {}
    for kinds in (("uniform",), ("twin",), ("log_sqrt2",), method.softmax):
        found[kinds], _ = attention_sqnr_db(replace(method, softmax=kinds), 4, exact_operands=True)
    assert found[method.softmax] >= max(found.values()) - 0.5
    _, executed = attention_sqnr_db(method, 4, uniform_only=True)
    assert all(isinstance(q, Uniform) and q.axis is None for q in executed.values())


def test_a_range_per_head_beats_one_for_all_in_heads_of_small_numbers():
    method, samples = METHODS["vitfold"], attention_of()
    errors = []
    for one in (method, replace(method, head_scales=False)):
        found = search_attention("a", samples, 4, one, symmetric=False, uniform_only=False)
        q, k = (fake_quantize(x, found[f"a.{name}"]) for name, x in (("q", samples.q), ("k", samples.k)))
        assert found["a.q"].scale.shape == ((3,) if one.head_scales else ())  # type: ignore[union-attr]
        errors.append((q @ k.transpose(-1, -2) / 4 - samples.logits).square().mean((0, 2, 3)))
    assert float(errors[0][0]) < 0.5 * float(errors[1][0])
    assert float(errors[0].sum()) < float(errors[1].sum())


@pytest.mark.parametrize("seed", range(3))
def test_a_fixed_noise_helps_heavy_tails(seed):
    method = METHODS["noisy"]
    problem, x = problem_of(heavy_tailed(600, 48, seed), 6), heavy_tailed(600, 48, seed + 10)
    plain, _ = linear_sqnr_db(replace(method, noise=False), problem, problem.samples.x)
    noisy, found = linear_sqnr_db(method, problem, problem.samples.x)
    assert isinstance(found["l.x"], Shifted)
    assert noisy >= plain, "no noise at all is one of the candidates"
    plain, _ = linear_sqnr_db(replace(method, noise=False), problem, x)
    noisy, _ = linear_sqnr_db(method, problem, x)
    assert noisy > plain, "on unseen rows too"


def test_gradients_decide_which_error_counts():
    """Rows whose output nobody reads may be clipped."""
    x = drawn(400, 16)
    x[:40] *= 12
    grad = torch.ones(400, 20)
    grad[:40] = 0
    problem = problem_of(x, 4)
    weighted = replace(problem, samples=replace(problem.samples, grad=grad))
    method = replace(METHODS["ptq4vit"], twin_gelu=False)
    plain, careful = (float(search_linear(p, method, preset=None)["l.x"].scale) for p in (problem, weighted))
    assert careful < 0.5 * plain


@pytest.mark.parametrize(("bits", "least"), [(4, 2.0), (6, 0.5)])
def test_a_searched_base_beats_the_best_uniform_range_behind_gelu(bits, least):
    """AdaLog's logarithm of GELU + 0.17: on rows that the search has not seen, and uniform where that is better."""
    method, x = METHODS["adalog"], torch.nn.functional.gelu(drawn(800, 48) - 1.5)
    problem = problem_of(x, bits, activation="gelu_erf")
    fresh = torch.nn.functional.gelu(drawn(800, 48, seed=5) - 1.5)
    logarithmic, found = linear_sqnr_db(method, problem, fresh)
    uniform, _ = linear_sqnr_db(replace(method, log_gelu=False), problem, fresh)
    assert isinstance(found["l.x"], Log)
    assert found["l.x"].offset == pytest.approx(-activation_minimum("gelu_erf"))
    assert logarithmic > uniform + least
    steps = LOG_STEPS / found["l.x"].root
    assert steps == pytest.approx(round(steps))
    on_engines, plain = linear_sqnr_db(method, replace(problem, uniform_only=True), fresh)
    assert isinstance(plain["l.x"], Uniform)
    assert on_engines == pytest.approx(uniform)


def test_the_search_of_a_base_is_as_good_as_all_bases_and_scales():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 4

    def error(quantizer: Log) -> float:
        return float((fake_quantize(x, quantizer) - x).square().mean())

    found = search_log(1.0, 4, error)
    all_of_them = (
        Log(scale=np.array(scale, np.float32), bits=4, root=LOG_STEPS / q)
        for q in range(6, 30)
        for scale in np.linspace(0.6, 1.1, 26)
    )
    assert error(found) < 1.02 * min(map(error, all_of_them))


def test_a_searched_base_is_at_least_as_good_as_root_2_behind_softmax():
    method = METHODS["adalog"]
    for bits in (3, 4):
        searched, found = attention_sqnr_db(method, bits, exact_operands=True)
        fixed, _ = attention_sqnr_db(replace(method, softmax=("log_sqrt2",)), bits, exact_operands=True)
        assert isinstance(found["a.softmax"], Log)
        assert searched > fixed - 0.2


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_scales_behind_gelu_are_the_best_powers_of_two(bits):
    """Against every power of two that there is, by the error of the output."""
    x = torch.nn.functional.gelu(3 * drawn(300, 16))
    problem = problem_of(x, bits, activation="gelu_erf")
    method = replace(METHODS["ptq4vit-paper"], weight_grid=Grid(start=1.0, stop=1.0, count=1))
    quantizers = search_linear(problem, method, preset=None)
    found, weight = quantizers["l.x"], fake_quantize(problem.weight, quantizers["l.w"])
    assert isinstance(found, Twin)
    assert float(found.inner.scale) == pytest.approx(-activation_minimum("gelu_erf") / 2 ** (bits - 1))

    def error(power: int) -> float:
        outer = replace(found.outer, scale=np.array(np.ldexp(found.inner.scale, power)))
        return float(((fake_quantize(x, replace(found, outer=outer)) - x) @ weight.T).square().mean())

    power = math.log2(float(found.outer.scale) / float(found.inner.scale))
    assert power == min(range(-12, 12), key=error)


@pytest.mark.parametrize("name", METHODS)
def test_a_preset_range_is_kept(name):
    problem = problem_of(drawn(200, 16), 8)
    preset = Uniform(scale=np.array(0.03), zero_point=np.array(5), low=0, high=255)
    found = search_linear(problem, replace(METHODS[name], noise=False), preset=preset)
    assert found["l.x"] is preset
