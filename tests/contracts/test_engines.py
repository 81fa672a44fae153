"""One contract for every engine: what `bind`, `run` and `fetch` promise. A new engine adds one row."""

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
from vitfold.engines import ENGINES, TENSORRT, Session, open_session, tensorrt_obstacle
from vitfold.errors import EngineError
from vitfold.model import Array, Model


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model()


needs_openvino = pytest.mark.skipif(installed_version("openvino") is None, reason="openvino is not installed")
TARGETS = {"onnxruntime": "cpu", "openvino": "portable", "tensorrt": "portable"}


@pytest.fixture(scope="module")
def bundle(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.save(pipeline.optimize(model, merge=3), tmp_path_factory.mktemp("engines") / "tiny.fold")


@pytest.fixture(scope="module")
def portable(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folded = pipeline.optimize(model, merge=3, target="portable")
    return pipeline.save(folded, tmp_path_factory.mktemp("engines") / "portable.fold")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == TENSORRT:
        obstacle = tensorrt_obstacle()
        if obstacle is not None:
            pytest.skip(obstacle)
    elif installed_version(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def session(engine: str, bundle: Bundle, portable: Bundle) -> Iterator[Session]:
    with open_session(portable if TARGETS[engine] == "portable" else bundle, engine=engine, threads=1) as opened:
        yield opened


def run(session: Session, pixels: Array) -> Array:
    session.bind(pixels)
    session.run()
    return session.fetch()


def test_an_engine_is_a_session_and_says_its_version(session: Session) -> None:
    assert isinstance(session, Session)
    name, version = session.engine.split(maxsplit=1)
    assert name in ENGINES
    assert version[0].isdigit()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_output_is_that_of_the_reference(
    session: Session,
    model: Model,
    batch: int,
    random_images: Callable[..., Array],
    run_torch: Callable[..., Array],
) -> None:
    pixels = random_images(model.spec, batch)
    expected = run_torch(model, pixels, (3, 3))
    np.testing.assert_allclose(run(session, pixels), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_equal_input_gives_equal_output(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 3)
    np.testing.assert_array_equal(run(session, pixels), run(session, pixels))


def test_what_was_fetched_belongs_to_the_caller(
    session: Session, model: Model, random_images: Callable[..., Array]
) -> None:
    first = run(session, random_images(model.spec, 2, seed=1))
    kept = first.copy()
    run(session, random_images(model.spec, 2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_an_image_does_not_depend_on_its_neighbours(
    session: Session, model: Model, random_images: Callable[..., Array]
) -> None:
    pixels = random_images(model.spec, 4)
    together = run(session, pixels)
    alone = np.concatenate([run(session, pixels[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_input_need_not_be_contiguous(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 4)
    np.testing.assert_array_equal(run(session, pixels[::2]), run(session, np.ascontiguousarray(pixels[::2])))


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_a_wrong_shape_says_the_right_one(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises((EngineError, TypeError), match="32"):
        session.bind(np.zeros(shape, np.float32))


def test_a_closed_session_says_so(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 1)
    run(session, pixels)
    session.close()
    for step in (lambda: session.bind(pixels), session.run, session.fetch):
        with pytest.raises(EngineError, match="closed"):
            step()
    session.close()


def test_batch_sizes_may_alternate(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 4)
    together = run(session, pixels)
    for size in (1, 2, 3, 4, 1):
        np.testing.assert_allclose(run(session, pixels[:size]), together[:size], rtol=1e-5, atol=1e-5)


def test_input_is_read_where_it_lies(
    session: Session, engine: str, model: Model, random_images: Callable[..., Array]
) -> None:
    if engine == TENSORRT:
        pytest.skip("bind copies to the GPU")
    first, second = random_images(model.spec, 2, seed=1), random_images(model.spec, 2, seed=2)
    expected = run(session, second)
    session.bind(first)
    first[:] = second
    session.run()
    np.testing.assert_array_equal(session.fetch(), expected)


def test_an_unknown_engine_offers_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="onnxruntime"):
        open_session(bundle, engine="onnxrt")


def open_graph(engine: str, path: Path) -> Session:
    """Open a graph that is no bundle's."""
    from vitfold.engines.onnxruntime import OnnxRuntimeSession
    from vitfold.engines.openvino import OpenVinoSession
    from vitfold.engines.tensorrt import TensorRtSession

    if engine == TENSORRT:
        return TensorRtSession(path)
    return {"onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession}[engine](path, threads=1)


def test_a_file_that_is_no_graph_is_named(engine: str, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"this is no protobuf")
    for name in ("bad.onnx", "absent.onnx"):
        with pytest.raises(EngineError, match=name) as caught:
            open_graph(engine, tmp_path / name)
        assert f"pip install -U {engine}" in str(caught.value)


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
        open_graph(engine, path)


@needs_openvino
def test_openvino_names_the_target_when_it_lacks_an_operator(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx.helper")
    path = write_graph(
        tmp_path / "own.onnx", helper.make_node("TransposeMatMul", ["x", "x"], ["y"], domain="com.microsoft")
    )
    with pytest.raises(EngineError, match=r"TransposeMatMul.*--target openvino or --target portable"):
        open_graph("openvino", path)


@needs_openvino
def test_openvino_keeps_floats_and_takes_the_threads(portable: Bundle, random_images: Callable[..., Array]) -> None:
    from vitfold.engines.openvino import KEPT_SIZES, OpenVinoSession

    with OpenVinoSession(portable.onnx_path, threads=1) as opened:
        for batch in (1, 2, 3, 4):
            opened.bind(random_images(portable.manifest.spec, batch))
        assert list(opened._requests) == [3, 4][-KEPT_SIZES:]
        compiled = opened._requests[4].get_compiled_model()
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
    session.bind(random_images(model.spec, 2))
    before = run(session, random_images(model.spec, 2))
    profile = session.profile(runs=3)
    np.testing.assert_array_equal(session.fetch(), before, "the profiler leaves the output as it was")
    assert len(profile.plain_ns) == len(profile.profiled_ns) == 3
    assert all(node.latency_ns >= 0 for node in profile.nodes)
    assert sum(node.latency_ns for node in profile.nodes) <= sum(profile.profiled_ns), "no run is counted twice"
    if engine == TENSORRT:
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

    from vitfold.engines.torch import TorchSession

    with pytest.raises(EngineError, match="no profiler"):
        TorchSession(torch.nn.Identity()).profile()
