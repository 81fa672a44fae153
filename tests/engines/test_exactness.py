"""Integer products: measured where they run, exact in some way everywhere, and never wrong without a word."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.bench.environment import installed_version
from vitfold.engines import ENGINES, exactness, open_session
from vitfold.engines.exactness import SWITCH, exact_execution, find_execution, is_exact
from vitfold.errors import EngineError
from vitfold.images import ImageSet
from vitfold.model import Array, Model
from vitfold.products import Product, products_of, products_of_recipe
from vitfold.recipe import QuantRecipe
from vitfold.target import FLOATING, PLAIN, TARGETS, WIDE

WRITER = Path(__file__).parents[2] / "examples" / "write_probes.py"
INSTALLED = [engine for engine, row in ENGINES.items() if len(row.ways) > 1 and installed_version(engine) is not None]
QUANTIZED = [name for name, target in TARGETS.items() if target.activation_type != "float8e4m3fn"]


def writer():
    spec = importlib.util.spec_from_file_location("write_probes", WRITER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def product(form: str = "qdq", left: str = "uint8", right: str = "int8", bits: int = 8, *, constant: bool = True):
    return Product(form=form, left=left, right=right, right_bits=bits, constant=constant)


def test_the_probes_are_those_that_their_writer_makes(tmp_path):
    found = writer()
    known = {exactness.probe_path(one) for one in found.PRODUCTS}
    assert known == set(exactness.probe_path(product()).parent.glob("*.onnx"))
    for one in found.PRODUCTS:
        written = onnx.load_model_from_string(exactness.probe_path(one).read_bytes())
        made = onnx.load_model_from_string(found.ir.to_proto(found.probe(one)).SerializeToString())
        assert written == made, one.name


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("attention", [False, True])
def test_every_target_has_probes_of_its_products(name, attention):
    for one in products_of(TARGETS[name].to_dict(), weight_bits=8, attention=attention):
        assert exactness.probe_path(one).exists()


@pytest.mark.parametrize("bits", [7, 8])
def test_a_probe_shows_saturation(bits):
    """What pairs in saturating 16 bits make of the probe's codes differs from the truth for 8 bits, not for 7."""
    left = exactness.left_codes(33).astype(np.int64) + 128
    right = exactness.right_codes(bits).astype(np.int64)
    assert (right.min(), right.max()) == (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    pairs = left[:, 0::2, None] * right[None, 0::2] + left[:, 1::2, None] * right[None, 1::2]
    saturated = np.clip(pairs, -(2**15), 2**15 - 1).sum(1)
    assert np.array_equal(saturated, left @ right) == (bits == 7)
    assert np.abs(exactness.left_codes(33) @ exactness.right_codes(bits)).max() < 2**24, "exact in float32"


@pytest.mark.parametrize("name", ["portable", "integer", "cpu-avx2", "openvino-avx2"])
@pytest.mark.parametrize("attention", [False, True])
def test_targets_for_every_processor_are_exact_on_this_one(name, attention):
    target = TARGETS[name]
    if target.engine not in INSTALLED:
        pytest.skip(f"{target.engine} is not installed")
    for one in products_of(target.to_dict(), weight_bits=8, attention=attention):
        assert is_exact(target.engine, one), one


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize("form", ["qdq", "integer", "matmul_integer_to_float"])
@pytest.mark.parametrize("left", ["uint8", "int8"])
def test_products_with_weights_are_exact_in_some_way_everywhere(engine, form, left):
    assert exact_execution(engine, [product(form, left)]) is not None


@pytest.mark.parametrize("form", ["qdq", "integer", "matmul_integer_to_float"])
def test_where_products_saturate_another_way_is_taken(monkeypatch, form):
    monkeypatch.setenv(SWITCH, "1")
    needed = product(form)
    assert not is_exact("onnxruntime", needed)
    assert is_exact("onnxruntime", product(form, bits=7))
    assert find_execution("onnxruntime", [needed]) == (FLOATING if form == "qdq" else WIDE)
    assert exact_execution("onnxruntime", [product(form, right="uint8", constant=False)]) == PLAIN


def test_openvino_runs_them_in_floats_there(monkeypatch):
    if "openvino" not in INSTALLED:
        pytest.skip("openvino is not installed")
    monkeypatch.setenv(SWITCH, "1")
    assert find_execution("openvino", [product()]) == FLOATING


@pytest.mark.parametrize("form", ["integer", "matmul_integer_to_float"])
def test_what_no_way_computes_exactly_is_refused_with_the_cure(monkeypatch, form):
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(EngineError, match=r"uint8 x int8 with 8-bit computed operands.*--target cpu-avx2"):
        find_execution("onnxruntime", [product(form), product(form, constant=False)])


@pytest.mark.parametrize(
    ("sites", "attention", "bits"),
    [({}, False, 8), ({"*": "w4a8"}, False, 8), ({"*": "float"}, True, 8)],
)
def test_a_recipe_needs_products_of_its_widest_weights(sites, attention, bits):
    quant = QuantRecipe(sites=sites, attention=attention)
    found = products_of_recipe(TARGETS["cpu-vnni"].to_dict(), quant)
    assert [one.right_bits for one in found] == [bits] * (2 if attention else 1)
    narrow = QuantRecipe(weights=4, head_bits=4)
    assert products_of_recipe(TARGETS["cpu-vnni"].to_dict(), narrow)[0].right_bits == 7
    assert products_of_recipe(TARGETS["cpu-vnni"].to_dict(), None) == ()


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The factory `quantized(target)` of small W8A8 bundles, each made once; weights of 8 bits that would saturate."""
    from PIL import Image

    from vitfold.images import find_images

    folder = tmp_path_factory.mktemp("exact")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(6):
        pixels = draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    images: ImageSet = find_images(folder / "images")
    made: dict[str, Bundle] = {}

    def make(target: str) -> Bundle:
        if target not in made:
            model = tiny_model(embed_dim=64, head_dim=16, mlp_dim=128)
            folded = pipeline.optimize(model, merge=2, quant=QuantRecipe(method="minmax"), target=target)
            done = pipeline.calibrate_plan(folded, images)
            made[target] = pipeline.save(done, folder / f"{target}.fold", images=images)
        return made[target]

    return make


def outputs_of(bundle: Bundle, engine: str, pixels: Array) -> tuple[Array, str, str]:
    with open_session(bundle, engine=engine, threads=1) as session:
        return session(pixels), session.execution, session.engine


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize("name", ["cpu-vnni", "openvino"])
def test_a_bundle_from_another_processor_answers_the_same_and_says_how(
    quantized, tiny_model, random_images, monkeypatch, caplog, name, engine
):
    if name == "cpu-vnni" and engine == "openvino":
        pytest.skip("ONNX Runtime's own operators")
    if TARGETS[name].engine not in INSTALLED:
        pytest.skip(f"{TARGETS[name].engine} is not installed")
    bundle = quantized(name)
    pixels = random_images(bundle.manifest.spec, 16)
    before, _, _ = outputs_of(bundle, engine, pixels)
    monkeypatch.setenv(SWITCH, "1")
    # The bundle "openvino" was made with 7-bit weights where those of 8 bits are not exact.
    saturating = replace(bundle, manifest=replace(bundle.manifest, target={**bundle.manifest.target, "weight_bits": 8}))
    with caplog.at_level(logging.WARNING):
        found, execution, shown = outputs_of(saturating, engine, pixels)
    assert execution == (WIDE if name == "cpu-vnni" else FLOATING)
    assert shown.endswith(")")
    assert "saturate" in caplog.text
    assert "exact, but slower" in caplog.text
    errors = np.abs(found - before).max(1) / np.abs(before).max(1)
    assert np.median(errors) < 0.02


def test_a_graph_that_cannot_be_widened_is_refused_with_the_cure(tiny_model, photos, tmp_path, monkeypatch):
    """ONNX Runtime fails to make weights unsigned that two products share, as those of a twin quantizer do."""
    folded = pipeline.optimize(tiny_model(), quant=QuantRecipe(method="ptq4vit"), target="cpu-vnni")
    done = pipeline.calibrate_plan(folded, photos)
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(EngineError, match=r"uint8 x int8 with 8-bit weights.*--target cpu-avx2"):
        pipeline.save(done, tmp_path / "a.fold", images=photos)


def test_a_quantized_plan_for_this_processor_never_saturates(tiny_model, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    assert pipeline.optimize(tiny_model(), quant="w8a8").target.name in ("cpu-avx2", "cpu-arm")
    if "openvino" in INSTALLED:
        assert pipeline.optimize(tiny_model(), quant="w8a8", target="openvino").target.name == "openvino-avx2"
    assert pipeline.optimize(tiny_model(), quant="w8a8", target="cpu-vnni").target.name == "cpu-vnni"


def test_a_processor_that_is_told_to_end_early_is_measured_by_itself(own_cache, monkeypatch):
    """Kernels follow such variables: what was kept for the whole processor says nothing of it, nor the other way."""
    for settings in ({}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ONEDNN_MAX_CPU_ISA": "AVX2", "LD_PRELOAD": ""}):
        exactness._measured.cache_clear()
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        assert is_exact("onnxruntime", product(bits=7))
    exactness._measured.cache_clear()
    assert len([*(own_cache / "exactness").glob("*.txt")]) == 2, "an empty variable is none"


def test_a_measurement_is_kept_for_the_next_process(own_cache, monkeypatch):
    exactness._measured.cache_clear()
    assert is_exact("onnxruntime", product(bits=7))
    (kept,) = (own_cache / "exactness").glob("*.txt")
    assert kept.read_bytes() == b"exact"
    kept.write_bytes(b"not exact")
    assert is_exact("onnxruntime", product(bits=7)), "kept in this process"
    exactness._measured.cache_clear()
    assert not is_exact("onnxruntime", product(bits=7)), "read from the cache"
    kept.write_bytes(b"rubbish")
    exactness._measured.cache_clear()
    assert is_exact("onnxruntime", product(bits=7)), "measured anew"
