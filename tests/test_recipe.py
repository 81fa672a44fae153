"""Recipes: TOML there and back, loud misfits, digests, and the arithmetic of token counts."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specs import vit_base
from vitfold.errors import RecipeError
from vitfold.recipe import (
    MergeRecipe,
    QuantRecipe,
    Recipe,
    RegistersRecipe,
    check_keys,
    largest_r,
    parse_recipe,
    recipe_from_dict,
    tokens_per_block,
)

schedules = st.lists(st.integers(0, 500), max_size=12).map(tuple)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(r=schedules, prop_attn=st.booleans(), compensate=st.booleans())
def test_toml_round_trip(r, prop_attn, compensate):
    recipe = Recipe(merge=MergeRecipe(r=r, prop_attn=prop_attn, compensate=compensate))
    read = recipe_from_dict(parse_recipe(recipe.to_toml(), name="x.toml"), name="x.toml")
    assert read == recipe
    assert read.digest() == recipe.digest()


def test_an_empty_recipe_is_the_lossless_default():
    recipe = recipe_from_dict(parse_recipe("", name="x.toml"), name="x.toml")
    assert recipe == Recipe()
    assert recipe.is_lossless
    assert recipe.merge.prop_attn
    assert not Recipe(merge=MergeRecipe(r=(0, 1))).is_lossless


def test_unresolved_values_pass_parsing_but_not_rebuilding():
    values = parse_recipe('[merge]\nr = "8:-1"', name="x.toml")
    assert values == {"merge": {"r": "8:-1"}}
    with pytest.raises(RecipeError, match=r"x\.toml: merge\.r must be a list of integers .* found '8:-1'"):
        recipe_from_dict(values, name="x.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[merg]\nr = [8]", r"x\.toml: unknown section \[merg\]; did you mean merge\?"),
        ("[zzz]\nr = [8]", r"unknown section \[zzz\]; known: merge"),
        ("[merge]\nprop_atn = true", r"unknown key merge\.prop_atn; did you mean prop_attn\?"),
        ("[merge]\nrr = [8]", r"unknown key merge\.rr; did you mean r"),
        ("merge = 8", r"merge must be a section, written as \[merge\]"),
        ("[merge\nr = 8", r"x\.toml is not valid TOML: .*line 1"),
        ("r = [8, 8]", r"unknown section \[r\]"),
    ],
)
def test_what_is_not_a_recipe_is_named(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, name="x.toml")


@pytest.mark.parametrize(
    "r", [8, "8", None, 8.0, {"all": 8}, [1.0, 2], ["8"], [True, 1], [-1, 0], [[8]], [None]], ids=repr
)
def test_r_of_a_wrong_type_is_refused(r):
    with pytest.raises(RecipeError, match=r"^x: merge\.r must be a list of integers of at least 0"):
        recipe_from_dict({"merge": {"r": r}}, name="x")


@pytest.mark.parametrize("key", ["prop_attn", "compensate"])
@pytest.mark.parametrize("value", [1, 0, "true", None, []], ids=repr)
def test_a_choice_of_a_wrong_type_is_refused(key, value):
    with pytest.raises(RecipeError, match=rf"x: merge\.{key} must be true or false, found"):
        recipe_from_dict({"merge": {key: value}}, name="x")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("r", [(8, -1), (True, 8), (8.0,), ("8",), 8, "8"], ids=repr)
def test_a_merge_recipe_cannot_be_built_wrong(r):
    with pytest.raises(RecipeError, match=r"merge\.r must be a list of integers of at least 0"):
        MergeRecipe(r=r)


def test_a_section_that_is_a_list_is_refused():
    with pytest.raises(RecipeError, match="merge must be a section"):
        check_keys({"merge": [1, 2]}, name="x")


def test_digest_is_stable_and_sensitive():
    recipe = Recipe(merge=MergeRecipe(r=(8, 8, 0)))
    others = [
        Recipe(),
        Recipe(merge=MergeRecipe(r=(8, 8))),
        Recipe(merge=MergeRecipe(r=(8, 0, 8))),
        Recipe(merge=MergeRecipe(r=(88, 0))),
        Recipe(merge=MergeRecipe(r=(8, 8, 0), prop_attn=False)),
    ]
    assert Recipe(merge=MergeRecipe(r=(8, 8, 0), prop_attn=True)).digest() == recipe.digest()
    assert len({recipe.digest(), *(other.digest() for other in others)}) == 6
    assert len(recipe.digest()) == 64


# Token counts.


@pytest.mark.parametrize(
    ("r", "entering", "leaving"),
    [
        (4, range(197, 149, -4), 149),
        (8, range(197, 101, -8), 101),
        (13, range(197, 41, -13), 41),
    ],
)
def test_tokens_per_block_of_vit_base(r, entering, leaving):
    assert tokens_per_block(vit_base(), (r,) * 12) == (*entering, leaving)


def test_tokens_per_block_without_merging():
    assert tokens_per_block(vit_base(), ()) == tokens_per_block(vit_base(), (0,) * 12) == (197,) * 13


@pytest.mark.parametrize(
    ("tokens", "prefix", "most"),
    [(197, 1, 98), (198, 2, 98), (196, 0, 98), (201, 5, 98), (2, 1, 0), (3, 1, 1), (1, 1, 0)],
)
def test_largest_r(tokens, prefix, most):
    assert largest_r(tokens, prefix) == most


@settings(derandomize=True, deadline=None, max_examples=60)
@given(r=st.lists(st.integers(0, 60), min_size=12, max_size=12).map(tuple), registers=st.integers(0, 5))
def test_tokens_per_block_adds_up_or_names_the_block(r, registers):
    spec = vit_base(registers=registers)
    most = [largest_r(spec.tokens - sum(r[:block]), spec.prefix) for block in range(12)]
    block = next((block for block in range(12) if r[block] > most[block]), None)
    if block is not None:
        message = f"r = {r[block]} is too large for block {block}: .* at most {most[block]} can be merged"
        with pytest.raises(RecipeError, match=message):
            tokens_per_block(spec, r)
        return
    counts = tokens_per_block(spec, r)
    assert [a - b for a, b in itertools.pairwise(counts)] == list(r)
    assert counts[0] == spec.tokens
    assert counts[-1] > spec.prefix


def test_the_largest_allowed_r_is_allowed():
    spec = vit_base()
    assert tokens_per_block(spec, (98, *(0,) * 11))[1] == 99
    with pytest.raises(RecipeError, match=r"r = 99 is too large for block 0: 197 tokens enter it, 1 of them protected"):
        tokens_per_block(spec, (99, *(0,) * 11))


@pytest.mark.parametrize("length", [1, 11, 13])
def test_a_list_of_another_length_is_refused(length):
    with pytest.raises(RecipeError, match=f"has {length} entries, the model has 12 blocks; give one per block"):
        tokens_per_block(vit_base(), (1,) * length)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('remedy = "regcach"', r"x\.toml: registers\.remedy cannot be 'regcach'; did you mean regcache\?"),
        ('remedy = "prefix"\ntau = 0', r"registers\.tau must be a positive number, found 0"),
        ('remedy = "prefix"\ntau = "4"', r"registers\.tau must be a positive number, found '4'"),
        ('remedy = "prefix"\ndeletions = -1', r"registers\.deletions must be an integer of at least 0, found -1"),
        (
            'remedy = "delete"\ndeletion_site = "blocks.0.mlp.fc2"',
            r"registers\.deletion_site is the layer at whose input",
        ),
        ('remedy = "prefix"\naverage = 0', r"registers\.average must be an integer of at least 1, found 0"),
        ('remedy = "float-sinks"\nlayers = "head"', r"registers\.layers is a list of layers"),
        ('site = "blocks.0.mlp.fc2"', r"registers\.site is a layer, and needs a registers\.remedy other than auto"),
        ("block = true", r"registers\.block must be an integer of at least 0, found True"),
    ],
)
def test_registers_that_mean_nothing_are_refused(text, message):
    values = parse_recipe(f"[quant]\nweights = 8\n[registers]\n{text}\n", name="x.toml")
    with pytest.raises(RecipeError, match=message):
        recipe_from_dict(values, name="x.toml")


@settings(derandomize=True, deadline=None, max_examples=30)
@given(tau=st.floats(1e-3, 1e3), block=st.integers(0, 40), deletions=st.integers(0, 9), sinks=st.integers(0, 9))
def test_registers_round_trip(tau, block, deletions, sinks):
    registers = RegistersRecipe(
        remedy="regcache",
        site="blocks.3.mlp.fc2",
        tau=tau,
        block=block,
        deletions=deletions,
        sinks=sinks,
        layers=("a",),
    )
    recipe = Recipe(quant=QuantRecipe(), registers=registers)
    read = recipe_from_dict(parse_recipe(recipe.to_toml(), name="x.toml"), name="x.toml")
    assert read == recipe
    assert read.digest() == recipe.digest()
    assert not recipe.is_lossless


def test_a_recipe_without_registers_has_the_digest_that_it_always_had():
    assert "registers" not in Recipe(quant=QuantRecipe()).to_dict()


def test_registers_need_a_quantization():
    with pytest.raises(RecipeError, match="add --quant w8a8"):
        Recipe(registers=RegistersRecipe())
