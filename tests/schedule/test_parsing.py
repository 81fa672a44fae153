"""The words of a schedule: what is accepted, what it becomes, what is refused and how."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.errors import RecipeError
from vitfold.model import ViTSpec
from vitfold.recipe import largest_r, tokens_per_block
from vitfold.schedule import describe_r, resolve_r

small = settings(derandomize=True, deadline=None, max_examples=60)


def spec_of(depth: int = 12, image: int = 224, **overrides: object) -> ViTSpec:
    values = {
        "image_size": (image, image),
        "patch_size": (16, 16),
        "embed_dim": 32,
        "num_layers": depth,
        "num_heads": 4,
        "head_dim": 8,
        "mlp_dim": 64,
        "outputs": 10,
    }
    return ViTSpec(**{**values, **overrides})


BASE = spec_of()


@pytest.mark.parametrize(
    "value", [None, "none", "None", " none ", 0, "0", "+0", [], (), [0, 0], "0,0", "0:1"], ids=repr
)
def test_words_for_no_merging(value):
    assert resolve_r(value, BASE) == (0,) * 12


@pytest.mark.parametrize("value", [8, "8", " 8 ", "+8", "8:0", "8: 0.0", "8:-0"], ids=repr)
def test_words_for_a_constant(value):
    assert resolve_r(value, BASE) == (8,) * 12


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8,8,0,4", (8, 8, 0, 4, *(0,) * 8)),
        (" 8, 8 ,0,4 ", (8, 8, 0, 4, *(0,) * 8)),
        ([8, 8, 0, 4], (8, 8, 0, 4, *(0,) * 8)),
        ((98,), (98, *(0,) * 11)),
        ([0] * 11 + [98], (*(0,) * 11, 98)),
        (list(range(12)), tuple(range(12))),
    ],
    ids=repr,
)
def test_lists_are_literal_and_padded_with_zeros(value, expected):
    assert resolve_r(value, BASE) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8:-1", (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)),
        ("8:1", (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)),
        ("11:-1", (22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0)),
        ("8:0.5", (4, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12)),
        ("8:-.5", (12, 11, 10, 9, 9, 8, 7, 6, 6, 5, 4, 4)),
        ("1:-1", (2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0)),
        ("3:0.1", (2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 4)),
    ],
)
def test_inflected_schedules(value, expected):
    assert resolve_r(value, BASE) == expected


@pytest.mark.parametrize(
    ("image", "class_token", "over"), [(224, True, 5), (256, True, 1), (224, False, 4), (384, True, 1), (128, True, 1)]
)
def test_aligned_schedules_merge_what_is_left_over_from_a_multiple_of_16(image, class_token, over):
    spec = spec_of(num_layers=12, image=image, class_token=class_token, pool="avg")
    for word in ("align", " ALIGN "):
        r = resolve_r(word, spec)
        assert r == (over, *(0,) * 11)
    assert tokens_per_block(spec, r)[-1] % 16 == 0


@pytest.mark.parametrize(("image", "tokens"), [(256, 256), (64, 17 - 1), (48, 9)])
def test_nothing_is_aligned_where_nothing_is_left_over_or_too_much(image, tokens, caplog):
    spec = spec_of(num_layers=3, image=image, class_token=False, pool="avg")
    assert spec.tokens == tokens
    assert resolve_r("align", spec) == (0, 0, 0)
    assert f"align merges nothing: {tokens} tokens" in caplog.text


@pytest.mark.parametrize("value", ["5:-1", "5:0.3", "5:1"])
def test_an_inflection_needs_no_second_block(value):
    assert resolve_r(value, spec_of(num_layers=1)) == (5,)


@small
@given(r=st.integers(0, 45), inflection=st.sampled_from([-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]))
def test_inflected_schedules_equal_the_published_formula(r, inflection):
    deep = spec_of(num_layers=12, image=1024)
    low = int(r * (1 - inflection))
    expected = tuple(int(low + (2 * r - 2 * low) * i / 11) for i in range(12))
    assert resolve_r(f"{r}:{inflection}", deep) == expected


def test_constants_remove_less_where_too_few_tokens_are_left():
    assert resolve_r(16, BASE) == (16,) * 11 + (10,)
    assert tokens_per_block(BASE, resolve_r(16, BASE))[-1] == 11
    assert resolve_r(98, BASE) == (98, 49, 24, 12, 6, 3, 2, 1, 0, 0, 0, 0)
    assert resolve_r("49:-1", BASE) == (98, 49, 24, 12, 6, 3, 2, 1, 0, 0, 0, 0)


@small
@given(
    r=st.integers(0, 110),
    inflection=st.floats(-1, 1),
    depth=st.integers(1, 14),
    registers=st.integers(0, 5),
    class_token=st.booleans(),
)
def test_every_resolved_schedule_fits_the_model(r, inflection, depth, registers, class_token):
    spec = spec_of(num_layers=depth, registers=registers, class_token=class_token, pool="avg")
    for value in (r, str(r), f"{r}:{inflection!r}"):
        low = int(r * (1 - inflection)) if ":" in str(value) and depth > 1 else r
        if low > largest_r(spec.tokens, spec.prefix):
            with pytest.raises(RecipeError, match="too large for block 0"):
                resolve_r(value, spec)
            continue
        resolved = resolve_r(value, spec)
        assert len(resolved) == depth
        counts = tokens_per_block(spec, resolved)
        assert counts[-1] >= spec.prefix + 1
        if isinstance(value, int):
            for count, removed in zip(counts, resolved, strict=False):
                assert removed == min(r, largest_r(count, spec.prefix))


@pytest.mark.parametrize("value", [99, "99", "99:0", "50:-1", [99], "99,0", "1000"], ids=repr)
def test_too_much_for_the_first_block_names_it_and_the_largest_r(value):
    with pytest.raises(RecipeError, match=r"r = \d+ is too large for block 0: 197 tokens .* at most 98 can be merged"):
        resolve_r(value, BASE)


def test_too_much_in_a_list_names_the_block_and_is_never_clamped():
    with pytest.raises(RecipeError, match=r"r = 50 is too large for block 1: 99 tokens .* at most 49"):
        resolve_r("98,50", BASE)


def test_prefix_tokens_count_in_the_largest_r():
    with pytest.raises(RecipeError, match=r"201 tokens enter it, 5 of them protected, so at most 98"):
        resolve_r(99, spec_of(registers=4))


def test_a_list_longer_than_the_model_is_refused():
    with pytest.raises(RecipeError, match=r"r has 13 entries, the model has 12 blocks"):
        resolve_r([1] * 13, BASE)


@pytest.mark.parametrize("value", [-1, "-1", [8, -1], "8,-1", "-8:0"], ids=repr)
def test_negative_numbers_are_refused(value):
    with pytest.raises(RecipeError, match=r"negative number of tokens \(-\d\); accepted: none, a number"):
        resolve_r(value, BASE)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "auto",
        "8x12",
        "8.0",
        "8,",
        ",8",
        "8,,8",
        "8;8",
        "8 8",
        "[8,8]",
        "8_0",
        "٨",
        "8,8:1",
        ":1",
        "nan",
        8.0,
        True,
        [8, 8.0],
        [8, "8"],
        [8, True],
        [None],
        [[8]],
        {"r": 8},
        {8},
        b"8",
        object,
    ],
    ids=repr,
)
def test_garbage_is_refused_with_the_accepted_forms(value):
    with pytest.raises(RecipeError, match=r"is not understood: .* is not an integer; accepted: none, a number .*8:-1"):
        resolve_r(value, BASE)


@pytest.mark.parametrize("value", ["8:", "8:x", "8:1.01", "8:-2", "8:nan", "8:inf", "8:1:1", "8:0,5"])
def test_an_inflection_outside_its_range_is_refused(value):
    with pytest.raises(RecipeError, match=r"(not a number in \[-1, 1\]|is not an integer); accepted: none"):
        resolve_r(value, BASE)


@pytest.mark.parametrize(
    ("r", "text"),
    [
        ((), "none"),
        ((0,) * 12, "none"),
        ((8,) * 12, "8 x 12"),
        ((8,), "8"),
        ((8, 8), "8,8"),
        ((16, 15, 13, 12), "16,15,13,12"),
        ((16,) * 11 + (10,), "16 x 11,10"),
        ((0,) * 6 + (8,) * 6, "0 x 6,8 x 6"),
        ((8, 8, 0, 4, *(0,) * 8), "8,8,0,4,0 x 8"),
    ],
)
def test_describe(r, text):
    assert describe_r(r) == text


@small
@given(r=st.lists(st.integers(0, 20), min_size=1, max_size=40).filter(any))
def test_descriptions_lose_nothing(r):
    read: list[int] = []
    for part in describe_r(r).split(","):
        found = re.fullmatch(r"(\d+)(?: x (\d+))?", part)
        assert found
        read += [int(found[1])] * int(found[2] or 1)
    assert read == r
