"""Peers are set up like the bundles that they are compared with, at their tools' best settings."""

from __future__ import annotations

import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vitfold.bench import peers
from vitfold.bench.peers import (
    CALIBRATED,
    MODELOPT_PYTHON,
    PEERS,
    Calibration,
    check_peers,
    installed_version,
    open_peer,
)
from vitfold.engines.exactness import SWITCH, exact_execution
from vitfold.errors import EngineError, ImageError
from vitfold.images import ImageSet
from vitfold.model import Array, Preprocess
from vitfold.products import products_of
from vitfold.target import PLAIN, TARGETS

SHAPE = (3, 8, 8)


class Attending(torch.nn.Module):
    """Linear layers around a product of two activations, as in attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 32), torch.nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = torch.nn.functional.gelu(self.first(x.flatten(1, 2)))
        weights = (tokens @ tokens.transpose(1, 2) / 8).softmax(-1)
        return self.last(weights @ tokens).mean(1)


@pytest.fixture
def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return Attending().eval()


@pytest.fixture
def calibration(photos: ImageSet) -> Calibration:
    preprocess = Preprocess(
        resize="exact",
        resize_size=SHAPE[1:],
        crop_size=SHAPE[1:],
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return Calibration(images=photos, preprocess=preprocess)


def installed_peers() -> list[str]:
    def there(name: str) -> bool:
        try:
            check_peers([name], calibrated=True)
        except EngineError:
            return False
        return True

    return [name for name in PEERS if name != "torch-compile" and there(name)]


def run(peer: peers.Peer, pixels: Array) -> Array:
    with peer.session as session:
        return session(pixels)


@pytest.mark.parametrize("name", installed_peers())
def test_a_peer_computes_what_the_original_does(
    name: str, module: torch.nn.Module, calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = calibration.pixels()
    with torch.inference_mode():
        expected = module(torch.from_numpy(pixels)).numpy()
    peer = open_peer(name, module, SHAPE, tmp_path, threads=1, calibration=calibration)
    found = run(peer, pixels)
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    rounded = name in CALIBRATED or name.endswith("-bf16")
    assert 1e-5 < error < 0.1 if rounded else error < 1e-5
    assert peer.size_bytes > 0
    assert capsys.readouterr().out == ""
    assert tempfile.gettempdir() != str(tmp_path)


@pytest.mark.parametrize("name", ["torch-bf16", "openvino-bf16", "nncf-bf16"])
def test_peers_in_bfloat16_need_a_processor_that_multiplies_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed_version", lambda package: "1.0")
    monkeypatch.setattr(peers, "processor", lambda: {"instruction_sets": ["avx2", "avx512_vnni"]})
    with pytest.raises(EngineError, match=f"no products of bfloat16 for the peer {name}"):
        check_peers([name], calibrated=True)


@pytest.mark.skipif("onnxruntime-int8" not in installed_peers(), reason="the extra peers is not installed")
def test_only_linear_layers_are_quantized_by_onnxruntime(
    module: torch.nn.Module, calibration: Calibration, tmp_path: Path
) -> None:
    import onnx

    open_peer("onnxruntime-int8", module, SHAPE, tmp_path, calibration=calibration).session.close()
    nodes = onnx.load(str(tmp_path / "onnxruntime-int8.onnx")).graph.node
    made_by = {output: node for node in nodes for output in node.output}
    quantized = [
        node
        for node in nodes
        if node.op_type in ("MatMul", "Gemm")
        and all(name in made_by and made_by[name].op_type == "DequantizeLinear" for name in node.input[:2])
    ]
    assert len(quantized) == 2
    assert sum(node.op_type in ("MatMul", "Gemm") for node in nodes) == 4
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 2
    assert not (tmp_path / "prepared.onnx").exists()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_weights_lose_a_bit_only_where_the_processor_saturates(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setenv(SWITCH, "0")
    needed = products_of(TARGETS["openvino"].to_dict(), weight_bits=8, attention=False)
    assert peers._saturates(engine) == (exact_execution(engine, needed) != PLAIN)
    monkeypatch.setenv(SWITCH, "1")
    assert peers._saturates(engine)


def test_peers_run_on_as_many_threads_as_the_bundles(module: torch.nn.Module, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        open_peer("torch", module, SHAPE, tmp_path, threads=before + 1).session.close()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with open_peer("onnxruntime", module, SHAPE, tmp_path, threads=1).session as session:
        (runner,) = session._sessions.values()
        assert runner.get_session_options().intra_op_num_threads == 1


def test_unknown_peers_offer_the_nearest(module: torch.nn.Module, tmp_path: Path) -> None:
    check_peers(installed_peers(), calibrated=True)
    with pytest.raises(EngineError, match="torch-compile"):
        check_peers(["torch-compiled"])
    with pytest.raises(EngineError, match="onnxruntime"):
        open_peer("onnxrt", module, SHAPE, tmp_path)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("torch", "torch", "optimize"),
        ("onnxruntime", "onnxscript", "peers"),
        ("onnxruntime-int8", "onnx", "peers"),
        ("onnxruntime-int8", "sympy", "peers"),
        ("openvino", "openvino", "peers"),
        ("nncf", "nncf", "peers"),
        ("nncf", "openvino", "peers"),
        ("modelopt", "onnxscript", "peers"),
    ],
)
def test_a_missing_package_names_its_extra(
    name: str, package: str, extra: str, hide_packages: Callable[..., None]
) -> None:
    hide_packages(package, others="1.0")
    with pytest.raises(EngineError, match=rf"peer {name} needs the package {package}.*vitfold\[{extra}\]"):
        check_peers([name], calibrated=True)


@pytest.mark.parametrize("name", sorted(CALIBRATED))
def test_quantized_peers_ask_for_images(
    name: str, module: torch.nn.Module, tmp_path: Path, hide_packages: Callable[..., None]
) -> None:
    hide_packages(others="1.0")
    with pytest.raises(EngineError, match=f"{name}.*--calibration-images"):
        check_peers([name])
    with pytest.raises(EngineError, match=f"{name}.*--calibration-images"):
        open_peer(name, module, SHAPE, tmp_path)


@pytest.mark.skipif(installed_version("onnxscript") is None, reason="the extra peers is not installed")
def test_a_model_that_a_tool_refuses_is_said_to_be(tmp_path: Path) -> None:
    class Deciding(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) if x.sum() > 0 else x.flatten(1) * 2

    with pytest.raises(EngineError, match=r"peer onnxruntime could not be made.*leave it out of --peers"):
        open_peer("onnxruntime", Deciding(), SHAPE, tmp_path)


def test_an_unreadable_calibration_image_is_named(
    module: torch.nn.Module, calibration: Calibration, tmp_path: Path
) -> None:
    calibration.images.paths[3].write_bytes(b"no image")
    with pytest.raises(ImageError, match=calibration.images.paths[3].name):
        open_peer("nncf", module, SHAPE, tmp_path, calibration=calibration)


def rounds(folder: Path, plain: str, text: str) -> None:
    """Put a stand-in for ModelOpt into a folder of packages: `plain` becomes its input's end, then runs `text`."""
    package = folder / "modelopt" / "onnx"
    package.mkdir(parents=True)
    for each in (package.parent, package):
        (each / "__init__.py").touch()
    (package / "quantization.py").write_text(
        f"import shutil\ndef quantize(path, **said):\n    open(path, 'ab').write({plain!r}.encode())\n    {text}\n"
    )
    facts = folder / "nvidia_modelopt-9.8.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 9.8\n")


@pytest.fixture
def rounded(tmp_path: Path) -> Path:
    """A graph of QuantizeLinear, DequantizeLinear and a mean, from (B, 3, 8, 8) to (B, 3, 8)."""
    onnx = pytest.importorskip("onnx")
    h, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        h.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        h.make_node("ReduceMean", ["d", "axes"], ["y"], keepdims=0),
    ]
    constants = [
        h.make_tensor("scale", kinds.FLOAT, [], [0.5]),
        h.make_tensor("zero", kinds.INT8, [], [0]),
        h.make_tensor("axes", kinds.INT64, [1], [3]),
    ]
    ends = [
        h.make_tensor_value_info(name, kinds.FLOAT, ["batch", *shape])
        for name, shape in (("x", SHAPE), ("y", SHAPE[:2]))
    ]
    graph = h.make_graph(nodes, "rounded", ends[:1], ends[1:], constants)
    path = tmp_path / "rounded.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.mark.skipif(installed_version("onnxscript") is None, reason="the extra peers is not installed")
@pytest.mark.parametrize(("name", "mode"), [("modelopt", "int8"), ("modelopt-fp8", "fp8")])
def test_modelopt_quantizes_in_an_interpreter_of_its_own(
    name: str,
    mode: str,
    module: torch.nn.Module,
    calibration: Calibration,
    rounded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = tmp_path / "asked.txt"
    rounds(
        tmp_path / "packages",
        "garbage",
        f"open({str(asked)!r}, 'w').write(repr([said['quantize_mode'], said['calibration_eps'], "
        f"said['calibration_shapes'], [v.shape for v in said['calibration_data'].values()]])); "
        f"shutil.copy({str(rounded)!r}, said['output_path'])",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv(MODELOPT_PYTHON, sys.executable)
    folder = tmp_path / "peers"
    folder.mkdir()
    check_peers([name], calibrated=True)
    peer = open_peer(name, module, SHAPE, folder, threads=1, calibration=calibration)
    pixels = calibration.pixels()
    expected = (np.clip(np.round(pixels / 0.5), -128, 127) * 0.5).mean(3)
    np.testing.assert_allclose(run(peer, pixels), expected, atol=1e-6)
    assert peer.untimed is not None
    assert "nvidia-modelopt 9.8" in peer.untimed
    assert peer.size_bytes == rounded.stat().st_size
    said = asked.read_text()
    count = len(pixels)
    assert f"['{mode}', ['cpu'], 'x:{min(count, 8)}x3x8x8', [({count}, 3, 8, 8)]]" == said
    assert {file.name.partition(".")[0] for file in folder.iterdir()} == {"plain", name}
    run(open_peer("onnxruntime", module, SHAPE, folder, threads=1), pixels)


@pytest.mark.skipif(installed_version("onnxscript") is None, reason="the extra peers is not installed")
def test_what_modelopt_refuses_is_passed_on(
    module: torch.nn.Module, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds(tmp_path / "packages", "", "raise ValueError('no such pattern')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv(MODELOPT_PYTHON, sys.executable)
    with pytest.raises(EngineError, match="modelopt could not be made.*no such pattern.*leave it out of --peers"):
        open_peer("modelopt", module, SHAPE, tmp_path, calibration=calibration)


def test_missing_modelopt_is_told_how_to_install(
    module: torch.nn.Module,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hide_packages: Callable[..., None],
) -> None:
    monkeypatch.delenv(MODELOPT_PYTHON, raising=False)
    hide_packages("nvidia-modelopt", others="1.0")
    install = rf"python -m venv.*pip install 'nvidia-modelopt\[onnx\]'.*export {MODELOPT_PYTHON}="
    with pytest.raises(EngineError, match=f"peer modelopt needs NVIDIA ModelOpt.*{install}"):
        check_peers(["modelopt"], calibrated=True)
    monkeypatch.setenv(MODELOPT_PYTHON, str(tmp_path / "absent"))
    with pytest.raises(EngineError, match=f"absent, which is no program.*{install}"):
        check_peers(["modelopt"], calibrated=True)
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'modelopt'\" >&2\nexit 1\n")
    bare.chmod(bare.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(MODELOPT_PYTHON, str(bare))
    check_peers(["modelopt"], calibrated=True)
    (tmp_path / "plain.onnx").touch()
    with pytest.raises(EngineError, match=f"needs more than .*No module named 'modelopt'.*{install}"):
        open_peer("modelopt", module, SHAPE, tmp_path, calibration=calibration)
