"""Accuracy and fidelity by hand-made outputs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vitfold.bench.fidelity import Fidelity, answers, measure_fidelity
from vitfold.model.spec import sigmoid

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


YES = np.array([[2.0, -1.0], [-3.0, 0.5], [1.0, 1.0]], np.float32)


def test_labels_that_are_each_a_yes_or_no_agree_by_their_signs() -> None:
    other = np.array([[2.0, 1.0], [-3.0, 0.5], [1.0, -1.0]], np.float32)
    found = measure_fidelity(other, targets=None, reference=YES, reference_name="x", head="multi_label")
    assert found.agreement == pytest.approx(4 / 6)
    moved = 1 / (1 + np.exp(-1.0)) - 1 / (1 + np.exp(1.0))  # from -1 to 1, and back
    assert found.probability_error == pytest.approx(2 * moved / 6)
    assert (found.top1, found.relative_error) == (None, None)


def test_one_logit_can_disagree() -> None:
    """A softmax over one class is one, whatever the logit is."""
    logits = np.array([[3.0], [-2.0], [0.5], [-0.1]], np.float32)
    found = measure_fidelity(-logits, targets=None, reference=logits, reference_name="x", head="multi_label")
    assert found.agreement == 0.0
    assert found.cosine is None, "of single numbers a cosine is a sign"
    assert found.probability_error is not None
    assert found.probability_error > 0.3


def test_a_regression_is_compared_by_its_numbers() -> None:
    ages = np.array([[10.0], [30.0], [60.0]], np.float32)
    found = measure_fidelity(ages + 2, targets=[0, 0, 0], reference=ages, reference_name="x", head="regression")
    assert found.relative_error == pytest.approx(6 / 100)
    assert found.sqnr_db == pytest.approx(10 * np.log10(4600 / 12))
    assert (found.top1, found.agreement, found.probability_error) == (None, None, None)


def test_answers_are_one_class_or_every_label_above_one_half() -> None:
    assert answers(YES, "multi_label").tolist() == [[True, False], [False, True], [True, True]]
    assert answers(YES, "single_label").tolist() == [[True, False], [False, True], [True, False]]


@pytest.mark.parametrize("x", [-1000.0, -3.0, 0.0, 3.0, 1000.0])
def test_sigmoids_do_not_overflow(x: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(np.array([x]))
    assert found[0] == pytest.approx(0.5 * (1 + np.tanh(x / 2)), abs=1e-12)


def test_the_dictionary_is_json_and_holds_every_figure() -> None:
    found = measure_fidelity(LOGITS, targets=[0] * 4, reference=LOGITS, reference_name="x", head="single_label")
    assert Fidelity(**json.loads(json.dumps(found.to_dict()))) == found
