"""Accuracy and fidelity by hand-made outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vitfold.bench.fidelity import Fidelity, measure_fidelity

LOGITS = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 2.0], [5.0, 0.0, 1.0]], np.float32)


def test_top1_and_agreement_are_ratios() -> None:
    other = LOGITS.copy()
    other[0] = [9.0, 0.0, 0.0]
    found = measure_fidelity(other, targets=[1, 0, 2, 0], reference=LOGITS, reference_name="x", head="single_label")
    assert found.top1 == pytest.approx(0.75)
    assert found.agreement == pytest.approx(0.75)
    assert found.images == 4
    assert found.top5 is None


def test_top5_needs_more_than_five_classes() -> None:
    logits = np.eye(8, dtype=np.float32) + np.arange(8, dtype=np.float32) * 0.01
    found = measure_fidelity(
        logits, targets=[0, 0, 0, 0, 0, 0, 0, 0], reference=None, reference_name=None, head="single_label"
    )
    # Row i ranks class i first, then 7, 6, 5, 4, 3: class 0 is among the best five in row 0 only.
    assert found.top5 == pytest.approx(1 / 8)
    assert found.cosine is None


def test_equal_outputs_have_cosine_one_and_no_noise() -> None:
    found = measure_fidelity(LOGITS, targets=None, reference=LOGITS, reference_name="x", head="single_label")
    assert found.cosine == pytest.approx(1.0)
    assert found.sqnr_db is None
    assert found.top1 is None


def test_sqnr_is_in_decibels() -> None:
    found = measure_fidelity(LOGITS * 1.1, targets=None, reference=LOGITS, reference_name="x", head="features")
    assert found.sqnr_db == pytest.approx(20.0, abs=1e-3)
    assert found.cosine == pytest.approx(1.0)
    assert found.agreement is None


def test_the_dictionary_is_json_and_holds_every_figure() -> None:
    found = measure_fidelity(LOGITS, targets=[0] * 4, reference=LOGITS, reference_name="x", head="single_label")
    assert Fidelity(**json.loads(json.dumps(found.to_dict()))) == found
