"""Weights on their grid: never worse than rounding to nearest, measured with the moments that they are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantizing import affine, calibrating
from vitfold.architectures.programs import forward
from vitfold.images import ImageSet, batches
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.quant import METHODS
from vitfold.quant.moments import collect_moments, round_weights
from vitfold.quant.ranges import symmetric_uniform
from vitfold.quant.rounding import ROUNDINGS, descend, gptq, halving, ridge_weight
from vitfold.quantizer import Uniform
from vitfold.recipe import MergeRecipe


def correlated(rows: int, width: int, seed: int, rank: int = 4) -> torch.Tensor:
    """Rows of a few directions with noise, as tokens are."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, width))
    return torch.from_numpy((x + 0.3 * draw.standard_normal((rows, width))).astype(np.float32))


def random_weight(outputs: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((outputs, inputs)).astype(np.float32))


def grid_of(weight: torch.Tensor, bits: int) -> Uniform:
    return symmetric_uniform(weight.abs().amax(1), bits, axis=0)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, moments: torch.Tensor) -> float:
    """E |(W - W') x|^2 from second moments."""
    difference = (rounded - weight).double()
    return float((difference @ moments.double() * difference).sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("block", [5, 128])
def test_gptq_is_not_above_nearest_rounding(bits, seed, block):
    x, weight = correlated(400, 24, seed), random_weight(10, 24, seed)
    moments = x.T @ x / len(x)
    quantizer = grid_of(weight, bits)
    found = gptq(weight, quantizer, moments, damping=0.01, block=block)
    nearest = fake_quantize(weight, quantizer)
    assert output_error(weight, found, moments) < 0.8 * output_error(weight, nearest, moments)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_returns_numbers_of_the_grid_exactly(bits):
    x, weight = correlated(300, 24, 0), random_weight(10, 24, 0)
    scale = np.linspace(0.01, 1.2, 10).astype(np.float32)
    quantizer = Uniform(scale=scale, zero_point=np.arange(10) % 4, low=0, high=2**bits - 1, axis=0)
    for each in (quantizer, grid_of(weight, bits)):
        found = gptq(weight, each, x.T @ x, damping=0.01)
        np.testing.assert_array_equal(fake_quantize(found, each), found)


def test_gptq_equals_nearest_rounding_where_inputs_are_uncorrelated():
    weight = random_weight(10, 24, 0)
    quantizer = grid_of(weight, 4)
    moments = torch.diag(torch.linspace(0.5, 2, 24))
    np.testing.assert_array_equal(gptq(weight, quantizer, moments, damping=0.01), fake_quantize(weight, quantizer))


def test_gptq_stands_dead_and_copied_inputs():
    """Channels that are always zero, or equal to another: the moments are singular."""
    x, weight = correlated(300, 24, 0), random_weight(10, 24, 0)
    x[:, 3] = 0
    x[:, 5] = x[:, 6]
    moments = x.T @ x / len(x)
    quantizer = grid_of(weight, 4)
    found = gptq(weight, quantizer, moments, damping=0.01)
    assert torch.isfinite(found).all()
    assert output_error(weight, found, moments) < output_error(weight, fake_quantize(weight, quantizer), moments)
    np.testing.assert_array_equal(found[:, 3], fake_quantize(weight, quantizer)[:, 3])


def test_gptq_equals_a_slow_oracle():
    """Algorithm 1 without blocks and without the Cholesky factor: the inverse Hessian shrinks column by column."""
    x, weight = correlated(300, 8, 0), random_weight(5, 8, 0)
    moments = (x.T @ x / len(x)).double()
    quantizer = grid_of(weight, 4)
    order = torch.argsort(moments.diagonal(), descending=True)
    hessian = moments[order][:, order] + 0.01 * moments.diagonal().mean() * torch.eye(8)
    left, result = weight[:, order].double(), torch.zeros(5, 8)
    for i in range(8):
        inverse = torch.linalg.inv(hessian[i:, i:])
        result[:, i] = fake_quantize(left[:, i : i + 1].float(), quantizer)[:, 0]
        error = (left[:, i] - result[:, i]) / inverse[0, 0]
        left[:, i:] -= torch.outer(error, inverse[0])
    expected = torch.empty_like(result)
    expected[:, order] = result
    np.testing.assert_allclose(gptq(weight, quantizer, moments.float(), damping=0.01), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", sorted(ROUNDINGS))
def test_every_rounding_returns_numbers_of_the_grid_exactly(bits, name):
    x, weight = correlated(300, 24, 0), random_weight(10, 24, 0)
    scale = np.linspace(0.01, 1.2, 10).astype(np.float32)
    quantizer = Uniform(scale=scale, zero_point=np.arange(10) % 4, low=0, high=2**bits - 1, axis=0)
    for each in (quantizer, grid_of(weight, bits)):
        found = ROUNDINGS[name](weight, each, x.T @ x, damping=0.01)
        np.testing.assert_array_equal(fake_quantize(found, each), found)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_halves_err_less_than_nearest_rounding(bits, seed):
    x, weight = correlated(400, 24, seed), random_weight(10, 24, seed)
    moments = x.T @ x / len(x)
    quantizer = grid_of(weight, bits)
    nearest = output_error(weight, fake_quantize(weight, quantizer), moments)
    assert output_error(weight, halving(weight, quantizer, moments, damping=0.01), moments) < 0.8 * nearest


def test_a_descent_takes_the_best_single_move_until_there_is_none():
    """Against trying every move of every column by one."""
    x, weight = correlated(300, 6, 1), random_weight(4, 6, 1)
    moments = (x.T @ x / len(x)).double()
    quantizer = grid_of(weight, 3)
    start = fake_quantize(weight, quantizer)
    found = descend(weight, start, quantizer, moments, steps=100)
    for row in range(4):
        codes = quantizer.codes(start.numpy())[row].astype(float)

        def error(codes, row=row):
            d = weight[row].double().numpy() - codes * float(quantizer.scale[row])
            return float(d @ moments.numpy() @ d)

        while True:
            moves = [codes + t * np.eye(6)[j] for j in range(6) for t in (-1, 1)]
            allowed = [m for m in moves if m.min() >= quantizer.low and m.max() <= quantizer.high]
            best = min(allowed, key=error)
            if error(best) >= error(codes) - 1e-12:
                break
            codes = best
        np.testing.assert_allclose(found[row], codes * quantizer.scale[row], rtol=1e-6)


def test_halves_equal_a_slow_oracle():
    """Half of what is left to its grid with every direction tried, the rest solved for; few columns, two rows."""
    x, weight = correlated(200, 4, 2), random_weight(2, 4, 2)
    moments = (x.T @ x / len(x)).double()
    quantizer = grid_of(weight, 4)
    left = weight.double().clone()
    lam = 0.01 * moments.diagonal().mean()
    expected = torch.empty(2, 4)
    for now, rest in (([0, 1], [2, 3]), ([2], [3]), ([3], [])):
        part = left[:, now].float()
        expected[:, now] = descend(part, fake_quantize(part, quantizer), quantizer, moments[now][:, now], steps=100)
        error = left[:, now] - expected[:, now]
        if rest:
            inverse = torch.linalg.inv(moments[rest][:, rest] + lam * torch.eye(len(rest)))
            left[:, rest] += error @ moments[now][:, rest] @ inverse
    np.testing.assert_allclose(halving(weight, quantizer, moments, damping=0.01), expected, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_ridge_makes_up_for_rounded_inputs(seed):
    x, weight = correlated(500, 24, seed), random_weight(10, 24, seed)
    x_hat = fake_quantize(x, symmetric_uniform(x.abs().max(), 3))
    moments, cross = (x_hat.T @ x_hat).double(), (x.T @ x_hat).double()

    def loss(w):
        return float((x @ weight.T - x_hat @ w.T).square().sum())

    found = ridge_weight(weight, moments, cross, damping=0.01)
    assert loss(found) < 0.97 * loss(weight)
    best = ridge_weight(weight, moments, cross, damping=0.0)
    assert loss(best) <= loss(found)
    exact = torch.linalg.lstsq(x_hat.double(), x.double() @ weight.T.double()).solution.T
    np.testing.assert_allclose(best, exact, rtol=1e-3, atol=1e-3)


def test_ridge_is_an_identity_for_exact_inputs():
    x, weight = correlated(500, 24, 0), random_weight(10, 24, 0)
    moments = (x.T @ x).double()
    np.testing.assert_array_equal(ridge_weight(weight, moments, moments, damping=0.01), weight)


def test_moments_are_those_of_the_stream_and_biases_take_the_mean_error(tiny_model, photos: ImageSet):
    """Sums over all batches; after rounding, the mean output of a layer on rounded inputs is the float one's."""
    model, merge = tiny_model(without=["blocks.0.mlp.fc1.bias"]), MergeRecipe(r=(3, 2))
    seen: dict[str, list[torch.Tensor]] = {}

    class Inputs(Simulate):
        def linear(self, layer, x, rows=""):
            seen.setdefault(layer, []).append(x.reshape(-1, x.shape[-1]))
            return super().linear(layer, x)

    with torch.inference_mode():
        for group in batches(photos, model.preprocess, batch=6):
            forward(Inputs(model.params, {}), model.spec, merge, torch.from_numpy(group.pixel_values))
    rows = {layer: torch.cat(parts) for layer, parts in seen.items()}
    quantizers = {}
    for layer, x in rows.items():
        quantizers[f"{layer}.x"] = affine(x.numpy(), 0, 15)
        quantizers[f"{layer}.w"] = grid_of(torch.from_numpy(model.params[f"{layer}.weight"]), 4)
    moments = collect_moments(*calibrating(model, merge, photos), quantizers, batch=4)
    layer = "blocks.0.mlp.fc1"
    one, x = moments[f"{layer}.x"], rows[layer]
    x_hat = fake_quantize(x, quantizers[f"{layer}.x"])
    assert one.count == len(x) == 6 * 14
    for found, expected in (
        (one.exact, x.sum(0)),
        (one.rounded, x_hat.sum(0)),
        (one.square, x_hat.T @ x_hat),
        (one.cross, x.T @ x_hat),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for method in (METHODS["vitfold"], METHODS["mse"]):
        changed = round_weights(model.params, quantizers, moments, method)
        for name, inputs in rows.items():
            w_hat = torch.from_numpy(changed[f"{name}.weight"])
            np.testing.assert_array_equal(fake_quantize(w_hat, quantizers[f"{name}.w"]), w_hat)
            inputs_hat = fake_quantize(inputs, quantizers[f"{name}.x"])
            found = inputs_hat @ w_hat.T + torch.from_numpy(changed[f"{name}.bias"])
            bias = torch.from_numpy(model.params.get(f"{name}.bias", np.zeros(len(w_hat), np.float32)))
            exact = inputs @ torch.from_numpy(model.params[f"{name}.weight"]).T + bias
            torch.testing.assert_close(found.mean(0), exact.mean(0), rtol=1e-3, atol=1e-4)
