"""A bias of attention per key, per head, per query: the same in every interpreter, against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from quantizing import affine, single, symmetric
from vitfold.engines.onnxruntime import session_options
from vitfold.model import Array
from vitfold.ops.count import Count
from vitfold.ops.emit import emit_ports, write_onnx
from vitfold.ops.half import Half
from vitfold.ops.protocol import Port
from vitfold.ops.record import Record
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.quantizer import EXPONENTIALS, Quantizer
from vitfold.target import TARGETS

B, H, N, M, K = 3, 2, 5, 7, 8
SHAPES = {
    "per key": (1, 1, 1, M),
    "per image": (B, 1, 1, M),
    "per head": (1, H, 1, M),
    "per query": (1, 1, N, M),
    "per head and query": (1, H, N, M),
    "whole": (B, H, N, M),
}
EXECUTED = [name for name, target in TARGETS.items() if target.engine != "simulation"]
ROUNDED = [name for name in EXECUTED if TARGETS[name].implied_quant != "fp8" and name != "tensorrt-fp16"]


@pytest.fixture(params=SHAPES)
def given(request: pytest.FixtureRequest) -> dict[str, Array]:
    draw = np.random.default_rng(0).standard_normal
    shapes = {"q": (B, H, N, K), "k": (B, H, M, K), "v": (B, H, M, K), "bias": SHAPES[request.param]}
    return {name: (2 * draw(shape)).astype(np.float32) for name, shape in shapes.items()}


def attend(
    q: Array, k: Array, v: Array, bias: Array, rounds: dict[str, Quantizer], *, reordered: bool = False
) -> Array:
    """softmax(q k^T / sqrt(K) + bias) v, element by element, with the operands rounded."""
    q, k, v = (rounds[f"a.{n}"](x) if rounds else x for n, x in (("q", q), ("k", k), ("v", v)))
    found = np.zeros((B, H, N, K))
    full = np.broadcast_to(bias, (B, H, N, M)).astype(np.float64)
    for b, h, n in np.ndindex(B, H, N):
        logits = np.array([q[b, h, n].astype(np.float64) @ k[b, h, m] for m in range(M)]) / np.sqrt(K) + full[b, h, n]
        powers = np.exp(logits - logits.max())
        if reordered:
            powers = EXPONENTIALS(powers.astype(np.float32)).astype(np.float64)
        weights = powers / powers.sum()
        if rounds and not reordered:
            weights = rounds["a.softmax"](weights.astype(np.float32))
        found[b, h, n] = weights @ v[b, h]
    return found


def rounding(given: dict[str, Array], name: str) -> dict[str, Quantizer]:
    range_of = symmetric if TARGETS[name].symmetric else affine
    found = {f"a.{n}": range_of(np.array([given[n].min(), given[n].max()])) for n in "qkv"}
    return {**found, "a.softmax": range_of(np.array([0.0, 1.0], np.float32))}


def emitted(given: dict[str, Array], name: str, quantizers: dict[str, Quantizer], path: Path) -> Array:
    bias = given["bias"]
    batch = "batch" if bias.shape[0] == B else 1
    inputs = [Port(name=n, shape=given[n].shape[1:], batch="batch") for n in "qkv"]
    graph = emit_ports(
        lambda ops, q, k, v, b: (ops.attention("a", q, k, v, b),),
        {},
        single(TARGETS[name]),
        quantizers,
        inputs=[*inputs, Port(name="bias", shape=bias.shape[1:], batch=batch)],
        outputs=("y",),
    )
    write_onnx(graph, path)
    options = session_options(1, literal=True)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, given)[0])


def test_run_record_and_half_take_every_bias(given):
    tensors = [torch.from_numpy(given[n]) for n in ("q", "k", "v", "bias")]
    expected = attend(**given, rounds={})
    seen: dict[str, torch.Tensor] = {}
    np.testing.assert_allclose(Run({}).attention("a", *tensors), expected, atol=1e-5)
    np.testing.assert_allclose(Record({}, seen.__setitem__).attention("a", *tensors), expected, atol=1e-5)
    assert list(seen) == ["a.q", "a.k", "a.v", "a.qk.y", "a.softmax", "a.av.y"]
    assert seen["a.qk.y"].shape == (B, H, N, M)
    logits = given["q"] @ given["k"].swapaxes(-1, -2) / np.sqrt(K) + given["bias"]
    np.testing.assert_allclose(seen["a.qk.y"], logits, atol=1e-5)
    np.testing.assert_allclose(Half({}, {}).attention("a", *tensors), expected, atol=0.02)


@pytest.mark.parametrize("reordered", [False, True])
def test_simulate_takes_every_bias(given, reordered):
    quantizers = rounding(given, "portable")
    tensors = [torch.from_numpy(given[n]) for n in ("q", "k", "v", "bias")]
    found = Simulate({}, quantizers, reordered=reordered).attention("a", *tensors).numpy()
    expected = attend(**given, rounds=quantizers, reordered=reordered)
    assert np.median(np.abs(found - expected)) < 1e-6, "a code may flip in a few places"
    assert np.abs(found - expected).max() < 0.05
    assert np.abs(found - attend(**given, rounds={})).max() > 1e-3, "it rounds"


def test_count_takes_every_bias_that_fits(given):
    q, k, v, bias = ((1, *given[n].shape[1:]) for n in ("q", "k", "v", "bias"))
    count = Count({})
    assert count.attention("a", q, k, v, bias) == (1, H, N, K)
    assert count.macs == 2 * H * N * M * K


@pytest.mark.parametrize("bias", [(1, H + 1, 1, M), (1, 1, N + 1, M), (1, 1, 1, M + 1), (1, 1, 1, 1)])
def test_a_bias_that_does_not_fit_is_a_bug(bias):
    with pytest.raises(ValueError, match="bias|broadcast"):
        Count({}).attention("a", (1, H, N, K), (1, H, M, K), (1, H, M, K), bias)


@pytest.mark.parametrize("name", EXECUTED)
def test_every_target_takes_every_bias(given, tmp_path, name):
    np.testing.assert_allclose(emitted(given, name, {}, tmp_path / "a.onnx"), attend(**given, rounds={}), atol=1e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_every_target_takes_every_bias_in_integers(given, tmp_path, name):
    quantizers = rounding(given, name)
    found = emitted(given, name, quantizers, tmp_path / "a.onnx")
    reordered = TARGETS[name].quantized_product == "integer"
    expected = attend(**given, rounds=quantizers, reordered=reordered)
    assert np.median(np.abs(found - expected)) < 1e-5, "a code may flip in a few places"
    assert np.abs(found - expected).max() < 0.05
