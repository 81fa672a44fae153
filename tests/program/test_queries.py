"""Questions about a program that refitting asks."""

from __future__ import annotations

import pytest

from vitfold.architectures.programs import plain_program
from vitfold.program.queries import closing_linears, output_linear

BLOCKS = tuple((f"blocks.{block}.attn.proj", f"blocks.{block}.mlp.fc2") for block in range(2))


@pytest.mark.parametrize(
    "overrides", [{}, {"mlp": "swiglu"}, {"pool": "none", "outputs": 0, "output": "last_hidden_state"}]
)
def test_layers_that_write_to_the_stream_are_those_that_close_attention_and_mlp(overrides, tiny_model) -> None:
    assert closing_linears(plain_program(tiny_model(**overrides).spec)) == BLOCKS


def test_a_scale_in_between_is_no_layer(tiny_model) -> None:
    program = plain_program(tiny_model(layer_scale=True).spec)
    assert closing_linears(program) == ((None, None), (None, None))


def test_the_output_is_made_by_the_classifier_or_by_something_else(tiny_model) -> None:
    assert output_linear(plain_program(tiny_model().spec)) == "head"
    dense = tiny_model(pool="none", outputs=0, output="last_hidden_state")
    assert output_linear(plain_program(dense.spec)) is None
