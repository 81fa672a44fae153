"""The table of targets: complete, and consistent with itself."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from vitfold.errors import TargetError
from vitfold.target import TARGETS, Bias, Gather, Scatter, find_target


@pytest.mark.parametrize("name", TARGETS)
def test_every_row_is_found_by_its_name_and_uses_known_words(name):
    target = find_target(name)
    assert target.name == name
    assert target.gather in get_args(Gather)
    assert target.scatter_add in get_args(Scatter)
    assert target.linear_bias in get_args(Bias)
    assert target.opset >= 17, "LayerNormalization must be one operator"
    assert target.why
    assert json.loads(json.dumps(target.to_dict())) == target.to_dict()


def test_no_target_scatters():
    """TensorRT rejects a ScatterElements that adds, and on CPUs the one-hot product is faster."""
    assert {target.scatter_add for target in TARGETS.values()} == {"one_hot"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cpus", "unknown target 'cpus'; did you mean cpu"),
        ("portabel", "did you mean portable"),
        ("", "known: cpu, portable"),
    ],
)
def test_an_unknown_target_offers_the_nearest(name, message):
    with pytest.raises(TargetError, match=message):
        find_target(name)
