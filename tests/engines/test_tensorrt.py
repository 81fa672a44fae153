"""What the engine tensorrt asks of TensorRT and CUDA, on a GPU of paper; the contract suite runs on a real one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from fake_gpu import FakeRuntime, FakeTensorRt, install

from vitfold import pipeline
from vitfold.engines import open_graph, open_session
from vitfold.engines.tensorrt import KEPT_SIZES, TensorRtSession
from vitfold.errors import EngineError, TargetError
from vitfold.model import Array, Model

GRAPH: dict[str, Any] = {"shape": [-1, 3, 8, 8]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("VITFOLD_CACHE", str(folder))
    return folder


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> FakeTensorRt:
    return install(monkeypatch, runtime)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write(tmp_path)


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "model.onnx"
    path.write_text(json.dumps({**GRAPH, **changes}))
    return path


def images(batch: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((batch, 3, 8, 8), dtype=np.float32)


def run(session: TensorRtSession, pixels: Array) -> Array:
    return session(pixels)


def check(session: TensorRtSession, batch: int, seed: int = 0) -> None:
    pixels = images(batch, seed)
    np.testing.assert_allclose(run(session, pixels), pixels.sum(axis=(2, 3)), rtol=1e-5, atol=1e-5)


def test_the_fakes_offer_only_what_nvidias_packages_have() -> None:
    """A call that only a fake knows would pass every test here and fail on a GPU."""
    real = pytest.importorskip("tensorrt_rtx")
    pairs = {
        fake_gpu._Builder: real.Builder,
        fake_gpu._Config: real.IBuilderConfig,
        fake_gpu._Context: real.IExecutionContext,
        fake_gpu._Engine: real.ICudaEngine,
        fake_gpu._Parser: real.OnnxParser,
    }
    for fake, theirs in pairs.items():
        assert methods(fake) <= set(dir(theirs)), theirs
    cuda = pytest.importorskip("cuda.bindings.runtime")
    assert methods(FakeRuntime) - {"submit"} <= set(dir(cuda))
    assert set(fake_gpu.cudaError_t.__members__) <= set(cuda.cudaError_t.__members__)
    for kinds in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert set(vars(getattr(FakeRuntime, kinds))) <= set(getattr(cuda, kinds).__members__)


def methods(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_it_computes_by_replaying_a_graph(trt: FakeTensorRt, runtime: FakeRuntime, graph: Path) -> None:
    with TensorRtSession(graph) as session:
        assert session.engine == "tensorrt 10.8.0.43"
        check(session, 2)
        assert runtime.calls["cudaGraphLaunch"] == 1
        session.run()
        session.run()
        assert runtime.calls["cudaGraphLaunch"] == 3
        assert runtime.calls["upload"] == runtime.calls["download"] == 1
        check(session, 2, seed=1)
        assert runtime.calls["cudaGraphInstantiate"] == 1


def test_where_capture_fails_kernels_are_queued(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    runtime = FakeRuntime(captures=False)
    install(monkeypatch, runtime)
    with TensorRtSession(graph) as session:
        check(session, 2)
        assert runtime.calls["cudaGraphLaunch"] == 0
    assert not runtime.alive


def test_close_frees_everything(trt: FakeTensorRt, runtime: FakeRuntime, graph: Path) -> None:
    session = TensorRtSession(graph)
    for batch in (4, 1, 2, 3):
        check(session, batch)
    buffers = 2 * 2 * KEPT_SIZES
    assert len(runtime.alive) == buffers + KEPT_SIZES + len(["stream"])
    session.close()
    assert not runtime.alive
    session.close()
    for step in (lambda: session.bind({session.input: images(1)}), session.run, session.fetch, session.profile):
        with pytest.raises(EngineError, match="closed"):
            step()


def test_steps_have_their_order(trt: FakeTensorRt, graph: Path) -> None:
    with TensorRtSession(graph) as session:
        with pytest.raises(EngineError, match="call bind"):
            session.run()
        session.bind({session.input: images(1)})
        with pytest.raises(EngineError, match="call run"):
            session.fetch()


def test_what_was_fetched_belongs_to_the_caller(trt: FakeTensorRt, graph: Path) -> None:
    with TensorRtSession(graph) as session:
        first = run(session, images(2))
        kept = first.copy()
        run(session, images(2, seed=1))
        np.testing.assert_array_equal(first, kept)


def test_the_first_batch_makes_the_profile_and_another_extends_it(trt: FakeTensorRt, graph: Path) -> None:
    with TensorRtSession(graph) as session:
        for batch in (4, 4, 3, 1, 4, 6):
            check(session, batch)
    assert trt.profiles == [
        ((4, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8)),
        ((1, 3, 8, 8), (4, 3, 8, 8), (4, 3, 8, 8)),
        ((1, 3, 8, 8), (6, 3, 8, 8), (6, 3, 8, 8)),
    ]


def test_a_stated_range_is_built_once(trt: FakeTensorRt, graph: Path) -> None:
    with open_graph(graph, "tensorrt", batch=(1, 4, 8)) as session:
        for batch in (4, 1, 8):
            check(session, batch)  # type: ignore[arg-type]
    assert trt.profiles == [((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))]
    with pytest.raises(TargetError, match="1,8,64"):
        TensorRtSession(graph, batch=(4, 2, 8))


def test_types_stand_in_the_graph(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, graph: Path) -> None:
    for version, flags in (("10.8.0.43", 2), ("11.4.0.106", 0)):
        trt = install(monkeypatch, runtime, version)
        with TensorRtSession(graph) as session:
            check(session, 2)
        assert trt.network_flags == [flags]
        assert trt.cleared == ["TF32"]


def test_an_engine_is_kept_and_found_again(trt: FakeTensorRt, graph: Path, cache: Path) -> None:
    for _ in range(2):
        with TensorRtSession(graph) as session:
            check(session, 2)
    assert len(trt.profiles) == 1
    assert sorted(p.suffix for p in (cache / "tensorrt").iterdir()) == [".plan", ".timings"]


@pytest.mark.parametrize("change", ["graph", "weights", "version", "gpu", "batch", "damaged"])
def test_another_key_builds_again(
    monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRt, runtime: FakeRuntime, graph: Path, cache: Path, change: str
) -> None:
    with TensorRtSession(graph) as session:
        check(session, 2)
    batch, version = 2, "10.8.0.43"
    if change == "graph":
        write(graph.parent, layers=["FLOAT", "FLOAT"])
    elif change == "weights":
        (graph.parent / "model.onnx.data").write_bytes(b"weights")
    elif change == "version":
        version = "10.9.0.34"
    elif change == "gpu":
        runtime.capability = (9, 0)
    elif change == "batch":
        batch = 3
    else:
        for plan in (cache / "tensorrt").glob("*.plan"):
            plan.write_bytes(b"cut off")
    again = install(monkeypatch, runtime, version)
    with TensorRtSession(graph) as session:
        check(session, batch)
    assert len(again.profiles) == 1


def test_timings_are_read_again_and_replaced_when_they_do_not_fit(trt: FakeTensorRt, graph: Path, cache: Path) -> None:
    with TensorRtSession(graph) as session:
        check(session, 2)
        check(session, 3)
    assert trt.timings_read == [b"", b"timings"]
    for timings in (cache / "tensorrt").glob("*.timings"):
        timings.write_bytes(b"of another driver")
    with TensorRtSession(graph) as session:
        check(session, 5)
    assert trt.timings_read[2:] == [b"of another driver", b""]


def test_a_cache_that_cannot_be_written_is_no_error(trt: FakeTensorRt, graph: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with TensorRtSession(graph) as session:
        check(session, 2)


def test_layers_are_profiled_in_order(trt: FakeTensorRt, runtime: FakeRuntime, graph: Path) -> None:
    with TensorRtSession(graph) as session:
        session.bind({session.input: images(2)})
        launched = runtime.calls["cudaGraphLaunch"]
        profile = session.profile(runs=3)
        assert [(node.name, node.latency_ns) for node in profile.nodes] == [("blocks.0", 5e5), ("head", 2.5e5)]
        assert runtime.calls["cudaGraphLaunch"] == launched + 3, "a graph reports no layers: those runs have none"
        assert len(profile.plain_ns) == len(profile.profiled_ns) == 3


def test_wrong_shapes_are_refused(trt: FakeTensorRt, graph: Path) -> None:
    refusal = r"\('batch', 3, 8, 8\), found \(1, 3, 7, 8\); resize"
    with TensorRtSession(graph) as session, pytest.raises(EngineError, match=refusal):
        session.bind({session.input: np.zeros((1, 3, 7, 8), np.float32)})
    assert not trt.profiles


def test_8_bit_floats_need_a_gpu_that_has_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runtime = FakeRuntime(capability=(8, 6))
    install(monkeypatch, runtime)
    path = write(tmp_path, layers=["FLOAT", "FP8"])
    with pytest.raises(EngineError, match=r"8\.9 or newer.*Paper GPU has 8\.6.*--target tensorrt-int8"):
        TensorRtSession(path)
    assert not runtime.alive
    install(monkeypatch, FakeRuntime(capability=(9, 0)))
    TensorRtSession(path).close()


def test_a_rejected_node_is_named(trt: FakeTensorRt, runtime: FakeRuntime, tmp_path: Path) -> None:
    path = write(tmp_path, reject=["blocks.0.qkv", "FusedMatMul", "no importer"])
    with pytest.raises(EngineError, match=r"blocks\.0\.qkv \(FusedMatMul\): no importer; .*--target tensorrt-fp16"):
        TensorRtSession(path)
    assert not runtime.alive


@pytest.mark.parametrize("content", [b"this is no protobuf", b'{"shape": [], "inputs": 0}'])
def test_what_is_no_graph_is_named(trt: FakeTensorRt, runtime: FakeRuntime, graph: Path, content: bytes) -> None:
    graph.write_bytes(content)
    with pytest.raises(EngineError, match=r"model\.onnx: no ONNX graph in it; .*pip install -U tensorrt"):
        TensorRtSession(graph)
    assert not runtime.alive


def test_two_inputs_are_refused(trt: FakeTensorRt, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="2 inputs"):
        TensorRtSession(write(tmp_path, inputs=2))


def test_a_build_that_fails_says_why(trt: FakeTensorRt, graph: Path) -> None:
    trt.build_fails = True
    with TensorRtSession(graph) as session, pytest.raises(EngineError, match="no implementation for node"):
        session.bind({session.input: images(2)})


def test_a_full_gpu_asks_for_a_smaller_batch(trt: FakeTensorRt, runtime: FakeRuntime, graph: Path) -> None:
    runtime.limit_bytes = 10
    session = TensorRtSession(graph)
    with pytest.raises(EngineError, match=r"cudaErrorMemoryAllocation; use a smaller batch"):
        session.bind({session.input: images(2)})
    session.close()
    assert not runtime.alive


def test_without_a_gpu_onnx_runtime_is_offered(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    install(monkeypatch, FakeRuntime(devices=0))
    with pytest.raises(EngineError, match=r"no NVIDIA GPU.*driver.*--engine onnxruntime"):
        TensorRtSession(graph)


@pytest.mark.parametrize("missing", ["tensorrt", "cuda.bindings"])
def test_a_missing_package_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRt, runtime: FakeRuntime, graph: Path, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(EngineError, match=r"vitfold\[tensorrt\]'; for accuracy .*--engine onnxruntime"):
        TensorRtSession(graph)
    assert not runtime.alive


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime, graph: Path) -> None:
    install(monkeypatch, runtime, "8.6.1")
    with pytest.raises(EngineError, match=r"TensorRT 10 or newer, found 8\.6\.1"):
        TensorRtSession(graph)
    assert not runtime.alive


def test_a_bundle_for_tensorrt_opens_here_by_default(
    monkeypatch: pytest.MonkeyPatch, trt: FakeTensorRt, graph: Path, tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    bundle = pipeline.save(pipeline.optimize(tiny_model(), target="tensorrt-fp16"), tmp_path / "tiny.fold")
    target = {**bundle.manifest.target, "batch": [1, 2, 4]}
    with open_session(replace(bundle, path=graph.parent, manifest=replace(bundle.manifest, target=target))) as session:
        session.bind({session.input: images(2)})
    assert trt.profiles == [((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))]
    install(monkeypatch, FakeRuntime(devices=0))
    with pytest.raises(EngineError, match="--engine onnxruntime"):
        open_session(bundle)
    with open_session(bundle, engine="onnxruntime", threads=1) as session:
        assert session.engine.startswith("onnxruntime")
