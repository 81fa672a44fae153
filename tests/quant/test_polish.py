"""Polishing: gradients through rounding, what is trained, what is kept, and that nothing gets worse."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from picturing import gradient_pictures
from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.errors import CalibrationError, RecipeError
from vitfold.images import ImageSet
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.ops.straight import StraightThrough, round_through
from vitfold.pipeline.ladder import Cell, cell_from_dict, plan_cells
from vitfold.quant import Calibrated, QuantConstraints, calibrate
from vitfold.quant import polish as polishing
from vitfold.quant.network import ImageExamples, network_of
from vitfold.quant.polish import loss_of, polish_network
from vitfold.quantizer import Log, Twin, Uniform
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe, check_quant
from vitfold.report.tables import accuracy_rows

pytestmark = pytest.mark.usefixtures("own_cache")
MERGE = MergeRecipe(r=(5, 3))
W4A4 = QuantRecipe(weights=4, activations=4, attention=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """48 small pictures of random gradients."""
    return gradient_pictures(tmp_path_factory.mktemp("many"), 48)


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates at which two dozen updates show what they do."""
    for name, rate in (("_CODE_RATE", 1e-2), ("_RATE", 3e-4), ("_SCALE_RATE", 2e-3)):
        monkeypatch.setattr(polishing, name, rate)


def calibrated(model, images, quant=W4A4, *, symmetric=False) -> Calibrated:
    scheme = QuantConstraints(uniform_only=False, symmetric=symmetric)
    return calibrate(model, MERGE, quant, images, scheme=scheme)


def polished(model, done: Calibrated, images, *, updates=24, **options):
    return polish_network(
        network_of(model, MergeRecipe(r=())),
        network_of(done.model, MERGE),
        done.quantizers,
        ImageExamples(images=images, preprocess=model.preprocess),
        budget=float(updates),
        clock=itertools.count(0.0, 1.0).__next__,
        **options,
    )


def test_values_and_gradients_of_rounding_are_those_of_the_equation():
    """Q = s clamp(round(x / s)): dQ/dx is 1 within and 0 beyond, dQ/ds = q - x / s within and the end beyond."""
    quantizer = Uniform(scale=np.array(0.5), zero_point=np.array(3), low=0, high=7)
    x = torch.tensor([-9.0, -1.4, -0.1, 0.3, 1.1, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    for place, (code, inside) in enumerate([(-3, 0), (-3, 1), (0, 1), (1, 1), (2, 1), (4, 0)]):
        y = round_through(x, quantizer, scale)[place]
        dx, ds = torch.autograd.grad(y, (x, scale))
        assert y.item() == code * 0.5
        assert dx[place].item() == inside
        assert ds.item() == pytest.approx(code - inside * x[place].item() / 0.5, abs=1e-5)


def test_other_quantizers_round_as_the_simulation_does():
    half = Uniform(scale=np.array(0.1), zero_point=np.array(0), low=-8, high=0)
    rest = Uniform(scale=np.array(0.3), zero_point=np.array(0), low=0, high=7)
    x = torch.linspace(-1, 3, 41).requires_grad_()
    for quantizer in (Twin(rule="sign", inner=half, outer=rest), Log(scale=np.array(3.0), bits=3, root=2, offset=1.5)):
        y = round_through(x, quantizer)
        torch.testing.assert_close(y.detach(), fake_quantize(x.detach(), quantizer))
        assert torch.autograd.grad(y.sum(), x)[0].sum() > 10


@pytest.mark.parametrize("outputs", [False, True])
def test_without_training_it_is_the_simulation(tiny_model, many, outputs):
    model = tiny_model()
    quant = replace(W4A4, weights=8, activations=8, outputs=outputs)
    done = calibrated(model, many, quant, symmetric=outputs)
    assert any(site.endswith(".y") for site in done.quantizers) == outputs
    network = network_of(done.model, MERGE)
    inputs = next(ImageExamples(images=many, preprocess=model.preprocess).batches(8)).inputs
    straight = StraightThrough(done.model.params, done.quantizers, learned={}, scales={})
    found, expected = network.run(straight, inputs), network.run(Simulate(done.model.params, done.quantizers), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["vitfold", "ptq4vit"])
def test_held_out_images_gain_and_weights_stay_on_their_grids(tiny_model, many, method):
    model = tiny_model()
    done = calibrated(model, many, replace(W4A4, method=method))
    found = polished(model, done, many)
    record = found.record
    assert record.kept
    assert record.loss_after < record.loss_before
    assert (record.images, record.held_out, record.updates) == (42, 6, 23)
    for site, quantizer in found.quantizers.items():
        if site.endswith(".w"):
            assert isinstance(quantizer, Uniform)
            name = f"{site[:-2]}.weight"
            np.testing.assert_allclose(found.params[name], quantizer(found.params[name]), atol=1e-6)
    moved = [name for name, value in found.params.items() if not np.array_equal(value, done.model.params[name])]
    assert {name.rpartition(".")[2] for name in moved} >= {"weight", "bias"}
    assert any("norm" in name for name in moved)
    assert {site: type(q) for site, q in found.quantizers.items()} == {s: type(q) for s, q in done.quantizers.items()}


def test_the_record_tells_the_loss_of_what_is_returned(tiny_model, many):
    model = tiny_model()
    done = calibrated(model, many)
    found = polished(model, done, many)
    inputs = torch.cat([b.inputs[0] for b in ImageExamples(images=many, preprocess=model.preprocess).batches(16)])
    held = (inputs[7::8],)
    teacher, network = network_of(model, MergeRecipe(r=())), network_of(done.model, MERGE)
    wanted = teacher.run(Simulate(model.params, {}), held)
    for params, quantizers, loss in (
        (done.model.params, done.quantizers, found.record.loss_before),
        (found.params, found.quantizers, found.record.loss_after),
    ):
        outputs = network.run(Simulate(params, quantizers), held)
        assert float(loss_of(outputs, wanted, model.spec.head)) == pytest.approx(loss, rel=1e-4)


def test_a_seed_and_as_many_updates_give_the_same(tiny_model, many):
    model = tiny_model()
    done = calibrated(model, many)
    one, two = (polished(model, done, many, updates=8, seed=3) for _ in range(2))
    other = polished(model, done, many, updates=8, seed=4)
    assert one.record == two.record
    assert all(np.array_equal(one.params[name], two.params[name]) for name in one.params)
    assert one.record.loss_after != other.record.loss_after


def test_what_helps_nothing_is_not_kept(tiny_model, many, monkeypatch):
    for rate in ("_CODE_RATE", "_RATE", "_SCALE_RATE"):
        monkeypatch.setattr(polishing, rate, 3.0)
    model = tiny_model()
    done = calibrated(model, many, QuantRecipe(attention=True))
    found = polished(model, done, many, updates=6)
    assert not found.record.kept
    assert found.record.loss_after == found.record.loss_before
    assert found.params is done.model.params
    assert found.quantizers is done.quantizers
    assert "calibrated model is kept" in pipeline.calibration.explain_polish(found.record.to_dict())


def test_features_have_a_loss_without_scale():
    wanted = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert loss_of(1.5 * wanted, wanted, "regression").item() == pytest.approx(0.25)
    assert loss_of(wanted, wanted, "single_label").item() == pytest.approx(0.0, abs=1e-6)
    assert loss_of(wanted + 1, wanted, "multi_label") > loss_of(wanted, wanted, "multi_label")


def test_half_precision_scales_stay_representable(tiny_model, many):
    model = tiny_model()
    scheme = QuantConstraints(symmetric=True, half_scales=True)
    done = calibrate(model, MERGE, replace(W4A4, activations=8), many, scheme=scheme)
    found = polished(model, done, many, half_scales=True)
    assert found.record.kept
    for site, quantizer in found.quantizers.items():
        if isinstance(quantizer, Uniform) and quantizer.axis is None:
            assert np.float16(quantizer.scale) == quantizer.scale, site


def test_too_few_images_and_no_gradient_are_refused(tiny_model, many):
    model = tiny_model()
    done = calibrated(model, many)
    with pytest.raises(CalibrationError, match="8 images are too few to polish with"):
        polished(model, done, many.first(8))
    with pytest.raises(RecipeError, match="no gradient"):
        polishing._backward(torch.zeros(()))


def test_recipes_say_how_long():
    assert check_quant({"polish_minutes": 3.0}, name="file").polish_minutes == 3.0
    assert "polish_minutes" not in Recipe(quant=QuantRecipe()).to_dict()["quant"]
    assert Recipe(quant=QuantRecipe(polish_minutes=2.0)).to_dict()["quant"]["polish_minutes"] == 2.0
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(RecipeError, match="polish_minutes is a number of minutes"):
            QuantRecipe(polish_minutes=wrong)
    with pytest.raises(RecipeError, match="fp8 has none"):
        QuantRecipe(polish_minutes=1.0, format="float8")


def test_a_ladder_has_cells_with_and_without():
    cells = plan_cells(["vitfold"], ["w4a4"], [0], polish=[0.0, 6.0])
    assert [cell.polish for cell in cells] == [0.0, 6.0]
    assert "polish" not in cells[0].to_dict()
    assert [cell_from_dict(cell.to_dict()) for cell in cells] == cells
    assert cells[1] == Cell(method="vitfold", scheme="W4A4", seed=0, engine="simulation", polish=6.0)
    fidelities = ({"top1": 0.8}, {"top1": 0.9})
    rows = [{**cell.to_dict(), "fidelity": one} for cell, one in zip(cells, fidelities, strict=True)]
    _, body = accuracy_rows({"source": "mine", "rows": rows})
    assert body == [["vitfold", "simulated", "80.00"], ["vitfold + polish 6 min", "simulated", "90.00"]]


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
def test_a_bundle_is_polished_and_says_so(tiny_model, many, tmp_path: Path, scheme):
    weights, activations = int(scheme[1]), int(scheme[3])
    quant = QuantRecipe(weights=weights, activations=activations, polish_minutes=0.02)
    plan = pipeline.optimize(tiny_model(), recipe=Recipe(merge=MERGE, quant=quant))
    done = pipeline.calibrate_plan(plan, many)
    assert done.calibration is not None
    record = done.calibration["polish"]
    assert record["updates"] >= 1
    assert record["loss_after"] <= record["loss_before"]
    assert any("polished: " in remark for remark in done.remarks)
    bundle = pipeline.save(done, tmp_path / "out.fold", images=many)
    manifest = open_bundle(bundle.path).manifest
    assert manifest.recipe.quant is not None
    assert manifest.recipe.quant.polish_minutes == 0.02
    assert manifest.calibration is not None
    assert manifest.calibration["polish"] == record
