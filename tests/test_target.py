"""The table of targets: complete, and consistent with itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest

from vitfold.errors import TargetError
from vitfold.target import TARGETS, ActivationType, Bias, Gather, QuantizedProduct, Scatter, cpu_target, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_found_by_its_name_and_uses_known_words(name):
    target = find_target(name)
    assert target.name == name
    assert target.gather in get_args(Gather)
    assert target.scatter_add in get_args(Scatter)
    assert target.linear_bias in get_args(Bias)
    assert target.activation_type in get_args(ActivationType)
    assert target.quantized_product in get_args(QuantizedProduct)
    assert target.weight_bits in (7, 8)
    assert not target.symmetric or target.activation_type in ("int8", "float8e4m3fn")
    assert target.contrib or target.quantized_product != "matmul_integer_to_float"
    assert target.opset >= 17, "LayerNormalization must be one operator"
    assert target.why
    assert json.loads(json.dumps(target.to_dict())) == target.to_dict()


def test_weights_of_seven_bits_cannot_saturate_pairs_in_int16():
    """Vpmaddubsw adds two products of uint8 and int8 in int16."""
    worst = [255 * code for code in (-(2**6), 2**6 - 1)]
    assert 2 * min(worst) >= -(2**15)
    assert 2 * max(worst) < 2**15
    assert 2 * 255 * (2**7 - 1) >= 2**15, "8 bits would"
    for name in ("cpu", "cpu-avx2"):
        assert TARGETS[name].weight_bits == 7


@pytest.mark.parametrize(
    ("sets", "machine", "name"),
    [
        (["avx2", "avx512f", "avx512_vnni", "amx_int8"], "x86_64", "cpu-amx"),
        (["avx2", "avx512_vnni"], "x86_64", "cpu-vnni"),
        (["avx2", "avx_vnni"], "AMD64", "cpu-vnni"),
        (["avx2", "fma", "avx512f"], "x86_64", "cpu-avx2"),
        ([], "x86_64", "cpu-avx2"),
        (["asimd", "asimddp", "i8mm"], "aarch64", "cpu-arm"),
        ([], "arm64", "cpu-arm"),
    ],
)
def test_the_quantized_cpu_target_follows_the_instruction_sets(sets, machine, name):
    assert cpu_target(sets, machine).name == name


def test_no_target_scatters():
    """TensorRT rejects a ScatterElements that adds, and on CPUs the one-hot product is faster."""
    assert {target.scatter_add for target in TARGETS.values()} == {"one_hot", "masked_sum"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpus", "unknown target 'cpus'; did you mean cpu"),
        ("portabel", "did you mean portable"),
        ("", "known: cpu, cpu-amx, .*, portable"),
        ("cpu-vni", "did you mean cpu-vnni"),
    ],
)
def test_an_unknown_target_offers_the_nearest(name, message):
    with pytest.raises(TargetError, match=message):
        find_target(name)


def test_single_lowering_choices_can_be_changed():
    changed = find_target("cpu:gather=one_hot,linear_bias=add")
    assert (changed.gather, changed.linear_bias) == ("one_hot", "add")
    assert changed.name == "cpu:gather=one_hot,linear_bias=add"
    assert (
        replace(changed, gather=TARGETS["cpu"].gather, linear_bias=TARGETS["cpu"].linear_bias, name="cpu")
        == (TARGETS["cpu"])
    )
    assert TARGETS["cpu"].gather != "one_hot", "the table itself must not change"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpus:gather=one_hot", "unknown target 'cpus'; did you mean cpu"),
        ("cpu:gathr=one_hot", "unknown lowering choice 'gathr' .*did you mean gather"),
        ("cpu:scatter_add=scatter_nd", "scatter_add cannot be 'scatter_nd' .*did you mean scatter_elements"),
        ("cpu:gather", "gather cannot be ''"),
        ("cpu:opset=3", "unknown lowering choice 'opset'"),
    ],
)
def test_an_unknown_lowering_choice_offers_the_nearest(name, message):
    with pytest.raises(TargetError, match=message):
        find_target(name)
