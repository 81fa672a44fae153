"""Parts hand tensors on by name, in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitfold.engines import DEFAULT, Ends, Port, Session, check_ends, open_graph
from vitfold.errors import BundleError, EngineError


def write_part(
    folder: Path, name: str, operator: str, inputs: tuple[str, str], output: str, stated: Any = ("batch", 4)
) -> Path:
    """Write output = operator(inputs) over rows of four numbers; `stated` is what the graph says of its output."""
    helper = pytest.importorskip("onnx.helper")
    import onnx

    ends = {end: helper.make_tensor_value_info(end, 1, ["batch", 4]) for end in inputs}
    ends[output] = helper.make_tensor_value_info(output, 1, stated)
    node = helper.make_node(operator, list(inputs), [output])
    graph = helper.make_graph([node], name, [ends[end] for end in dict.fromkeys(inputs)], [ends[output]])
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


@pytest.fixture
def graphs(tmp_path: Path) -> dict[str, Path]:
    """keep: memory = x + given; use: y = x * memory."""
    return {
        "keep": write_part(tmp_path, "keep", "Add", ("x", "given"), "memory"),
        "use": write_part(tmp_path, "use", "Mul", ("x", "memory"), "y"),
    }


@pytest.fixture
def session(graphs: dict[str, Path]) -> Any:
    with open_graph(graphs, DEFAULT, threads=1) as opened:
        yield opened


def rows(value: float, batch: int = 2) -> np.ndarray:
    return np.full((batch, 4), value, np.float32)


def test_a_part_reads_what_another_wrote(session: Session) -> None:
    assert [port.name for port in session.parts["use"].inputs] == ["x", "memory"]
    session.bind({"x": rows(2), "given": rows(1)})
    session.run("keep")
    session.run("use")
    np.testing.assert_array_equal(session.fetch()["y"], rows(6))
    np.testing.assert_array_equal(session.fetch("memory", "y")["memory"], rows(3))


def test_kept_tensors_stay_where_they_are(session: Session) -> None:
    session.bind({"x": rows(2), "given": rows(1)})
    session.run("keep")
    place = session._tensors["memory"]
    session.bind({"x": rows(5)})
    session.run("keep")
    assert session._tensors["memory"] is place
    np.testing.assert_array_equal(place, rows(6))


def test_ends_are_kept_under_other_names(session: Session) -> None:
    session.bind({"x": rows(2), "given": rows(1)})
    session.run("keep", {"memory": "first"})
    session.bind({"given": rows(8)})
    session.run("keep", {"memory": "second"})
    for name, expected in (("first", 6), ("second", 20), ("first", 6)):
        session.run("use", {"memory": name})
        np.testing.assert_array_equal(session.fetch()["y"], rows(expected))


def test_a_part_may_write_what_it_reads(session: Session) -> None:
    """Never in one run into the same memory."""
    session.bind({"x": rows(2), "memory": rows(3)})
    for expected in (6, 12, 24):
        session.run("use", {"y": "memory"})
        np.testing.assert_array_equal(session.fetch()["memory"], rows(expected))


def test_batches_may_change(session: Session) -> None:
    for batch in (2, 5, 1, 2):
        session.bind({"x": rows(2, batch), "given": rows(1, batch)})
        session.run("keep")
        session.run("use")
        np.testing.assert_array_equal(session.fetch()["y"], rows(6, batch))


def test_what_nobody_wrote_is_an_error(session: Session) -> None:
    session.bind({"x": rows(2)})
    with pytest.raises(EngineError, match="nothing is bound to 'memory'"):
        session.run("use")
    with pytest.raises(EngineError, match="nothing has run"):
        session.fetch("memory")


def test_graphs_have_the_ends_that_they_are_meant_to_have(session: Session, graphs: dict[str, Path]) -> None:
    x, memory, y = (Port(name=name, shape=(4,)) for name in ("x", "memory", "y"))
    check_ends(session, {"use": Ends((x, memory), (y,))}, graphs)
    for ends, said in (
        (Ends((x,), (y,)), "it has the ends memory, x"),
        (Ends((x, memory), (Port(name="y", shape=(5,)),)), r"its y has the shape \('batch', 4\)"),
    ):
        with pytest.raises(BundleError, match=rf"use.onnx is not the graph that the plan needs: {said}"):
            check_ends(session, {"use": ends}, graphs)


@pytest.mark.parametrize("stated", [("other", 4), ("batch", "width"), ("batch", 5), ("batch", 2**40)])
def test_shapes_that_a_graph_leaves_open_or_states_wrongly_are_found(tmp_path: Path, stated: Any) -> None:
    path = write_part(tmp_path, "open", "Add", ("x", "x"), "y", stated)
    with open_graph(path, DEFAULT, threads=1) as session:
        np.testing.assert_array_equal(session(rows(2)), rows(4))


def test_a_graph_that_states_an_output_beyond_memory_is_refused(tmp_path: Path) -> None:
    path = write_part(tmp_path, "wrong", "Add", ("x", "x"), "y", (2**30, 2**30, 2**30))
    with pytest.raises(EngineError, match="ONNX Runtime"), open_graph(path, DEFAULT, threads=1) as session:
        session(rows(2))
