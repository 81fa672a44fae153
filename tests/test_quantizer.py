"""Quantizers as values: two implementations that agree, slow oracles of the papers, and the file that holds them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from vitfold.errors import BundleError
from vitfold.ops.simulate import fake_quantize
from vitfold.quantizer import EXPONENTIALS, Log, Quantizer, QuantParams, Shifted, Twin, Uniform, load_quant_params

VALUES = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-20, 2.0**10, width=32)


def uniform(scale=0.1, zero_point=0, low=-128, high=127, axis=None) -> Uniform:
    return Uniform(scale=np.array(scale), zero_point=np.array(zero_point), low=low, high=high, axis=axis)


def twin(rule="sign", inner=0.001, outer=0.1, high=127) -> Twin:
    below = uniform(inner, low=-high - 1, high=0) if rule == "sign" else uniform(inner, low=0, high=high)
    return Twin(rule=rule, inner=below, outer=uniform(outer, low=0, high=high))


@st.composite
def uniforms(draw, shape=()):
    bits = draw(st.integers(2, 8))
    low = draw(st.sampled_from([0, -(2 ** (bits - 1)), 3]))
    high = low + 2**bits - 1
    axis = draw(st.sampled_from([None, *range(-len(shape), len(shape))])) if shape else None
    size = () if axis is None else (shape[axis],)
    scale = draw(hnp.arrays(np.float32, size, elements=SCALES))
    zero_point = draw(hnp.arrays(np.int32, size, elements=st.integers(low, high)))
    return Uniform(scale=scale, zero_point=zero_point, low=low, high=high, axis=axis)


@st.composite
def problems(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
    return draw(hnp.arrays(np.float32, shape, elements=VALUES)), draw(uniforms(shape))


def in_torch(x, quantizer: Quantizer):
    return fake_quantize(torch.from_numpy(np.array(x, np.float32)), quantizer).numpy()


@settings(deadline=None)
@given(problem=problems())
def test_uniform_quantizers_in_numpy_and_torch_are_one(problem):
    x, quantizer = problem
    np.testing.assert_array_equal(quantizer(x), in_torch(x, quantizer))


@settings(deadline=None)
@given(problem=problems())
def test_a_uniform_quantizer_is_the_nearest_code(problem):
    """Slow oracle: of all codes that there are, none is nearer; and what it returns it keeps."""
    x, quantizer = problem
    found = quantizer(x)
    scale = np.broadcast_to(quantizer._aligned(x)[0], x.shape)
    zero_point = np.broadcast_to(quantizer._aligned(x)[1], x.shape)
    assert found.dtype == np.float32
    for place in np.ndindex(*x.shape):
        codes = np.arange(quantizer.low, quantizer.high + 1)
        levels = (codes - zero_point[place]) * np.float64(scale[place])
        least = np.abs(levels - x[place]).min()
        # Half a unit in the last place of x / scale may turn a tie.
        assert abs(found[place] - np.float64(x[place])) <= least + 1e-6 * max(abs(x[place]), scale[place])
        assert np.isclose(levels, found[place], rtol=1e-6, atol=0).any()
    np.testing.assert_array_equal(quantizer(found), found)
    np.testing.assert_array_equal(quantizer.values(quantizer.codes(x)), found)


def test_ties_go_to_the_even_code():
    np.testing.assert_array_equal(uniform(1.0).codes(np.float32([0.5, 1.5, 2.5, -0.5, -1.5])), [0, 2, 2, 0, -2])


@settings(deadline=None)
@given(
    x=hnp.arrays(np.float32, 12, elements=VALUES),
    offset=hnp.arrays(np.float32, 3, elements=VALUES),
    inner=uniforms(),
)
def test_a_shifted_quantizer_is_shift_round_shift_back(x, offset, inner):
    rows = x.reshape(2, 2, 3)
    quantizer = Shifted(offset=offset, inner=inner)
    np.testing.assert_array_equal(quantizer(rows), in_torch(rows, quantizer))
    for place in np.ndindex(2, 2, 3):
        alone = inner(np.array([rows[place] + offset[place[-1]]], np.float32))[0] - offset[place[-1]]
        assert quantizer(rows)[place] == np.float32(alone)


def twin_oracle(x: float, quantizer: Twin) -> float:
    """PTQ4ViT's definition, one number at a time: a flag picks the range, the other bits index it."""
    first = (
        x < 0 if quantizer.rule == "sign" else x < np.float32((quantizer.inner.high + 1) * float(quantizer.inner.scale))
    )
    chosen = quantizer.inner if first else quantizer.outer
    code = round(float(np.float32(x) / np.float32(chosen.scale)))
    return min(max(code, chosen.low), chosen.high) * float(chosen.scale)


@settings(deadline=None)
@given(
    rule=st.sampled_from(["sign", "magnitude"]),
    bits=st.integers(3, 8),
    inner=st.floats(2.0**-13, 1.0, width=32),
    x=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20),
)
def test_a_twin_quantizer_is_the_papers(rule, bits, inner, x):
    quantizer = twin(rule, inner=inner, outer=2.0 ** (1 - bits), high=2 ** (bits - 1) - 1)
    values = np.array(x, np.float32)
    values = np.append(np.abs(values) if rule == "magnitude" else values, np.float32(quantizer.threshold))
    found = quantizer(values)
    np.testing.assert_array_equal(found, in_torch(values, quantizer))
    np.testing.assert_allclose(found, [twin_oracle(float(v), quantizer) for v in values], rtol=1e-6, atol=1e-9)
    assert quantizer.bits == bits


@given(x=st.lists(st.floats(0, 1, width=32), min_size=2, max_size=2))
def test_a_twin_quantizer_keeps_the_order(x):
    quantizer = twin("magnitude", inner=2.0**-11, outer=2.0**-7)
    low, high = quantizer(np.sort(np.array(x, np.float32)))
    assert low <= high


def test_twin_ranges_are_disjoint():
    """Small numbers carry nothing of the outer range, which the released code's sum of both does."""
    quantizer = twin("magnitude", inner=2.0**-9, outer=2.0**-7)
    small = np.float32([0.0, 2.0**-9, 0.1, 0.2])
    np.testing.assert_array_equal(quantizer(small), quantizer.inner(small))
    large = np.float32([0.25, 0.5, 0.99])
    np.testing.assert_array_equal(quantizer(large), quantizer.outer(large))


def log_oracle(x: float, quantizer: Log) -> float:
    """The level of least distance in the logarithm; RepQ's form of a power of the base sqrt 2."""
    scale, levels = float(quantizer.scale), []
    for q in range(2**quantizer.bits):
        if quantizer.root != 2:
            levels.append(scale * (2.0 ** (1 / quantizer.root)) ** -q)
        else:
            levels.append(scale * 2.0 ** -math.ceil(q / 2) * (math.sqrt(2) if q % 2 else 1.0))
    return min(
        filter(None, levels), key=lambda level: abs(math.log(level) - math.log(max(x + quantizer.offset, 1e-30)))
    ) - (quantizer.offset)


@settings(deadline=None)
@given(
    root=st.sampled_from([1, 2, 37 / 12, 37 / 50]),
    offset=st.sampled_from([0.0, 0.17]),
    bits=st.integers(2, 8),
    scale=st.floats(0.25, 1.0, width=32),
    x=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20),
)
def test_a_logarithmic_quantizer_is_the_nearest_power(root, offset, bits, scale, x):
    quantizer = Log(scale=np.array(scale), bits=bits, root=root, offset=offset)
    values = np.array(x, np.float32)
    steps = -root * np.log2(np.maximum(values + np.float32(offset), 1e-30).astype(np.float64) / scale)
    values = values[np.abs(steps - np.floor(steps) - 0.5) > 1e-3]
    found, close = quantizer(values), 1e-6 if offset else 0.0
    np.testing.assert_allclose(found, [log_oracle(float(v), quantizer) for v in values], rtol=1e-5, atol=close)
    np.testing.assert_allclose(in_torch(values, quantizer), found, rtol=1e-6, atol=close)


UNIFORM = {"scale": np.array(0.1), "zero_point": np.array(0), "low": 0, "high": 255}
PER_HEAD = uniform([0.1, 0.2], [0, 0], axis=1)
WRONG = {
    "zero scale": lambda: Uniform(**{**UNIFORM, "scale": np.array(0.0)}),
    "negative scale": lambda: Uniform(**{**UNIFORM, "scale": np.array(-1.0)}),
    "NaN scale": lambda: Uniform(**{**UNIFORM, "scale": np.array(np.nan)}),
    "infinite scale": lambda: Uniform(**{**UNIFORM, "scale": np.array(np.inf)}),
    "a scale that underflows": lambda: Uniform(**{**UNIFORM, "scale": np.array(1e-60)}),
    "a vector without an axis": lambda: Uniform(**{**UNIFORM, "scale": np.ones(2), "zero_point": np.zeros(2)}),
    "a number with an axis": lambda: Uniform(**UNIFORM, axis=0),
    "another shape of zero points": lambda: Uniform(**{**UNIFORM, "scale": np.ones(2)}, axis=0),
    "zero point below": lambda: Uniform(**{**UNIFORM, "zero_point": np.array(-1)}),
    "zero point above": lambda: Uniform(**{**UNIFORM, "zero_point": np.array(256)}),
    "no codes": lambda: Uniform(**{**UNIFORM, "high": 0}),
    "twin with a zero point": lambda: Twin(rule="sign", inner=uniform(), outer=uniform(zero_point=3)),
    "twin with an axis": lambda: Twin(rule="sign", inner=PER_HEAD, outer=PER_HEAD),
    "log of a vector": lambda: Log(scale=np.ones(2), bits=4, root=1),
    "log of zero": lambda: Log(scale=np.array(0.0), bits=4, root=1),
    "log of a negative offset": lambda: Log(scale=np.array(1.0), bits=4, root=1, offset=-0.1),
    "a shift per tensor": lambda: Shifted(offset=np.array(1.0), inner=uniform()),
    "an infinite shift": lambda: Shifted(offset=np.array([np.inf]), inner=uniform()),
    "a shift of an axis": lambda: Shifted(offset=np.ones(2), inner=PER_HEAD),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_quantizer_is_refused(case):
    with pytest.raises(ValueError):  # noqa: PT011
        WRONG[case]()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Twin(rule="other", inner=uniform(), outer=uniform()),
        lambda: Log(scale=np.array(1.0), bits=4, root=0),
        lambda: Log(scale=np.array(1.0), bits=0, root=1),
        lambda: uniform([0.1], [0], axis="rows"),
    ],
    ids=["rule", "root", "bits", "axis"],
)
def test_choices_are_checked_without_types(make):
    with pytest.raises(ValueError):  # noqa: PT011
        make()


def test_properties():
    assert [uniform(low=0, high=2**bits - 1).bits for bits in range(2, 9)] == list(range(2, 9))
    assert uniform().symmetric
    assert not uniform(zero_point=1).symmetric
    assert Shifted(offset=np.ones(3), inner=uniform(low=-8, high=7)).bits == 4
    assert uniform(np.float64(0.1)).scale.dtype == np.float32
    assert EXPONENTIALS(np.float32([1.0]))[0] == 1.0
    assert EXPONENTIALS(np.float32([0.0]))[0] == 0.0


ALL: dict[str, Quantizer] = {
    "blocks.0.attn.qkv.x": uniform(0.02, 7, 0, 255),
    "blocks.0.attn.qkv.w": uniform(np.linspace(0.1, 0.2, 5), np.arange(5), axis=0),
    "blocks.0.attn.softmax": twin("magnitude"),
    "blocks.0.mlp.fc2.x": twin("sign"),
    "blocks.1.attn.softmax": Log(scale=np.array(0.9), bits=6, root=2),
    "blocks.1.mlp.fc2.x": Log(scale=np.array(2.5), bits=4, root=37 / 20, offset=0.17),
    "head.x": Shifted(offset=np.linspace(-1, 1, 7), inner=uniform(0.3)),
}


def test_a_saved_file_gives_the_same_back(tmp_path):
    params = QuantParams(ALL)
    params.save(tmp_path / "q.safetensors")
    found = load_quant_params(tmp_path / "q.safetensors")
    assert list(found) == sorted(ALL)
    assert found.digest() == params.digest()
    for site, quantizer in ALL.items():
        assert type(found[site]) is type(quantizer)
        x = np.abs(np.random.default_rng(0).standard_normal((5, 7))).astype(np.float32)
        np.testing.assert_array_equal(found[site](x), quantizer(x))
    found.save(tmp_path / "r.safetensors")
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "r.safetensors").read_bytes()


def test_no_quantizers_can_be_saved(tmp_path):
    QuantParams({}).save(tmp_path / "q.safetensors")
    assert len(load_quant_params(tmp_path / "q.safetensors")) == 0


CHANGED: dict[str, Quantizer | None] = {
    "scale": uniform(0.021, 7, 0, 255),
    "zero point": uniform(0.02, 8, 0, 255),
    "codes": uniform(0.02, 7, 0, 254),
    "kind": Log(scale=np.array(0.02), bits=8, root=2),
    "gone": None,
}


@pytest.mark.parametrize("case", CHANGED)
def test_the_digest_tells_every_change(case):
    site, change = "blocks.0.attn.qkv.x", CHANGED[case]
    changed = {name: quantizer for name, quantizer in ({**ALL, site: change}).items() if quantizer is not None}
    assert QuantParams(changed).digest() != QuantParams(ALL).digest()
    assert QuantParams(dict(reversed(ALL.items()))).digest() == QuantParams(ALL).digest()


def test_the_digest_tells_the_finer_parts():
    def digest(quantizer):
        return QuantParams({"s": quantizer}).digest()

    quantizers = [
        twin("sign"),
        replace(twin("sign"), rule="magnitude"),
        replace(twin("sign"), inner=uniform(0.002, low=-128, high=0)),
        Log(scale=np.array(1.0), bits=4, root=1),
        Log(scale=np.array(1.0), bits=4, root=2),
        Log(scale=np.array(1.0), bits=5, root=1),
        Log(scale=np.array(1.0), bits=5, root=1, offset=0.5),
        Shifted(offset=np.zeros(3), inner=uniform()),
        Shifted(offset=np.ones(3), inner=uniform()),
        uniform([0.1, 0.2], [0, 0], axis=0),
        uniform([0.1, 0.2], [0, 0], axis=1),
    ]
    assert len({digest(quantizer) for quantizer in quantizers}) == len(quantizers)


def test_only_a_uniform_quantizer_is_asked_for():
    params = QuantParams(ALL)
    assert params.uniform("blocks.0.attn.qkv.x") is ALL["blocks.0.attn.qkv.x"]
    assert params.uniform("nowhere.x") is None
    with pytest.raises(TypeError, match=r"head\.x has a Shifted"):
        params.uniform("head.x")


ENTRY = {"kind": "uniform", "name": "s", "low": 0, "high": 255, "axis": None}
ARRAYS = {"s.scale": np.array(0.1, np.float32), "s.zero_point": np.array(0, np.int32)}
DAMAGED = {
    "no metadata": None,
    "no JSON": "{",
    "a list": "[]",
    "a number": "3",
    "an entry that is no object": json.dumps({"s": 3}),
    "unknown kind": json.dumps({"s": {**ENTRY, "kind": "other"}}),
    "missing array": json.dumps({"s": {**ENTRY, "name": "t"}}),
    "missing key": json.dumps({"s": {"kind": "uniform", "name": "s"}}),
    "impossible codes": json.dumps({"s": {**ENTRY, "high": -3}}),
    "codes of text": json.dumps({"s": {**ENTRY, "high": "many"}}),
    "an axis of text": json.dumps({"s": {**ENTRY, "axis": "rows"}}),
    "a twin of nothing": json.dumps({"s": {"kind": "twin", "rule": "sign", "inner": ENTRY}}),
    "a twin of logs": json.dumps(
        {"s": {"kind": "twin", "rule": "sign", "inner": {**ENTRY, "kind": "log", "bits": 3, "root": 1}, "outer": ENTRY}}
    ),
    "a twin by another rule": json.dumps({"s": {"kind": "twin", "rule": "other", "inner": ENTRY, "outer": ENTRY}}),
    "another root": json.dumps({"s": {**ENTRY, "kind": "log", "bits": 3, "root": 0}}),
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, case):
    head = DAMAGED[case]
    path = tmp_path / "q.safetensors"
    save_file(ARRAYS, path, metadata=None if head is None else {"quantizers": head})
    with pytest.raises(BundleError, match=r"q\.safetensors holds no quantizers"):
        load_quant_params(path)


def test_what_is_no_file_of_quantizers_is_named(tmp_path):
    path = tmp_path / "q.safetensors"
    with pytest.raises(BundleError, match="holds no quantizers"):
        load_quant_params(path)
    QuantParams(ALL).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BundleError, match="holds no quantizers"):
        load_quant_params(path)
