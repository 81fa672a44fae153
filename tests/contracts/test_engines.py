"""One contract for every engine: what `bind`, `run` and `fetch` promise. A new engine runs it by its row."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.bench.environment import installed_version
from vitfold.engines import ENGINES, MAIN, Session, engine_obstacle, find_engine, open_graph, open_session
from vitfold.engines.session import open_on
from vitfold.errors import EngineError
from vitfold.model import Array, Model


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model()


needs_openvino = pytest.mark.skipif(installed_version("openvino") is None, reason="openvino is not installed")
EXECUTING = [row.name for row in ENGINES.values() if row.executes]


@pytest.fixture(scope="module")
def bundle(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.save(pipeline.optimize(model, merge=3), tmp_path_factory.mktemp("engines") / "tiny.fold")


@pytest.fixture(scope="module")
def portable(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folded = pipeline.optimize(model, merge=3, target="portable")
    return pipeline.save(folded, tmp_path_factory.mktemp("engines") / "portable.fold")


@pytest.fixture(params=EXECUTING)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    obstacle = engine_obstacle(name)
    if obstacle is not None:
        pytest.skip(obstacle)
    if ENGINES[name].settings.get("compiled"):
        request.getfixturevalue("without_type_checks")  # torch.compile reads the code, and would read theirs
    return name


@pytest.fixture
def tolerance(engine: str) -> float:
    """How far outputs may differ, as a share of the largest; floats of 8 bits turn ties of matching, too."""
    return 0.15 if ENGINES[engine].narrow_floats else 1e-5


@pytest.fixture
def session(engine: str, bundle: Bundle, portable: Bundle) -> Iterator[Session]:
    with open_session(bundle if engine == "onnxruntime" else portable, engine=engine, threads=1) as opened:
        yield opened


def run(session: Session, pixels: Array) -> Array:
    """Run by hand; `session(pixels)` does the same."""
    session.bind({session.input: pixels})
    session.run()
    (output,) = session.fetch().values()
    return output


def assert_same(session: Session, found: Array, expected: Array) -> None:
    """Equal to the last bit; on a GPU, which adds merged tokens in any order, to the last but a few."""
    bound = 0.0 if session.reads_in_place else 1e-5
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound * np.abs(expected).max())


def test_an_engine_is_a_session_and_says_its_version(session: Session) -> None:
    assert isinstance(session, Session)
    name, version = session.engine.split(maxsplit=1)
    assert name in ENGINES
    (given,), (returned,) = session.parts[MAIN].inputs, session.parts[MAIN].outputs
    assert (given.name, given.shape, given.batch) == ("pixel_values", (3, 32, 32), "batch")
    assert returned.name == "logits"
    assert version[0].isdigit()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_output_is_that_of_the_reference(
    session: Session,
    model: Model,
    batch: int,
    random_images: Callable[..., Array],
    run_torch: Callable[..., Array],
    tolerance: float,
) -> None:
    pixels = random_images(model.spec, batch)
    expected = run_torch(model, pixels, (3, 3))
    np.testing.assert_allclose(run(session, pixels), expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_equal_input_gives_equal_output(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 3)
    assert_same(session, run(session, pixels), run(session, pixels))
    assert_same(session, run(session, pixels), session(pixels))


def test_names_that_the_graph_lacks_are_refused(session: Session, model: Model, random_images: Any) -> None:
    with pytest.raises(EngineError, match="no input 'image'; it has pixel_values"):
        session.bind({"image": random_images(model.spec, 1)})


def test_what_was_fetched_belongs_to_the_caller(
    session: Session, model: Model, random_images: Callable[..., Array]
) -> None:
    first = run(session, random_images(model.spec, 2, seed=1))
    kept = first.copy()
    run(session, random_images(model.spec, 2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_an_image_does_not_depend_on_its_neighbours(
    session: Session, model: Model, random_images: Callable[..., Array], tolerance: float
) -> None:
    pixels = random_images(model.spec, 4)
    together = run(session, pixels)
    alone = np.concatenate([run(session, pixels[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=tolerance, atol=tolerance)


def test_input_need_not_be_contiguous(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 4)
    assert_same(session, run(session, pixels[::2]), run(session, np.ascontiguousarray(pixels[::2])))


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_a_wrong_shape_says_the_right_one(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises((EngineError, TypeError), match="32"):
        session.bind({session.input: np.zeros(shape, np.float32)})


def test_a_closed_session_says_so(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 1)
    run(session, pixels)
    session.close()
    for step in (lambda: session.bind({session.input: pixels}), session.run, session.fetch):
        with pytest.raises(EngineError, match="closed"):
            step()
    session.close()


def test_batch_sizes_may_alternate(
    session: Session, model: Model, random_images: Callable[..., Array], tolerance: float
) -> None:
    pixels = random_images(model.spec, 4)
    together = run(session, pixels)
    for size in (1, 2, 3, 4, 1):
        np.testing.assert_allclose(run(session, pixels[:size]), together[:size], rtol=tolerance, atol=tolerance)


def test_input_is_read_where_it_lies(
    session: Session, engine: str, model: Model, random_images: Callable[..., Array]
) -> None:
    if not session.reads_in_place:
        pytest.skip("bind copies to the GPU")
    first, second = random_images(model.spec, 2, seed=1), random_images(model.spec, 2, seed=2)
    expected = run(session, second)
    session.bind({session.input: first})
    first[:] = second
    session.run()
    np.testing.assert_array_equal(session.fetch()["logits"], expected)


def test_an_unknown_engine_offers_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="onnxruntime"):
        open_session(bundle, engine="onnxrt")


@pytest.mark.parametrize("engine", [name for name, row in ENGINES.items() if "provider" in row.settings])
def test_a_provider_that_is_not_built_in_is_refused_with_the_cure(bundle: Bundle, engine: str) -> None:
    import onnxruntime

    provider = ENGINES[engine].settings["provider"]
    if provider in onnxruntime.get_available_providers():
        pytest.skip(f"{provider} is here")
    with pytest.raises(EngineError, match=rf"no {provider}, only .*CPUExecutionProvider; ") as caught:
        open_session(bundle, engine=engine)
    assert engine_obstacle(engine) == str(caught.value)


def test_every_row_says_how_it_is_opened() -> None:
    from typing import get_args

    from vitfold.engines.session import session_class
    from vitfold.target import TARGETS, EngineName

    assert list(get_args(EngineName)) == EXECUTING
    own = {row.name for row in ENGINES.values() if row.like is None or row.narrow_floats}
    assert {target.engine for target in TARGETS.values()} == own
    for name in EXECUTING:
        row = find_engine(name)
        written_for = name if name in own else row.like
        assert issubclass(session_class(row), Session)
        assert TARGETS[row.float_target].engine == written_for
        assert {TARGETS[target].engine for target in row.quantized_targets} <= {written_for}
        assert (TARGETS[row.float_target].float_type == "bfloat16") == row.narrow_floats
        assert ENGINES[row.exact_floats].narrow_floats is False


def test_engines_of_one_part_say_so(engine: str, bundle: Bundle) -> None:
    graphs = {"first": bundle.onnx_path, "second": bundle.onnx_path}
    if not ENGINES[engine].several_parts:
        with pytest.raises(EngineError, match=r"runs bundles of one part, and this has 2; run it on onnxruntime"):
            open_graph(graphs, engine)
        return
    with open_graph(graphs, engine, threads=1) as session:
        assert list(session.parts) == ["first", "second"]


def opened(engine: str, path: Path) -> Session:
    """Open a graph that is no bundle's."""
    return open_on(ENGINES[engine], {MAIN: path})


def test_a_file_that_is_no_graph_is_named(engine: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is no protobuf")
    for name in ("bad.onnx", "absent.onnx"):
        with pytest.raises(EngineError, match=name) as caught:
            opened(engine, tmp_path / name)
        assert f"pip install -U {ENGINES[engine].like or engine}" in str(caught.value)


def write_graph(path: Path, *nodes: Any, inputs: tuple[str, ...] = ("x",), output: str = "y") -> Path:
    """Write a graph over images (B, 3, 8, 8)."""
    helper = pytest.importorskip("onnx.helper")
    import onnx

    values = {name: helper.make_tensor_value_info(name, 1, ["batch", 3, 8, 8]) for name in (*inputs, output)}
    graph = helper.make_graph(list(nodes), "graph", [values[name] for name in inputs], [values[output]])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


def test_a_graph_of_two_inputs_is_refused(engine: str, tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx.helper")
    path = write_graph(tmp_path / "two.onnx", helper.make_node("Add", ["x", "z"], ["y"]), inputs=("x", "z"))
    with pytest.raises(EngineError, match="2 inputs"):
        opened(engine, path)


@needs_openvino
def test_openvino_names_the_target_when_it_lacks_an_operator(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx.helper")
    path = write_graph(
        tmp_path / "own.onnx", helper.make_node("TransposeMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    )
    with pytest.raises(EngineError, match=r"TransposeMatMul.*--target openvino or --target portable"):
        opened("openvino", path)


@needs_openvino
def test_openvino_keeps_floats_and_takes_the_threads(portable: Bundle, random_images: Callable[..., Array]) -> None:
    from vitfold.engines.openvino import KEPT_SIZES, OpenVinoSession

    with OpenVinoSession(portable.onnx_path, threads=1) as session:
        for batch in (1, 2, 3, 4):
            session.bind({session.input: random_images(portable.manifest.spec, batch)})
        assert list(session._requests) == [3, 4][-KEPT_SIZES:]
        compiled = session._requests[4].get_compiled_model()
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1


def test_a_missing_engine_names_its_extra(portable: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"vitfold\[openvino\]"):
        open_session(portable, engine="openvino")


@needs_openvino
@pytest.mark.parametrize("other", ["", "import nncf"])
def test_openvino_reports_to_nobody(portable: Bundle, tmp_path: Path, other: str) -> None:
    if other and installed_version("nncf") is None:
        pytest.skip("nncf is not installed")
    script = (
        "import sys\n"
        "from vitfold.engines.openvino import OpenVinoSession, without_telemetry\n"
        "with without_telemetry():\n"
        f"    {other or 'pass'}\n"
        "OpenVinoSession(sys.argv[1])\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry')]\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "TF_BUILD", "JENKINS_URL")}
    command = [sys.executable, "-c", script, str(portable.onnx_path)]
    done = subprocess.run(
        command, env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()


def test_a_profile_names_the_sites(
    session: Session, engine: str, model: Model, random_images: Callable[..., Array]
) -> None:
    before = run(session, random_images(model.spec, 2))
    profile = session.profile(runs=3)
    assert_same(session, session.fetch()["logits"], before)  # the profiler leaves the output as it was
    assert len(profile.plain_ns) == len(profile.profiled_ns) == 3
    assert all(node.latency_ns >= 0 for node in profile.nodes)
    assert sum(node.latency_ns for node in profile.nodes) <= sum(profile.profiled_ns), "no run is counted twice"
    if ENGINES[engine].gpu:
        return
    names = [node.name for node in profile.nodes]
    first = {}
    for site in ("blocks.0.attn.qkv", "blocks.0.merge.x", "blocks.0.mlp.fc2", "blocks.1.attn.qkv"):
        first[site] = next((place for place, name in enumerate(names) if name.startswith(site)), None)
        assert first[site] is not None, (site, names)
    assert list(first.values()) == sorted(first.values()), "in the order of execution"
    assert not any(node.integer for node in profile.nodes), "a float model"


def test_only_a_bound_session_is_profiled(session: Session) -> None:
    with pytest.raises(EngineError, match="bind"):
        session.profile()


def test_an_engine_without_a_profiler_says_so() -> None:
    import torch

    from vitfold.engines.torch import module_session

    with pytest.raises(EngineError, match="no profiler"):
        module_session(torch.nn.Identity()).profile()
