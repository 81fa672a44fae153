"""Specs and models: what cannot exist, what survives as JSON, what a digest sees."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from vitfold.errors import SourceError
from vitfold.model import param_shapes, spec_to_dict, vit_spec_from_dict

MISFITS = {
    "patch size": (
        {"image_size": (32, 7)},
        r"image size 7 \(axis 1\) is smaller than the patch size 8",
    ),
    "no patches": ({"image_size": (0, 32)}, r"image size 0 \(axis 0\)"),
    "embed_dim": ({"embed_dim": 0}, "embed_dim must be positive, found 0"),
    "num_layers": ({"num_layers": -1}, "num_layers must be positive"),
    "token pool": ({"class_token": False}, "pool 'token' needs a class token"),
    "token_avg pool": ({"class_token": False, "pool": "token_avg"}, "pool 'token_avg' needs a class token"),
    "dist pool": ({"pool": "token_dist"}, "needs a distillation token"),
    "no outputs": ({"outputs": 0}, "a classifier needs outputs"),
    "map without heads": ({"pool": "map"}, "map_heads that divide the width 32"),
    "map with odd heads": ({"pool": "map", "map_heads": 5}, "map_heads that divide the width 32"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_spec_that_makes_no_sense_is_refused(tiny_model, case):
    overrides, message = MISFITS[case]
    with pytest.raises(SourceError, match=message):
        tiny_model(**overrides)


@pytest.mark.parametrize("overrides", [{}, {"image_size": (24, 40)}, {"registers": 4, "pool": "avg", "mlp": "swiglu"}])
def test_spec_survives_json(tiny_model, overrides):
    spec = tiny_model(**overrides).spec
    assert vit_spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_an_unknown_spec_key_is_refused(tiny_model):
    values = spec_to_dict(tiny_model().spec)
    with pytest.raises(SourceError, match=r"unknown spec key 'rope'.*upgrade vitfold"):
        vit_spec_from_dict(values | {"rope": True})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "name", ["activation", "map_activation", "mlp", "pos_embed", "pool", "head_activation", "output"]
)
def test_an_unknown_word_in_a_spec_lists_the_supported_ones(tiny_model, name):
    values = spec_to_dict(tiny_model().spec)
    with pytest.raises(SourceError, match=rf"^unsupported {name} 'mish'; supported: \w+, "):
        vit_spec_from_dict(values | {name: "mish"})


@pytest.mark.parametrize(
    ("overrides", "prefix", "tokens"),
    [
        ({}, 1, 17),
        ({"class_token": False, "pool": "avg"}, 0, 16),
        ({"dist_token": True, "registers": 3}, 5, 21),
        ({"image_size": (24, 48)}, 1, 19),
    ],
)
def test_tokens_of_a_spec(tiny_model, overrides, prefix, tokens):
    spec = tiny_model(**overrides).spec
    assert (spec.prefix, spec.tokens) == (prefix, tokens)


def changed(model, **params):
    return {**model.params, **params}


def test_misfitting_parameters_are_refused(tiny_model):
    model = tiny_model()
    missing = {name: array for name, array in model.params.items() if name != "norm.weight"}
    with pytest.raises(SourceError, match=r"missing \['norm.weight'\], unexpected none"):
        model.with_params(model.spec, missing)
    with pytest.raises(SourceError, match=r"missing none, unexpected \['ls9'\]"):
        model.with_params(model.spec, changed(model, ls9=np.ones(3, np.float32)))
    with pytest.raises(SourceError, match=r"head.weight has shape \(32, 10\), the architecture needs \(10, 32\)"):
        model.with_params(model.spec, changed(model, **{"head.weight": model.params["head.weight"].T}))
    with pytest.raises(SourceError, match=r"head.bias has type float64; parameters are float32"):
        model.with_params(model.spec, changed(model, **{"head.bias": np.zeros(10)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_refused(tiny_model, bad):
    model = tiny_model()
    weight = model.params["blocks.1.mlp.fc1.weight"].copy()
    weight[3, 4] = bad
    with pytest.raises(SourceError, match=r"weight blocks.1.mlp.fc1.weight holds 1 values that are NaN or infinite"):
        model.with_params(model.spec, changed(model, **{"blocks.1.mlp.fc1.weight": weight}))


def test_opposite_infinities_do_not_cancel(tiny_model):
    model = tiny_model()
    bias = model.params["head.bias"].copy()
    bias[:2] = np.inf, -np.inf
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(SourceError, match=r"head\.bias holds 2 values that are NaN or infinite"),
    ):
        model.with_params(model.spec, changed(model, **{"head.bias": bias}))


def test_parameters_cannot_be_replaced_in_place(tiny_model):
    with pytest.raises(TypeError):
        tiny_model().params["head.bias"] = np.zeros(10, np.float32)


def test_labels_must_fit_the_outputs(tiny_model):
    model = tiny_model()
    assert replace(model, labels=tuple("abcdefghij")).labels is not None
    with pytest.raises(SourceError, match="9 labels for 10 outputs"):
        replace(model, labels=tuple("abcdefghi"))


def test_digest_sees_spec_preprocessing_and_every_parameter(tiny_model):
    model = tiny_model()
    assert tiny_model().digest() == model.digest()
    assert replace(model, labels=tuple("abcdefghij")).digest() == model.digest()
    seen = {model.digest(), tiny_model(norm_eps=1e-5).digest()}
    seen.add(replace(model, preprocess=replace(model.preprocess, interpolation="bilinear")).digest())
    for name, array in model.params.items():
        moved = array.copy()
        moved.reshape(-1)[-1] += 1
        seen.add(model.with_params(model.spec, changed(model, **{name: moved})).digest())
    assert len(seen) == 3 + len(model.params)


def test_optional_parameters_are_biases_of_linear_layers(tiny_model):
    required, optional = param_shapes(tiny_model(pool="map", map_heads=4, map_mlp_width=8).spec)
    assert all(name.endswith(".bias") for name in optional)
    assert all(len(required[name.replace(".bias", ".weight")]) in (2, 4) for name in optional)


def test_the_digest_of_a_model_stays_what_it_was_in_the_first_version():
    """Bundles, caches and features name models by it."""
    pytest.importorskip("timm", reason="timm is not installed")
    import vitfold
    from vitfold.sources.dit import load_dit

    assert vitfold.load("demo").digest() == "58de4ab56a362169884eb3977268ade731c39c6552133fa456015e472fab585e"
    assert load_dit("demo-dit").digest() == "d485ac796c7515f56f15b5790e36bd673a7f81954245a397afdc450f4d484841"
