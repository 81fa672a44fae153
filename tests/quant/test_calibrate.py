"""Every method end to end on a tiny model: faithful by its bits, reproducible, executable, resumable."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from quantizing import run_exactly, single
from vitfold.architectures.programs import forward, plain_program
from vitfold.artifacts.cache import cache_folder
from vitfold.errors import CalibrationError, RecipeError
from vitfold.images import ImageSet, batches, find_images
from vitfold.model import Array, Model
from vitfold.ops.emit import emit_graph, write_onnx
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.pipeline.calibration import constraints_of
from vitfold.program.queries import projections_of
from vitfold.quant import METHODS, Calibrated, Progress, QuantConstraints, calibrate, find_method
from vitfold.quant.network import network_of
from vitfold.quant.ranges import wide_uniform
from vitfold.quant.rotation import rotate_streams, turn_heads
from vitfold.quant.sites import find_sites
from vitfold.quantizer import Float8, Log, Twin, Uniform
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.target import TARGETS

pytestmark = pytest.mark.usefixtures("own_cache")
FREE = QuantConstraints(uniform_only=False)
MERGE = MergeRecipe(r=(5, 3))


def folder_of(folder: Path, count: int, seed: int) -> ImageSet:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return find_images(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageSet:
    return folder_of(tmp_path_factory.mktemp("images") / "calibration", 16, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory, tiny_model) -> Array:
    """Pixels of images that no calibration sees."""
    found = folder_of(tmp_path_factory.mktemp("images") / "others", 16, 1)
    return np.concatenate([group.pixel_values for group in batches(found, tiny_model().preprocess, batch=16)])


def outputs(ops: Any, model: Model, pixels: Array, merge: MergeRecipe = MERGE) -> Array:
    with torch.inference_mode():
        return np.asarray(forward(ops, model.spec, merge, torch.from_numpy(pixels)))


def sqnr_db(model: Model, done: Calibrated, pixels: Array, merge: MergeRecipe = MERGE) -> float:
    exact = outputs(Run(model.params), model, pixels, merge)
    found = outputs(Simulate(done.model.params, done.quantizers), done.model, pixels, merge)
    return float(10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum()))


def recipe(bits: int = 8, method: str = "minmax", **choices: Any) -> QuantRecipe:
    values = {"attention": True, "head_bits": bits, **choices}
    return QuantRecipe(weights=bits, activations=bits, method=method, **values)


@pytest.fixture(scope="module")
def wide(tiny_model) -> Model:
    """A model of forty outputs, on which one flipped code weighs little."""
    return tiny_model(outputs=40)


@pytest.fixture(scope="module")
def calibrated(wide, images) -> Callable[..., Calibrated]:
    """The factory `calibrated(bits, method, scheme, attention=True)` on the wide model; each is made once."""

    @cache
    def make(bits: int, method: str, scheme: QuantConstraints, attention: bool = True) -> Calibrated:
        return calibrate(wide, MERGE, recipe(bits, method, attention=attention), images, scheme=scheme)

    return make


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_faithful_by_its_bits(wide, calibrated, others, name):
    found = {bits: calibrated(bits, name, FREE) for bits in (8, 6, 4)}
    decibels = {bits: sqnr_db(wide, done, others) for bits, done in found.items()}
    assert decibels[8] > 28
    assert decibels[8] > decibels[6] + 3
    assert decibels[6] > decibels[4] + 3
    assert decibels[4] > 5
    linears, attentions = find_sites(wide.spec)
    for bits, done in found.items():
        assert set(done.quantizers) == {name for site in (*linears, *attentions) for name in site.names}
        assert {q.bits for q in done.quantizers.values()} <= {bits, bits - 1}
        for site, quantizer in done.quantizers.items():
            if site.endswith(".w"):
                weight = torch.from_numpy(done.model.params[f"{site[:-2]}.weight"])
                np.testing.assert_array_equal(fake_quantize(weight, quantizer), weight, site)
        folded = outputs(Run(done.folded.params), done.folded, others[:4])
        exact = outputs(Run(wide.params), wide, others[:4])
        assert np.linalg.norm(folded - exact) < 1e-5 * np.linalg.norm(exact), "folds are exact"


FEATURES: dict[str, dict[str, Any]] = {
    "avg": {"pool": "avg", "class_token": False},
    "map": {"pool": "map", "map_heads": 2, "map_mlp_width": 24},
    "none": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
    "swiglu": {"mlp": "swiglu", "activation": "silu"},
    "qk_norm": {"qk_norm": True},
    "registers": {"registers": 2, "dist_token": True, "pool": "token_dist"},
    "quick_gelu": {"activation": "quick_gelu", "pre_norm": True},
    "no bias": {"without": ["head.bias", *(f"blocks.{i}.{n}.bias" for i in range(2) for n in ("attn.qkv", "mlp.fc2"))]},
}


ARCHITECTURES = [(f, m) for m in ("vitfold", "repq", "noisy") for f in FEATURES]
ARCHITECTURES += [(f, "ptq4vit") for f in ("map", "swiglu")]  # the slowest search


@pytest.mark.parametrize(("feature", "method"), ARCHITECTURES)
def test_every_architecture_calibrates(tiny_model, images, others, feature, method):
    model = tiny_model(**FEATURES[feature])
    done = calibrate(model, MERGE, recipe(8, method), images, scheme=FREE)
    least = 15 if feature == "none" else 25  # where nothing is pooled, a merge that flips moves whole rows
    assert sqnr_db(model, done, others) > least
    linears, attentions = find_sites(model.spec)
    assert set(done.quantizers) == {name for site in (*linears, *attentions) for name in site.names}
    twins = {site for site, q in done.quantizers.items() if isinstance(q, Twin) and q.rule == "sign"}
    if method == "ptq4vit":
        assert twins == {f"{s.layer}.x" for s in linears if s.activation is not None}
        assert bool(twins) == (feature != "swiglu"), "a product of two signs is no activation's output"


EXECUTED = [name for name in TARGETS if name not in ("simulation", "tensorrt-fp16", "tensorrt-fp8", "torch-fp8")]


def executed(done: Calibrated, name: str, pixels: Array, folder: Path, merge: MergeRecipe = MERGE) -> Array:
    def program(ops: Any, image: Any) -> Any:
        return forward(ops, done.model.spec, merge, image)

    projections = projections_of(plain_program(done.model.spec))
    graph = emit_graph(program, done.model, single(TARGETS[name]), done.quantizers, projections=projections)
    write_onnx(graph, folder / "model.onnx")
    return run_exactly(folder / "model.onnx", TARGETS[name], done.quantizers, pixels)


def assert_follows(found: Array, done: Calibrated, model: Model, name: str, pixels: Array) -> None:
    """One flip spreads over a model, so some images agree tightly and most are nearer than to the float model."""
    integer = TARGETS[name].quantized_product == "integer"
    expected = outputs(Simulate(done.model.params, done.quantizers, reordered=integer), done.model, pixels)
    exact = outputs(Run(model.params), model, pixels)
    errors, lost = (np.linalg.norm(found - other, axis=-1) for other in (expected, exact))
    assert errors.min() < 1e-5 * np.linalg.norm(expected, axis=-1).min()
    assert np.median(errors) < 0.5 * np.median(lost)


@pytest.mark.parametrize("name", EXECUTED)
def test_what_vitfold_finds_for_a_target_runs_there(wide, calibrated, others, tmp_path, name):
    target = TARGETS[name]
    done = calibrated(8, "vitfold", constraints_of(target))
    assert all(isinstance(q, Uniform) and q.axis in (None, 0) for q in done.quantizers.values())
    assert {q.bits for s, q in done.quantizers.items() if s.endswith(".w")} == {target.weight_bits}
    assert_follows(executed(done, name, others, tmp_path), done, wide, name, others)


@pytest.mark.parametrize("name", ["cpu-vnni", "cpu-avx2"])
def test_inputs_of_16_bits_run_as_two_products(wide, images, others, tmp_path, name):
    sites = {"blocks.*.mlp.fc2": "w8a16", "blocks.0.attn.qkv": "w8a16"}
    target = TARGETS[name]
    narrow = calibrate(wide, MERGE, recipe(8, "mse"), images, scheme=constraints_of(target))
    done = calibrate(wide, MERGE, recipe(8, "mse", sites=sites), images, scheme=constraints_of(target))
    assert {s for s, q in done.quantizers.items() if q.bits == 16} == {
        "blocks.0.mlp.fc2.x",
        "blocks.1.mlp.fc2.x",
        "blocks.0.attn.qkv.x",
    }
    found = executed(done, name, others, tmp_path)
    assert_follows(found, done, wide, name, others)
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    linears = [s for s in done.quantizers if s.endswith(".w")]
    assert operators.count("MatMulIntegerToFloat") >= len(linears) + 3
    assert sqnr_db(wide, done, others) > sqnr_db(wide, narrow, others)


def test_halves_of_wide_codes_hold_what_the_whole_does():
    whole = wide_uniform(3.0)
    coarse, fine = whole.halves()
    x = np.random.default_rng(0).uniform(-3, 3, 10_000).astype(np.float32)
    first = coarse(x)
    together = first + fine(x - first)
    assert np.abs(together - x).max() < 1.6 * float(whole.scale)
    np.testing.assert_allclose(together, whole(x), atol=1.01 * float(whole.scale))
    with pytest.raises(ValueError, match="16 bits"):
        coarse.halves()


def test_eight_bit_floats_run_as_they_are_simulated(wide, images, others, tmp_path):
    quant = QuantRecipe(format="float8", attention=True)
    done = calibrate(wide, MERGE, quant, images, scheme=constraints_of(TARGETS["tensorrt-fp8"]))
    linears, attentions = find_sites(wide.spec)
    assert set(done.quantizers) == {name for site in (*linears, *attentions) for name in site.names}
    assert all(isinstance(q, Float8) for q in done.quantizers.values())
    for site, q in done.quantizers.items():
        exponent = 7 if q.axis == 0 else 0
        np.testing.assert_array_equal(np.float16(np.ldexp(q.scale, exponent)), np.ldexp(q.scale, exponent), site)
    assert sqnr_db(wide, done, others) > 20
    assert_follows(executed(done, "tensorrt-fp8", others, tmp_path), done, wide, "tensorrt-fp8", others)


def test_a_target_for_tensorrt_keeps_its_attention_in_one_kernel(calibrated):
    """Nothing may stand between the attention and the codes that the projection reads."""
    done = calibrated(8, "vitfold", constraints_of(TARGETS["tensorrt-int8"]))
    for block in range(2):
        assert done.quantizers[f"blocks.{block}.attn.proj.x"].symmetric
        assert all(done.quantizers[f"blocks.{block}.attn.{name}"].symmetric for name in ("q", "k", "v", "softmax"))


@pytest.mark.parametrize("name", ["tensorrt-int8", "integer"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "vitfold"])
def test_what_other_methods_find_runs_too(wide, calibrated, others, tmp_path, name, method):
    done = calibrated(8, method, constraints_of(TARGETS[name]), find_method(method).runs_softmax)
    assert_follows(executed(done, name, others, tmp_path), done, wide, name, others)


def test_the_simulation_may_use_what_no_engine_executes(calibrated):
    free = calibrated(4, "vitfold", FREE).quantizers
    assert free["blocks.0.attn.q"].axis == 1  # type: ignore[union-attr]
    assert any(isinstance(q, (Twin, Log)) for s, q in free.items() if s.endswith(".softmax"))


@pytest.mark.parametrize("method", ["vitfold", "noisy"])
def test_the_same_input_gives_the_same_digest(tiny_model, images, method, monkeypatch, tmp_path):
    model = tiny_model()
    digests = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / folder))
        done = calibrate(model, MERGE, recipe(8, method, seed=seed), images, scheme=FREE)
        digests.append((done.quantizers.digest(), done.model.digest(), done.folded.digest()))
    assert digests[0] == digests[1]
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "b"))
    again = calibrate(model, MERGE, recipe(8, method, seed=1), images, scheme=FREE)
    assert (again.quantizers.digest(), again.model.digest(), again.folded.digest()) == digests[0], "from the cache too"


def test_what_the_recipe_keeps_float_stays_float(wide, calibrated, images, others):
    sites = {"blocks.0.*": "float", "head": "float", "blocks.1.mlp.fc2": "w8a8"}
    done = calibrate(wide, MERGE, recipe(4, "vitfold", sites=sites), images, scheme=FREE)
    quantized = {site.rpartition(".")[0] for site in done.quantizers}
    assert quantized == {f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "attn", "mlp.fc1", "mlp.fc2")}
    turned = turn_heads(rotate_streams(network_of(wide, MERGE))).params
    for name, array in turned.items():
        if name.startswith(("blocks.0.", "head", "norm", "patch_embed")):
            np.testing.assert_array_equal(done.model.params[name], array, name)
    assert done.quantizers["blocks.1.mlp.fc2.w"].bits == 8
    assert done.quantizers["blocks.1.mlp.fc1.w"].bits == 4
    assert sqnr_db(wide, done, others) > sqnr_db(wide, calibrated(4, "vitfold", FREE), others) + 3


def test_attention_stays_float_unless_asked_for(tiny_model, images):
    for attention in (False, None):
        done = calibrate(tiny_model(), MERGE, recipe(8, "minmax", attention=attention), images)
        assert {site[-2:] for site in done.quantizers} == {".x", ".w"}


def test_schemes_are_kept(tiny_model, images):
    done = calibrate(
        tiny_model(), MERGE, recipe(8, "mse"), images, scheme=QuantConstraints(symmetric=True, weight_bits=7)
    )
    behind_norms = ("attn.qkv.x", "mlp.fc1.x")
    for site, quantizer in done.quantizers.items():
        assert isinstance(quantizer, Uniform)
        assert quantizer.bits == (7 if site.endswith((".w", ".softmax")) else 8)
        if site.endswith(behind_norms):
            assert int(quantizer.zero_point) == 128, "in the middle of the codes, which is 0 in signed ones"
        elif not site.endswith(".x"):
            assert quantizer.symmetric
    assert any(int(done.quantizers[f"blocks.{i}.mlp.fc2.x"].zero_point) not in (0, 128) for i in range(2)), (
        "other inputs keep a zero point, which the lowering folds into the bias"
    )


def test_globs_that_match_nothing_are_named(tiny_model, images):
    with pytest.raises(RecipeError, match=r"no site matches 'blocks\.7\.\*'.*blocks\."):
        calibrate(tiny_model(), MERGE, recipe(sites={"blocks.7.*": "float"}), images)
    with pytest.raises(RecipeError, match="unknown quantization method 'vitfolt'.*vitfold"):
        calibrate(tiny_model(), MERGE, recipe(method="vitfolt"), images)


def test_too_few_images_are_refused(tiny_model, images):
    with pytest.raises(CalibrationError, match="1 calibration images are too few"):
        calibrate(tiny_model(), MERGE, recipe(), images.first(1))
    assert calibrate(tiny_model(), MERGE, recipe(), images.first(2)).quantizers


class Searches:
    """Counts searches by what progress says, and stops before one after some."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.most = 10**6
        self.progress = Progress(step=self._step)

    def _step(self, text: str) -> None:
        what, _, rest = text.partition(": ")
        if what == "searching ranges":
            if len(self.found) == self.most:
                raise KeyboardInterrupt
            self.found.append(rest.split()[0])


@pytest.fixture
def searches() -> Searches:
    return Searches()


@pytest.mark.parametrize("method", ["vitfold", "noisy"])
def test_a_second_run_searches_nothing(tiny_model, images, searches, method):
    first = calibrate(tiny_model(), MERGE, recipe(8, method), images, scheme=FREE, progress=searches.progress)
    assert len(searches.found) == 4 * 2 + 1 + 2
    second = calibrate(tiny_model(), MERGE, recipe(8, method), images, scheme=FREE, progress=searches.progress)
    assert len(searches.found) == 4 * 2 + 1 + 2
    assert second.quantizers.digest() == first.quantizers.digest()
    assert second.model.digest() == first.model.digest()


def test_an_interrupted_run_resumes(tiny_model, images, searches):
    searches.most = 4
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), MERGE, recipe(), images, progress=searches.progress)
    assert len(list((cache_folder() / "search").iterdir())) == 4
    searches.most = 10**6
    calibrate(tiny_model(), MERGE, recipe(), images, progress=searches.progress)
    assert len(searches.found) == len(set(searches.found)) == 4 * 2 + 1 + 2


def test_a_damaged_search_is_repeated(tiny_model, images, searches):
    first = calibrate(tiny_model(), MERGE, recipe(), images, progress=searches.progress)
    count = len(searches.found)
    entry = min((cache_folder() / "search").iterdir())
    whole = entry.read_bytes()
    for damaged in (b"", whole[:40], whole[:-1]):
        entry.write_bytes(damaged)
        again = calibrate(tiny_model(), MERGE, recipe(), images, progress=searches.progress)
        count += 1
        assert len(searches.found) == count
        assert again.quantizers.digest() == first.quantizers.digest()
        assert entry.read_bytes() == whole


def test_only_what_changed_is_searched_again(tiny_model, images, searches):
    calibrate(tiny_model(), MERGE, recipe(), images, progress=searches.progress)
    changes: list[tuple[QuantRecipe, QuantConstraints, set[str]]] = [
        (recipe(sites={"blocks.1.mlp.fc2": "w8a6"}), QuantConstraints(), {"blocks.1.mlp.fc2"}),
        (recipe(), QuantConstraints(weight_bits=7), {s.layer for s in find_sites(tiny_model().spec)[0]} | ATTENTIONS),
        (
            recipe(6, head_bits=8),
            QuantConstraints(),
            {s.layer for s in find_sites(tiny_model().spec)[0]} - {"head"} | ATTENTIONS,
        ),
    ]
    for quant, scheme, expected in changes:
        searches.found.clear()
        calibrate(tiny_model(), MERGE, quant, images, scheme=scheme, progress=searches.progress)
        assert set(searches.found) == expected


ATTENTIONS = {"blocks.0.attn", "blocks.1.attn"}
