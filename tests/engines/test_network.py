"""Bundles as torch modules: exact products of codes, faithful in any type, taken whole by torch.export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import vitfold
from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.engines import exactness, open_session
from vitfold.engines.network import Network, read_network, torch_module
from vitfold.engines.network.products import (
    check_float8,
    computed_product,
    float8_product,
    integer_product,
    padded,
    scaled_product,
)
from vitfold.errors import EngineError
from vitfold.images import ImageSet
from vitfold.model import Array, Model

PROBES = sorted(
    exactness.probe_path(exactness.Product(form="", left="", right="", right_bits=8, constant=True)).parent.glob(
        "*.onnx"
    )
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Kernels are those of the GPU, where there is one; what is expected of them is computed on the CPU."""
WIDE = {"embed_dim": 64, "mlp_dim": 96, "head_dim": 16}


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model(**WIDE)


@pytest.fixture(scope="module")
def folded(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """The factory `folded(target, quant)` of bundles that merge, each made once."""
    made: dict[tuple[str, str | None], Bundle] = {}

    def make(target: str, quant: str | None = None) -> Bundle:
        if (target, quant) not in made:
            plan = pipeline.optimize(model, merge=3, target=target, quant=quant)
            if plan.needs_calibration:
                plan = pipeline.calibrate_plan(plan, _photos(tmp_path_factory.mktemp("photos")))
            made[target, quant] = pipeline.save(plan, tmp_path_factory.mktemp("network") / f"{target}.fold")
        return made[target, quant]

    return make


def _photos(folder: Path) -> ImageSet:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return vitfold.find_images(folder)


def run(network: Network, pixels: Array) -> Array:
    """In its own type, and where it is."""
    with torch.no_grad():
        made = network(torch.from_numpy(pixels).to(network.body.get_buffer("real").device))
    assert isinstance(made, torch.Tensor)
    return made.float().cpu().numpy()


def far(found: Array, expected: Array) -> float:
    """The median over images of the relative error."""
    return float(np.median(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)))


@pytest.mark.parametrize("path", PROBES, ids=lambda path: path.stem)
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_products_of_extreme_codes_are_exact(path: Path, rows: int) -> None:
    left = exactness.left_codes(rows)
    right = exactness.right_codes(7 if "-7-" in path.stem else 8) if path.stem.endswith("weight") else left.T
    pixels = left.reshape(rows, *exactness.IMAGE).astype(np.float32)
    np.testing.assert_array_equal(run(read_network(path).to(DEVICE), pixels), (left @ right).astype(np.float32))


def test_long_products_of_computed_codes_are_exact() -> None:
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(200, 256, (2, 3, *shape), dtype=np.uint8)) for shape in ((5, 700), (700, 4)))
    placed = a.to(DEVICE), b.to(DEVICE)
    assert int(computed_product(*placed, (0, 0)).max()) > 2**24, "beyond what single precision holds"
    assert torch.equal(computed_product(*placed, (0, 7)).cpu(), a.int() @ (b.int() - 7))


@pytest.mark.parametrize("shape", [(1, 7, 3), (40, 48, 10), (17, 16, 16)])
def test_kernels_are_given_what_they_take(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`_int_mm` on CUDA takes more than 16 rows, and multiples of 8 in both other lengths."""
    rows, inputs, outputs = shape
    rng = np.random.default_rng(0)
    a, w = (torch.from_numpy(rng.integers(-128, 128, s, dtype=np.int8)) for s in ((rows, inputs), (outputs, inputs)))
    given: list[tuple[int, ...]] = []
    kernel = torch._int_mm

    def watched(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        given.append((*x.shape, y.shape[1]))
        return kernel(x, y)

    monkeypatch.setattr(torch, "_int_mm", watched)
    zeros = torch.zeros(outputs, dtype=torch.int32, device=DEVICE)
    found = integer_product(a.to(DEVICE), padded(w).to(DEVICE), zeros)
    assert torch.equal(found.cpu(), a.int() @ w.int().t())
    ((m, k, n),) = given
    assert m > 16
    assert k % 8 == n % 8 == 0


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7, 3), (40, 48, 10), (17, 16, 16)])
def test_the_kernel_of_8_bit_floats_computes_what_floats_do(shape: tuple[int, int, int], kind: torch.dtype) -> None:
    """The call that GPUs get, on a CPU where torch has it there, too."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    a, w = (
        torch.randn(s, generator=generator).mul(50).to(torch.float8_e4m3fn) for s in ((rows, inputs), (outputs, inputs))
    )
    scale = torch.tensor(0.25)
    expected = (a.float() @ w.float().t()) * scale
    held = a.to(DEVICE), padded(w).to(DEVICE)
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[kind]
    if DEVICE.type == "cuda":  # sums of fewer bits
        rtol = max(rtol, 1e-3)
    close = {"rtol": rtol, "atol": rtol * float(expected.abs().max())}
    real = torch.empty(0, dtype=kind, device=DEVICE)
    product = float8_product(*held, outputs, scale.to(DEVICE), real)
    assert product.dtype == kind
    torch.testing.assert_close(product.float().cpu(), expected, **close)
    try:
        found = scaled_product(*held, scale.to(DEVICE), kind)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch or this GPU has it not: {error}")
    assert found.dtype == kind
    torch.testing.assert_close(found[:, :outputs].float().cpu(), expected, **close)


def test_sums_of_8_bit_floats_fit_half_precision(tmp_path: Path) -> None:
    """A weight's codes are up to 448 whatever its numbers are: sums of them alone would be infinite."""
    import onnx
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    columns = np.geomspace(1e-4, 1.0, 8).astype(np.float32)
    weight = rng.standard_normal((64, 8)).astype(np.float32) * columns
    scales = np.abs(weight).max(0) / 448
    codes = torch.from_numpy(weight / scales).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    kind = onnx.TensorProto.FLOAT8E4M3FN
    constants = [
        helper.make_tensor("w", kind, codes.shape, codes.tobytes(), raw=True),
        numpy_helper.from_array(scales.astype(np.float32), "w_scale"),
        numpy_helper.from_array(np.float32(128 / 448), "x_scale"),
        helper.make_tensor("zero", kind, [], b"\x00", raw=True),
        helper.make_tensor("zeros", kind, [8], bytes(8), raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "zeros"], ["v"], axis=1),
        helper.make_node("MatMul", ["d", "v"], ["y"], name="product"),
    ]
    ends = [helper.make_tensor_value_info("x", 1, ["batch", 64]), helper.make_tensor_value_info("y", 1, ["batch", 8])]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "f8.onnx"))
    x = (128 * rng.uniform(-1, 1, (5, 64))).astype(np.float32)
    found = run(read_network(tmp_path / "f8.onnx").half(), x)
    exact = run(read_network(tmp_path / "f8.onnx"), x)
    assert np.isfinite(found).all()
    assert np.abs(x @ (weight / scales)).max() > 65504, "which half precision does not hold"
    assert far(exact, x @ weight) < 0.05
    np.testing.assert_allclose(found, exact, rtol=0.02, atol=0.02 * np.abs(exact).max(0).min())


@pytest.mark.parametrize(
    ("target", "quant", "bound"),
    [
        ("torch", None, 1e-5),
        ("cpu", None, 1e-5),
        ("portable", None, 1e-5),
        ("openvino", None, 1e-5),
        ("torch", "w8a8", 0.02),
        ("cpu-vnni", "w8a8", 0.02),
        ("portable", "w8a8", 0.02),
        ("integer", "w8a8", 0.02),
        ("torch-fp16", None, 0.005),
        ("torch-fp16", "w8a8", 0.05),
        ("torch-fp8", "fp8", 0.1),
    ],
)
def test_a_bundle_computes_what_it_does_in_onnx_runtime(
    folded: Callable[..., Bundle],
    model: Model,
    target: str,
    quant: str | None,
    bound: float,
    random_images: Callable[..., Array],
) -> None:
    bundle, pixels = folded(target, quant), random_images(model.spec, 8)
    with open_session(bundle, engine="onnxruntime", threads=1) as session:
        expected = session(pixels)
    with open_session(bundle, engine="torch", threads=1) as session:
        found = session(pixels)
        if session.reads_in_place:  # on the CPU, where a module is unless it is moved
            np.testing.assert_array_equal(found, run(torch_module(bundle), pixels))
    assert far(found, expected) < bound


@pytest.mark.parametrize("quant", [None, "w8a8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_module_keeps_scales_and_stays_near(
    folded: Callable[..., Bundle],
    model: Model,
    quant: str | None,
    dtype: torch.dtype,
    random_images: Callable[..., Array],
) -> None:
    pixels = random_images(model.spec, 8)
    network = vitfold.torch_module(folded("torch", quant))
    expected = run(network, pixels)
    scales = {name: buffer.clone() for name, buffer in network.named_buffers() if name.startswith("body.exact")}
    assert bool(scales) == (quant is not None)
    network.to(dtype)
    assert network.dtype == dtype
    assert all(torch.equal(network.get_buffer(name), values) for name, values in scales.items())
    assert far(run(network, pixels), expected) < (0.1 if dtype == torch.bfloat16 or quant else 0.01)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(("target", "quant"), [("torch", None), ("torch-fp16", "w8a8")])
def test_torch_export_takes_it_whole(
    folded: Callable[..., Bundle],
    model: Model,
    target: str,
    quant: str | None,
    random_images: Callable[..., Array],
) -> None:
    network, pixels = torch_module(folded(target, quant)), random_images(model.spec, 2)
    program = torch.export.export(network, (torch.from_numpy(pixels),))
    np.testing.assert_array_equal(program.module()(torch.from_numpy(pixels)).float().numpy(), run(network, pixels))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in names
    assert ("aten._int_mm.default" in names) == (quant is not None)


def test_weights_are_parameters_and_nothing_is_held_twice(folded: Callable[..., Bundle], model: Model) -> None:
    network = torch_module(folded("torch"))
    held = sum(parameter.numel() for parameter in network.parameters())
    assert held == pytest.approx(sum(array.size for array in model.params.values()), rel=0.05)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_an_operator_without_a_rule_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import helper

    ends = [helper.make_tensor_value_info(name, 1, ["batch", 3, 8, 8]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Celu", ["x"], ["y"], name="odd")], "graph", ends[:1], ends[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(tmp_path / "odd.onnx")
    )
    with pytest.raises(EngineError, match=r"Celu \(odd\).*--engine onnxruntime"):
        read_network(tmp_path / "odd.onnx")


def test_gpus_without_8_bit_floats_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_float8(torch.device("cpu"))
    with pytest.raises(EngineError, match=r"compute capability 8\.9"):
        check_float8(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(EngineError, match="torch-fp16"):
        check_float8(torch.device("cuda"))


def test_a_simulated_bundle_has_no_module(folded: Callable[..., Bundle]) -> None:
    with pytest.raises(EngineError, match="--target torch"):
        torch_module(folded("simulation", "w4a8"))
