"""A graph becomes a bundle only if the engine computes it: how far it may be from the reference, and no farther."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.artifacts.bundle import MAIN
from vitfold.engines.session import Ends, Session
from vitfold.errors import EngineError
from vitfold.images import ImageSet
from vitfold.model import Array, Model
from vitfold.ops.protocol import Port
from vitfold.pipeline.verifying import (
    CEILING,
    FLOAT_ERROR,
    bound_for,
    run_float,
    simulation,
    verification_images,
    verify,
)


class Given(Session):
    """An engine that answers what it was given."""

    def __init__(self, answer: Array) -> None:
        port, answered = Port(name="pixel_values", shape=(-1, -1, -1)), Port(name="logits", shape=(-1,))
        super().__init__({MAIN: Ends((port,), (answered,))})
        self._answer = answer

    @property
    def engine(self) -> str:
        return "given 1.0"

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        return (self._answer,)


@pytest.mark.parametrize(("factor", "accepted"), [(1.0, True), (1 + 5e-5, True), (1.001, False), (1.01, False)])
def test_a_float_graph_equals_the_reference(tiny_model: Callable[..., Model], factor: float, accepted: bool) -> None:
    folded = pipeline.optimize(tiny_model(), merge=2)
    pixels = verification_images(folded.model, None)
    session = Given(run_float(folded, pixels) * np.float32(factor))
    if accepted:
        assert verify(folded, pixels, session).median == pytest.approx(factor - 1, abs=2e-6)
        return
    with pytest.raises(EngineError, match="differs from the reference"):
        verify(folded, pixels, session)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_answer_that_is_no_number_is_refused(tiny_model: Callable[..., Model], wrong: float) -> None:
    folded = pipeline.optimize(tiny_model())
    pixels = verification_images(folded.model, None)
    answer = run_float(folded, pixels)
    answer[0, 0] = wrong
    with pytest.raises(EngineError, match="NaN or infinite"):
        verify(folded, pixels, Given(answer))


@pytest.mark.parametrize(
    ("rounding", "bound"), [(0.0, FLOAT_ERROR), (1e-6, FLOAT_ERROR), (0.01, 0.03), (0.04, CEILING), (3.0, CEILING)]
)
def test_the_bound_follows_what_rounding_costs_under_a_ceiling(rounding: float, bound: float) -> None:
    assert bound_for(rounding) == pytest.approx(bound)


def test_thirteen_per_cent_of_error_never_pass(tiny_model: Callable[..., Model], photos: ImageSet) -> None:
    """What products that saturate come to."""
    folded = pipeline.optimize(tiny_model(), quant="w8a8", target="portable")
    done = pipeline.calibrate_plan(folded, photos)
    pixels = verification_images(done.model, photos)
    with simulation(done) as session:
        expected = session(pixels)
    assert verify(done, pixels, Given(expected)).median == 0.0
    with pytest.raises(EngineError, match="differs from the reference by 1.3e-01"):
        verify(done, pixels, Given(expected * np.float32(1.13)))
