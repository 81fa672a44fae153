"""Registers on models with sinks: curated as a slow loop would, measured, chosen, and what they are for is reached."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitfold import pipeline
from vitfold.architectures.programs import forward
from vitfold.errors import RecipeError
from vitfold.images import batches
from vitfold.ops.record import Record
from vitfold.ops.run import Run
from vitfold.quant import Progress
from vitfold.recipe import MergeRecipe, QuantRecipe, RegistersRecipe, tokens_per_block
from vitfold.registers import (
    REMEDIES,
    curate,
    explain,
    fold_registers,
    measure_likeness,
    measure_norms,
    measure_remedies,
)
from vitfold.registers.neurons import find_neurons
from vitfold.registers.probe import Effect, Probe
from vitfold.registers.remedies import Case
from vitfold.registers.search import FINALISTS, SCREEN_IMAGES, RemedyResult, RemedySearchResult, _Search, ranked

SITE = "blocks.3.mlp.fc2"
NONE = MergeRecipe(r=())


def seen_on(model, images, names):
    """What the sites of these names see, over all images."""
    found = {}
    ops = Record(model.params, lambda name, x: found.setdefault(name, []).append(x.clone()) if name in names else None)
    with torch.inference_mode():
        for group in batches(images, model.preprocess, batch=4):
            forward(ops, model.spec, NONE, torch.from_numpy(group.pixel_values))
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_candidates_are_the_largest_patches_of_all_images(planted, pictures):
    model = planted("clip")
    found = curate(model, pictures, SITE, count=5, batch=3)
    seen = seen_on(model, pictures, {f"{SITE}.x", "blocks.5.attn.k", "blocks.0.attn.v"})
    norms = seen[f"{SITE}.x"].abs().amax(-1)
    slow = sorted(((float(norms[i, n]), i, n) for i in range(12) for n in range(1, 65)), reverse=True)[:5]
    assert [tuple(place) for place in found.place] == [(i, n) for _, i, n in slow]
    assert np.allclose(found.norm, [norm for norm, _, _ in slow], rtol=1e-4)
    for row, (_, i, n) in enumerate(slow):
        assert np.allclose(found.k[row, 5], seen["blocks.5.attn.k"][i, :, n], atol=1e-4)
        assert np.allclose(found.v[row, 0], seen["blocks.0.attn.v"][i, :, n], atol=1e-4)
    again = curate(model, pictures, SITE, count=5, batch=3)
    assert np.array_equal(again.k, found.k)
    k, _ = found.register(1, 3)
    assert np.allclose(k, found.k[1:4].mean(0))
    with pytest.raises(RecipeError, match="ask for 7 candidates, the images gave 5"):
        found.register(4, 3)


def test_norms_are_those_of_the_tokens(planted, pictures):
    model = planted("clip")
    found = measure_norms(model, pictures, batch=5)
    seen = []
    with torch.inference_mode():
        for group in batches(pictures, model.preprocess, batch=12):
            pixels = torch.from_numpy(group.pixel_values)
            forward(Run(model.params), model.spec, NONE, pixels, observe=lambda _, tokens: seen.append(tokens.x))
    norms = torch.stack(seen[1:], 1).abs().amax(-1)
    assert np.allclose(found.patches, norms[:, :, 1:], rtol=1e-3)
    assert np.allclose(found.mean_norm, norms.mean((0, 2)), rtol=1e-3)
    assert found.rarest == 3
    assert np.allclose(found.max_norm, np.maximum(found.prefix_norm, found.patch_norm))
    assert found.max_norm[3] > 10 * found.mean_norm[2]
    assert found.patch_norm[3] > 10 * found.prefix_norm[3]
    without = measure_norms(planted("siglip"), pictures)
    assert not without.prefix_norm.any()


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_sinks_of_different_images_are_alike(planted, pictures, family):
    """Against every pair of patches; in towers with sinks as in those of the paper, 0.89 against 0.26."""
    model = planted(family)
    few = pictures.first(3)
    found = measure_likeness(model, few, SITE, batch=2)
    rows = seen_on(model, few, {f"{SITE}.x"})[f"{SITE}.x"][:, model.spec.prefix :].double().numpy()
    largest = np.abs(rows).max(-1).argmax(1)
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    sinks = [unit[i, largest[i]] @ unit[j, largest[j]] for i, j in pairs]
    others = [np.delete(unit[i], largest[i], 0) @ np.delete(unit[j], largest[j], 0).T for i, j in pairs]
    assert found.outliers == pytest.approx(np.mean(sinks), abs=1e-4)
    assert found.others == pytest.approx(np.mean(others), abs=1e-4)
    assert found.outliers > found.others + 0.3
    with pytest.raises(ValueError, match="two images"):
        measure_likeness(model, pictures.first(1), SITE)


def test_the_whole_grid_is_screened_and_its_best_are_measured(tiny_model, photos):
    """Every candidate with every number of copies; those of highest SQNR on few images, each measured by itself."""
    model, said, size = tiny_model(image_size=(16, 16)), [], (16, 16)
    sizes = {"resize": "exact", "resize_size": size, "crop_size": size}
    model = replace(model, preprocess=replace(model.preprocess, **sizes))
    found = measure_remedies(model, NONE, QuantRecipe(), photos, names=["prefix"], progress=Progress(step=said.append))
    case = found.case
    (best,) = [one.recipe for one in found.remedies if one.name == "prefix"]
    big = tiny_model().spec
    grid = REMEDIES["prefix"].wide(best, case)
    ranks = 2 * model.spec.patches
    assert {(one.token, one.tau) for one in grid} == {(z, tau) for z in range(ranks) for tau in range(1, 16)}
    assert (
        len(grid)
        == ranks * 15
        < len(REMEDIES["prefix"].wide(best, Case(spec=big, site=case.site, noise=())))
        == 20 * 15
    )
    assert {(one.average, one.start) for one in grid} == {(1, case.block)}
    assert len([text for text in said if text.startswith("screening candidates")]) == ranks
    assert f"measuring prefix: {FINALISTS}/{FINALISTS}" in said
    search = _Search(model, NONE, QuantRecipe(), photos, Progress())
    some = [one for one in grid if one.token == 5]
    probe = Probe(model, NONE, QuantRecipe(), photos.first(SCREEN_IMAGES))
    alone = {one: probe.effect(fold_registers(model, one, photos), case.site).sqnr_db for one in some}
    assert search.finalists(some, case.site) == sorted(some, key=lambda one: -alone[one])[:FINALISTS]


def test_what_was_chosen_is_explained(planted):
    def measured(name, sqnr_db, **settings):
        effect = Effect(max_norm=1.0, block_norm=1.0, cosine=1.0, sqnr_db=sqnr_db, right=None)
        recipe = None if name == "none" else RegistersRecipe(remedy=name, site=SITE, **settings)
        return RemedyResult(name=name, recipe=recipe, effect=effect)

    nothing = measured("none", 9.0)
    regcache = measured("regcache", 17.0, start=4, token=3, tau=5.0, deletions=2, deletion_site=SITE)
    case = Case(spec=planted("clip").spec, site=SITE, noise=((SITE, 1.0),))

    def said(*rows, chosen):
        return explain(RemedySearchResult(case=case, remedies=(nothing, *rows), chosen=chosen))

    better, alike = measured("float-sinks", 22.0), measured("leave-out", 16.9)
    text = said(regcache, better, chosen=better)
    assert "float-sinks is taken: 22.0 dB" in text
    assert f"candidate 3, mean of 1, tau 5, 2 deletions at {SITE}): 17.0 dB" in text
    assert "costs less at run time" in said(regcache, alike, chosen=alike)
    assert "which is not worth 0.3 dB" in said(measured("prefix", 9.1), chosen=nothing)
    assert said(regcache, chosen=regcache).endswith("nothing done: 9.0 dB under plain ranges")


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_registers_and_deletion_take_the_sinks_away_and_most_of_the_gap(planted, pictures, family):
    model = planted(family)
    probe = Probe(model, NONE, QuantRecipe(), pictures)
    nothing = probe.effect(model, SITE)
    recipe = RegistersRecipe(remedy="regcache", site=SITE, start=2, tau=4.0, average=4, block=3, deletions=2)
    cured = probe.effect(fold_registers(model, recipe, pictures), SITE)
    assert cured.max_norm < 0.25 * nothing.max_norm
    assert cured.block_norm < 0.25 * nothing.block_norm
    assert 1 - cured.cosine < 0.3 * (1 - nothing.cosine)


def test_the_sensitive_layer_is_found_and_the_best_remedy_chosen(planted, pictures):
    said = []
    names = ["leave-out", "float-sinks"]
    model, quant = planted("clip"), QuantRecipe()
    found = measure_remedies(model, NONE, quant, pictures, names=names, progress=Progress(step=said.append))
    assert found.site == SITE
    assert [one.name for one in found.remedies] == ["none", *names]
    assert found.chosen.effect.sqnr_db == max(one.effect.sqnr_db for one in found.remedies)
    assert found.chosen.effect.sqnr_db > found.remedies[0].effect.sqnr_db + 3
    assert any(text.startswith("measuring leave-out") for text in said)
    said.clear()
    again = measure_remedies(model, NONE, quant, pictures, names=names, progress=Progress(step=said.append))
    assert again == found
    assert not any(text.startswith(("quantizing", "float model")) for text in said)


def test_top_1_of_a_few_images_does_not_outvote_their_outputs():
    def effect(sqnr_db: float, right: int) -> Effect:
        return Effect(
            max_norm=1.0, block_norm=1.0, cosine=1.0, sqnr_db=sqnr_db, right=tuple(i < right for i in range(64))
        )

    def measured(name: str, sqnr_db: float, right: int) -> RemedyResult:
        return RemedyResult(name=name, recipe=None, effect=effect(sqnr_db, right))

    lucky, close, ruinous = measured("delete", 6.0, 34), measured("prefix", 30.0, 32), measured("neurons", 40.0, 10)
    assert [one.name for one in ranked([lucky, close, ruinous])] == ["prefix", "delete", "neurons"]
    cheap, slightly_better = measured("leave-out", 29.8, 31), measured("float-sinks", 29.9, 30)
    assert [one.name for one in ranked([cheap, slightly_better])] == ["leave-out", "float-sinks"]


def test_tokens_apart_are_few(planted, pictures):
    model = planted("clip")
    case = Case(spec=replace(model.spec, image_size=(16, 16)), site=SITE, noise=((SITE, 1.0),))
    assert case.spec.tokens < 8
    assert {recipe.sinks for recipe in REMEDIES["float-sinks"].grid(case)} == {1}
    recipe = RegistersRecipe(remedy="float-sinks", site=SITE, layers=(SITE,), sinks=model.spec.tokens)
    spec = fold_registers(model, recipe, pictures).spec
    with pytest.raises(RecipeError, match=f"sinks apart at {SITE} leave nothing to quantize of"):
        tokens_per_block(spec, ())


def test_a_probe_measures_what_a_whole_run_would(planted, pictures):
    """Runs from the middle on the kept tokens equal runs from the images."""
    model = planted("clip")
    probe = Probe(model, NONE, QuantRecipe(), pictures, batch=5)
    recipe = RegistersRecipe(remedy="prefix", site=SITE, start=4, tau=2.0)
    changed = fold_registers(model, recipe, pictures)
    whole = replace(changed, spec=replace(changed.spec, sinks=replace(changed.spec.sinks, leave_out=0)))
    late = probe.effect(whole, SITE)
    early = Probe(model, NONE, QuantRecipe(), pictures, batch=5)
    full = early.effect(whole, SITE, first=0)
    assert late.sqnr_db == pytest.approx(full.sqnr_db, abs=1e-3)
    assert late.max_norm == pytest.approx(full.max_norm)


def test_left_out_tokens_do_not_reach_the_statistics(planted, pictures):
    model = planted("clip")
    probe = Probe(model, NONE, QuantRecipe(), pictures)
    recipe = RegistersRecipe(remedy="leave-out", site=SITE, sinks=4)
    assert probe.effect(fold_registers(model, recipe, pictures), SITE).sqnr_db > probe.effect(model, SITE).sqnr_db + 3


def test_register_neurons_are_the_ones_that_were_planted(planted, pictures):
    model = planted("clip")
    assert (3, 0) in find_neurons(model, pictures, SITE, 1)
    cured = fold_registers(model, RegistersRecipe(remedy="neurons", site=SITE, neurons=1), pictures)
    assert cured.spec.registers == 1
    assert cured.spec.tokens == model.spec.tokens + 1
    norms = seen_on(cured, pictures, {f"{SITE}.x"})[f"{SITE}.x"].abs().amax(-1)
    assert norms[:, 1].min() > 10 * norms[:, 2:].max()


def test_a_register_of_zeros_that_nothing_moves_to_is_one_more_token(tiny_model, random_images, run_torch, photos):
    model = tiny_model(pool="none", outputs=0, output="last_hidden_state")
    recipe = RegistersRecipe(remedy="neurons", site="blocks.1.mlp.fc2", neurons=2)
    cured = fold_registers(model, recipe, photos)
    images = random_images(model.spec, 2)
    assert run_torch(cured, images).shape == run_torch(model, images).shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remedy": "prefix", "site": "blocks.9.mlp.fc2"}, r"no block has a linear layer 'blocks\.9\.mlp\.fc2'"),
        ({"remedy": "prefix", "site": "head"}, "no block has a linear layer 'head'"),
        ({"remedy": "prefix", "site": SITE, "start": 12}, r"registers\.start = 12; the model has 8 blocks"),
        ({"remedy": "delete", "site": SITE, "block": 8, "deletions": 1}, r"registers\.block = 8"),
        ({"remedy": "delete", "site": SITE, "deletions": 64}, "the model has 64 patch tokens"),
        (
            {"remedy": "delete", "site": SITE, "deletions": 1, "deletion_site": "blocks.3.mlp.fc3"},
            r"no tokens go at 'blocks\.3\.mlp\.fc3'; did you mean blocks\.3\.mlp\.fc",
        ),
        (
            {"remedy": "regcache", "site": SITE, "deletions": 1, "deletion_site": "blocks.3.attn.proj"},
            r"no tokens go at 'blocks\.3\.attn\.proj'",
        ),
        ({"remedy": "float-sinks", "site": SITE, "sinks": 2, "layers": ("blocks.3.mlp.fc9",)}, "did you mean"),
        ({"remedy": "prefix", "site": SITE, "token": 30, "average": 9}, "lower them or give more images"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(planted, pictures, fields, message):
    with pytest.raises(RecipeError, match=message):
        fold_registers(planted("clip"), RegistersRecipe(**fields), pictures)


def test_models_without_prefix_tokens_have_no_scales_to_split(planted, pictures):
    recipe = RegistersRecipe(remedy="split-scales", site=SITE, layers=(SITE,))
    with pytest.raises(RecipeError, match="this model has none; try --registers auto"):
        fold_registers(planted("siglip"), recipe, pictures)
    case = Case(spec=planted("siglip").spec, site=SITE, noise=((SITE, 1.0),))
    assert REMEDIES["split-scales"].grid(case) == []


def test_the_noisiest_layers_make_a_share_of_the_noise(planted):
    noise = (
        ("blocks.3.attn.proj", 9.0),
        ("blocks.3.mlp.fc2", 3.0),
        ("blocks.2.mlp.fc1", 2.0),
        ("blocks.0.attn.qkv", 1.0),
    )
    case = Case(spec=planted("clip").spec, site=SITE, noise=noise)
    assert case.noisiest(0.0) == ("blocks.3.mlp.fc2",)
    assert case.noisiest(0.5) == ("blocks.3.mlp.fc2",)
    assert case.noisiest(0.6) == ("blocks.3.mlp.fc2", "blocks.2.mlp.fc1")
    assert len(case.noisiest(1.0)) == 3


@pytest.mark.parametrize("method", ["vitfold", "repq", "noisy"])
@pytest.mark.parametrize("remedy", ["regcache", "split-scales", "float-sinks", "leave-out"])
def test_every_remedy_goes_with_methods_and_merging(tiny_model, photos, remedy, method):
    recipe = RegistersRecipe(
        remedy=remedy,
        site="blocks.0.mlp.fc2",
        start=1,
        tau=2.0,
        block=1,
        deletions=2 if remedy == "regcache" else 0,
        sinks=2,
        layers=("blocks.*.mlp.fc*",),
    )
    model = tiny_model()
    folded = pipeline.optimize(
        model, merge="2,2", quant=QuantRecipe(method=method, calibration_size=6), registers=recipe, target="portable"
    )
    done = pipeline.calibrate_plan(folded, photos)
    assert done.tokens == ((17, 13, 11) if remedy == "regcache" else (17, 15, 13))
    assert done.folded.spec.sinks is not None
    pixels = next(iter(batches(photos, model.preprocess, batch=6))).pixel_values
    found = pipeline.run_reference(done, pixels)
    with torch.inference_mode():
        sinks = fold_registers(model, recipe, photos)
        exact = forward(Run(sinks.params), sinks.spec, done.recipe.merge, torch.from_numpy(pixels)).numpy()
    assert np.linalg.norm(found - exact) < 0.1 * np.linalg.norm(exact)


def test_deletions_that_merging_leaves_no_room_for_are_not_tried(tiny_model, photos):
    found = measure_remedies(tiny_model(), MergeRecipe(r=(8, 3)), QuantRecipe(), photos, names=["delete", "leave-out"])
    assert [one.name for one in found.remedies if one.name == "delete"] in ([], ["delete"])
    for one in found.remedies:
        assert one.recipe is None or one.recipe.deletions <= 3


@pytest.mark.usefixtures("without_type_checks")
def test_registers_without_quantization_and_wrong_names_are_refused(tiny_model):
    with pytest.raises(RecipeError, match="registers help quantization"):
        pipeline.optimize(tiny_model(), registers="auto")
    with pytest.raises(RecipeError, match="did you mean regcache"):
        pipeline.optimize(tiny_model(), quant="w8a8", registers="regcach")
    assert pipeline.optimize(tiny_model(), quant="w8a8", registers="none").recipe.registers is None


@pytest.mark.parametrize(("size", "sites"), [((112, 288), {}), ((128, 256), {"blocks.1.attn": "float"})])
def test_a_register_that_makes_attention_too_long_for_one_kernel_keeps_it_in_half_precision(
    tiny_model, photos, size, sites
):
    """TensorRT's fused INT8 attention takes 512 tokens: 504 and a register, but not 512 and one."""
    model = tiny_model(image_size=size, class_token=False, pool="avg", head_dim=32)
    sizes = {"resize": "exact", "resize_size": size, "crop_size": size}
    model = replace(model, preprocess=replace(model.preprocess, **sizes))
    assert model.spec.tokens == (512 if sites else 504)
    recipe = RegistersRecipe(remedy="prefix", site="blocks.0.mlp.fc2", start=1)
    folded = pipeline.optimize(model, quant="w8a8", registers=recipe, target="tensorrt-int8")
    done, found = pipeline.find_registers(folded, photos)
    assert found is None
    assert done.recipe.quant.sites == sites
    assert ["513 tokens" in remark for remark in done.remarks] == [True] * len(sites)


@pytest.mark.parametrize("target", ["cpu", "openvino", "integer", "tensorrt-int8", "tensorrt-fp8"])
@pytest.mark.parametrize("remedy", ["regcache", "split-scales", "float-sinks"])
def test_bundles_with_remedies_are_verified_on_every_engine(tiny_model, photos, tmp_path, remedy, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    recipe = RegistersRecipe(
        remedy=remedy,
        site="blocks.0.mlp.fc2",
        start=0,
        tau=3.0,
        block=1,
        deletions=2,
        sinks=2,
        layers=("blocks.*.mlp.fc*",),
    )
    quant = QuantRecipe(method="minmax", calibration_size=6, format="float8" if target.endswith("fp8") else "integer")
    model = tiny_model(head_dim=32)
    folded = pipeline.optimize(model, merge="2,0", quant=quant, registers=recipe, target=target)
    bundle = pipeline.save(pipeline.calibrate_plan(folded, photos), tmp_path / "a.fold", images=photos)
    assert bundle.manifest.recipe.registers == recipe
    assert bundle.manifest.fidelity["cosine"] > 0.9
