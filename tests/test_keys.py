"""Keys of the cache: every content tells, and every field of what a result follows from reaches its key."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from quantizing import calibrating
from vitfold.artifacts.cache import key_of
from vitfold.quant import QuantConstraints, find_method
from vitfold.quant.collect import samples_key
from vitfold.recipe import MergeRecipe, PruneRecipe, QuantRecipe, Recipe, RegistersRecipe
from vitfold.registers.search import remedies_key
from vitfold.target import TARGETS

X = np.arange(6, dtype=np.float32)
CONTENTS: tuple[tuple[object, ...], ...] = (
    (),
    (X,),
    (X.reshape(2, 3),),
    (X.astype(np.float64),),
    (X, 1),
    (X, "1"),
    (X, 1.0),
    (X, True),
    (X, None),
    (X, (1, 2)),
    (X, (1,), (2,)),
    (X, {"a": 1}),
    (X, {"b": 1}),
    (X, {"a": {"b": 1}}),
    (X, find_method("mse")),
    (X, find_method("minmax")),
    (X, QuantConstraints()),
)

MERGE = MergeRecipe(r=(2, 2), order="index")
QUANT = QuantRecipe()
REGISTERS = RegistersRecipe(remedy="prefix", site="blocks.0.mlp.fc1")
OTHERS: dict[type, dict[str, Any]] = {
    MergeRecipe: {"r": (2, 3), "prop_attn": False, "order": "score", "rule": "evit", "compensate": True},
    QuantRecipe: {
        "weights": 4,
        "activations": 6,
        "method": "minmax",
        "attention": True,
        "calibration_size": 7,
        "seed": 3,
        "head_bits": 4,
        "format": "float8",
        "outputs": True,
        "calibrate_merged": True,
        "polish_minutes": 2.0,
        "sites": {"head": "float"},
    },
    PruneRecipe: {
        "mlp": PruneRecipe(mlp=0.25),
        "units": PruneRecipe(units=(32, 32)),
        "heads": PruneRecipe(heads=(1, 1)),
        "head_dims": PruneRecipe(head_dims=(8, 8)),
    },
    RegistersRecipe: {
        "remedy": "delete",
        "site": "blocks.1.mlp.fc1",
        "start": 1,
        "token": 1,
        "average": 2,
        "tau": 2.0,
        "block": 1,
        "deletions": 1,
        "deletion_site": RegistersRecipe(
            remedy="prefix", site="blocks.0.mlp.fc1", deletions=1, deletion_site="blocks.0.mlp.fc1"
        ),
        "sinks": 1,
        "layers": ("head",),
        "neurons": 1,
    },
}
PRUNE = PruneRecipe(mlp=0.5)
BASE = {MergeRecipe: MERGE, QuantRecipe: QUANT, RegistersRecipe: REGISTERS, PruneRecipe: PRUNE}
FIELDS = [(kind, field.name) for kind in BASE for field in fields(kind)]


def test_keys_tell_every_content():
    assert len({key_of(*content) for content in CONTENTS}) == len(CONTENTS)
    assert key_of(torch.from_numpy(X)) == key_of(X.copy())
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    with pytest.raises(TypeError, match="no part of a key"):
        key_of(object())


@dataclass(frozen=True)
class One:
    """A field added later changes the key of what was made before it."""

    a: int = 1


@dataclass(frozen=True)
class Two:
    """Another type with the same fields is another value."""

    a: int = 1


def test_types_tell():
    assert key_of(One()) != key_of(Two()) != key_of((1,))


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{kind.__name__}.{name}" for kind, name in FIELDS])
def test_every_field_of_a_recipe_reaches_every_key(tiny_model, photos, kind, name):
    """A recipe's own key, the key of calibration samples, and that of measured remedies, as far as they take it."""
    base = BASE[kind]
    given = OTHERS[kind][name]
    other = given if isinstance(given, kind) else replace(base, **{name: given})
    assert getattr(other, name) != getattr(base, name)
    assert key_of(base) != key_of(other)
    whole = Recipe(merge=MERGE, quant=QUANT, registers=REGISTERS, prune=PRUNE)
    place = {MergeRecipe: "merge", QuantRecipe: "quant", RegistersRecipe: "registers", PruneRecipe: "prune"}[kind]
    assert key_of(whole) != key_of(replace(whole, **{place: other}))
    model = tiny_model()
    if kind is MergeRecipe:
        keys = {samples_key(*calibrating(model, merge, photos), "fisher", 0, 8, 64) for merge in (base, other)}
        assert len(keys) == 2
    if kind in (MergeRecipe, QuantRecipe):
        changed = {place: other}
        keys = {
            remedies_key(model, used.get("merge", MERGE), used.get("quant", QUANT), photos) for used in ({}, changed)
        }
        assert len(keys) == 2


def test_every_choice_of_a_calibration_reaches_its_key(tiny_model, photos):
    model = tiny_model()
    calls = [
        (model, MERGE, photos, "fisher", 0, 8, 64),
        (tiny_model(seed=1), MERGE, photos, "fisher", 0, 8, 64),
        (model, MERGE, photos.first(3), "fisher", 0, 8, 64),
        (model, MERGE, photos, None, 0, 8, 64),
        (model, MERGE, photos, "gauss-newton", 0, 8, 64),
        (model, MERGE, photos, "fisher", 1, 8, 64),
        (model, MERGE, photos, "fisher", 0, 4, 64),
        (model, MERGE, photos, "fisher", 0, 8, 65),
    ]
    assert len({samples_key(*calibrating(*call[:3]), *call[3:]) for call in calls}) == len(calls)


@pytest.mark.parametrize("name", [field.name for field in fields(TARGETS["cpu"]) if field.name != "why"])
def test_every_field_of_a_target_tells(without_type_checks, name):
    value = getattr(TARGETS["cpu"], name)
    changed = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else f"{value}x"
    assert key_of(TARGETS["cpu"]) != key_of(replace(TARGETS["cpu"], **{name: changed}))
