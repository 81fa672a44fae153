"""The cost model: published counts, shapes that agree with execution, and loud misfits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vitfold.architectures.programs import forward
from vitfold.model import ViTSpec, param_shapes
from vitfold.ops.count import Count, integer_work
from vitfold.ops.protocol import Ops
from vitfold.ops.run import Run
from vitfold.quantizer import EXPONENTS, Quantizer, Twin, Uniform
from vitfold.recipe import MergeRecipe, tokens_per_block
from vitfold.schedule import resolve_r


def vit_spec(width: int, depth: int, heads: int, size: int = 224) -> ViTSpec:
    return ViTSpec(
        image_size=(size, size),
        patch_size=(16, 16),
        embed_dim=width,
        num_layers=depth,
        num_heads=heads,
        head_dim=width // heads,
        mlp_dim=4 * width,
        outputs=1000,
    )


BASE, LARGE = vit_spec(768, 12, 12), vit_spec(1024, 24, 16)
BASE_384 = vit_spec(768, 12, 12, 384)


def count_of(spec: ViTSpec, r: tuple[int, ...] = ()) -> Count:
    required, optional = param_shapes(spec)
    count = Count({**required, **optional})
    forward(count, spec, MergeRecipe(r=r), (1, spec.channels, *spec.image_size))
    return count


def test_macs_of_vit_base_without_merging():
    assert count_of(BASE).macs / 1e9 == pytest.approx(17.56, abs=0.02)


def test_macs_of_vit_base_with_r_8():
    assert count_of(BASE, (8,) * 12).macs / 1e9 == pytest.approx(13.10, abs=0.02)


@pytest.mark.parametrize(
    ("spec", "r", "ratio"),
    [
        (BASE, 4, 1.146),
        (BASE, 8, 1.340),
        (BASE, 13, 1.694),
        (BASE, 16, 2.002),
        (LARGE, 4, 1.335),
        (LARGE, 7, 1.773),
        (LARGE, 8, 1.988),
        (BASE_384, 23, 1.348),
        (BASE_384, 45, 1.964),
    ],
)
def test_mac_ratios_of_constant_schedules(spec, r, ratio):
    merged = count_of(spec, resolve_r(r, spec)).macs
    assert count_of(spec).macs / merged == pytest.approx(ratio, rel=0.01)


def test_macs_stand_at_the_sites_that_do_the_work():
    macs = {cost.site: cost.macs for cost in count_of(BASE, (8,) * 12).costs if cost.macs}
    assert macs["patch_embed"] == 196 * 768 * 768
    assert macs["blocks.0.attn.qkv"] == 197 * 768 * 2304
    assert macs["blocks.0.attn.qk"] == macs["blocks.0.attn.av"] == 197 * 197 * 768
    assert macs["blocks.0.merge.scores"] == 98 * 98 * 64
    assert macs["blocks.0.mlp.fc1"] == 189 * 768 * 3072
    assert macs["blocks.11.mlp.fc2"] == 101 * 768 * 3072
    assert macs["head"] == 768 * 1000


def test_weight_bytes_are_those_of_the_weights():
    """Every linear weight is read once; biases, tokens and positions are not weights of a product."""
    count = count_of(BASE)
    required, _ = param_shapes(BASE)
    products = sum(_size(shape) for name, shape in required.items() if len(shape) in (2, 4) and name != "pos_embed")
    assert sum(cost.weight_bytes for cost in count.costs if cost.kind == "linear") == 4 * products


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def test_merging_moves_fewer_bytes_but_not_for_free():
    plain, merged = count_of(BASE), count_of(BASE, (8,) * 12)
    assert sum(c.activation_bytes for c in merged.costs) < sum(c.activation_bytes for c in plain.costs)
    assert sum(c.activation_bytes for c in merged.costs if ".merge" in c.site) > 0


@Ops.register
class Both:
    """Runs every operation twice, executed and counted, and compares the shapes one by one."""

    def __init__(self, run: Run, count: Count) -> None:
        self._run, self._count = run, count
        self.compared = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            ran = getattr(self._run, name)(*(_side(a, 0) for a in args), **_sides(kwargs, 0))
            counted = getattr(self._count, name)(*(_side(a, 1) for a in args), **_sides(kwargs, 1))
            if ran is None:
                return None
            if isinstance(ran, torch.Tensor):
                return self._pair(name, ran, counted)
            return tuple(self._pair(name, a, b) for a, b in zip(ran, counted, strict=True))

        return operation

    def _pair(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, tuple[int, ...]]:
        assert tuple(tensor.shape) == shape, f"{name} returns {tuple(tensor.shape)}, Count says {shape}"
        self.compared += 1
        return tensor, shape


def _sides(values: dict[str, Any], side: int) -> dict[str, Any]:
    return {name: _side(value, side) for name, value in values.items()}


def _side(value: Any, side: int) -> Any:
    if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
        return value[side]
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return tuple(_side(part, side) for part in value)
    return value


@pytest.mark.parametrize("r", [(), (5, 3), (8, 4)])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"registers": 3, "dist_token": True, "pool": "token_dist"},
        {"class_token": False, "pool": "avg", "mlp": "swiglu", "qk_norm": True},
        {"pool": "map", "map_heads": 2, "map_mlp_width": 8, "layer_scale": True, "pre_norm": True},
        {"pool": "token_avg", "pos_embed": "patches", "image_size": (24, 48)},
        {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
    ],
)
def test_every_shape_agrees_with_execution(tiny_model, random_images, overrides, r):
    model = tiny_model(**overrides)
    spec = model.spec
    image = torch.from_numpy(random_images(spec, 1))
    both = Both(Run(model.params), Count({name: array.shape for name, array in model.params.items()}))
    lengths: list[int] = []
    with torch.inference_mode():
        forward(
            both,
            spec,
            MergeRecipe(r=r),
            (image, tuple(image.shape)),
            observe=lambda _, tokens: lengths.append(tokens.x[1][1]),
        )
    assert tuple(lengths) == tokens_per_block(spec, r)
    assert both.compared >= 30


MISFITS = {
    "reshape": (lambda c: c.reshape((1, 4, 6), (5, 5)), "cannot reshape"),
    "split": (lambda c: c.split((1, 4, 7), 2, 2), "cannot split"),
    "slice past the end": (lambda c: c.slice((1, 4, 7), 1, 0, 5), "outside axis 1"),
    "slice before the start": (lambda c: c.slice((1, 4, 7), 1, -1, 4), "outside axis 1"),
    "slice backwards": (lambda c: c.slice((1, 4, 7), 1, 3, 2), "outside axis 1"),
    "add": (lambda c: c.add((1, 4, 7), (1, 4, 6)), "do not broadcast"),
    "multiply": (lambda c: c.multiply((1, 4, 7), (5, 7)), "do not broadcast"),
    "matmul of two depths": (lambda c: c.matmul("m", (1, 4, 7), (1, 6, 4)), "cannot multiply"),
    "matmul of two depths, transposed": (
        lambda c: c.matmul("m", (1, 4, 7), (1, 4, 6), transpose_b=True),
        "cannot multiply",
    ),
    "linear": (lambda c: c.linear("layer", (1, 4, 6)), "takes width 7"),
    "patch_embed": (lambda c: c.patch_embed("patch", (1, 1, 8, 8)), "takes 3 channels"),
    "attention": (
        lambda c: c.attention("a", (1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 6, 8), None),
        "one value per key",
    ),
    "concat": (lambda c: c.concat(((1, 4, 7), (1, 4, 6)), 1), "cannot concatenate"),
    "topk_split": (lambda c: c.topk_split((1, 4, 1), 5), "the 5 largest"),
    "row of indices": (lambda c: c.take((1, 4, 7), (1, 2)), "expected a column"),
    "scatter_add": (lambda c: c.scatter_add("s", (1, 4, 7), (1, 2, 1), (1, 3, 7)), "one row"),
    "matmul of two batches": (lambda c: c.matmul("m", (2, 4, 7), (3, 7, 4)), "do not broadcast"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfitting_shapes_raise(case):
    operation, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        operation(Count({"layer.weight": (5, 7), "patch.weight": (8, 3, 4, 4)}))


INT8 = Uniform(scale=np.array(0.1), zero_point=np.array(0), low=-128, high=127)
SPLIT = Twin(rule="sign", inner=replace(INT8, high=0), outer=replace(INT8, low=0))


def quantizers_of(spec: ViTSpec, *, attention: bool, twin: bool = False) -> dict[str, Quantizer]:
    layers = [
        f"blocks.{i}.{name}" for i in range(spec.num_layers) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    found: dict[str, Quantizer] = {f"{layer}.{side}": INT8 for layer in (*layers, "head") for side in ("x", "w")}
    if attention:
        sites = [f"blocks.{i}.attn.{name}" for i in range(spec.num_layers) for name in ("q", "k", "v", "softmax")]
        found |= dict.fromkeys(sites, INT8)
    if twin:
        found |= {site: SPLIT for site in found if site.endswith("fc2.x")}
    return found


def quantized_count(quantizers: dict[str, Quantizer], *, dequantize_first: bool) -> Count:
    required, optional = param_shapes(BASE)
    count = Count({**required, **optional}, quantizers, dequantize_first=dequantize_first)
    forward(count, BASE, MergeRecipe(r=()), (1, 3, 224, 224))
    return count


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_what_is_integer_before_and_after_reordering(attention, twin):
    quantizers = quantizers_of(BASE, attention=attention, twin=twin)
    before = integer_work(quantized_count(quantizers, dequantize_first=True).costs)
    after = integer_work(quantized_count(quantizers, dequantize_first=False).costs)
    products = 12 * (4 + (2 if attention else 0)) + 1
    assert before.dequantized_operands == 2 * products + (12 if twin else 0)
    assert after.dequantized_operands == 0
    assert before.macs == after.macs == count_of(BASE).macs
    tokens = 197
    linears = tokens * 12 * 768 * 768 * (3 + 1 + 4 + 4) + 768 * 1000
    products_in_attention = 2 * 12 * tokens * tokens * 768
    assert before.integer_macs == after.integer_macs == linears + (products_in_attention if attention else 0)
    assert after.integer_ratio == after.integer_macs / after.macs < 1, "the patch embedding stays float"


def test_quantized_weights_take_one_byte_and_float_ones_four():
    quantizers = quantizers_of(BASE, attention=False)
    costs = {cost.site: cost for cost in quantized_count(quantizers, dequantize_first=False).costs}
    plain = {cost.site: cost for cost in count_of(BASE).costs}
    assert costs["blocks.3.mlp.fc1"].weight_bytes == 768 * 3072
    assert costs["patch_embed"].weight_bytes == plain["patch_embed"].weight_bytes == 4 * 768 * 768
    assert not costs["blocks.3.attn.qk"].integer
    del quantizers["blocks.3.mlp.fc1.x"]
    costs = {cost.site: cost for cost in quantized_count(quantizers, dequantize_first=False).costs}
    assert costs["blocks.3.mlp.fc1"].weight_bytes == 4 * 768 * 3072, "weights on their grid alone stay float"
    assert not costs["blocks.3.mlp.fc1"].integer


def test_codes_that_are_handed_on_take_one_byte():
    tokens, width, heads = 197, 768, 12
    plain = quantizers_of(BASE, attention=True)
    wide = replace(INT8, scale=np.array(2.0**-16), low=-(1 << 22), high=(1 << 22) - 1)
    handed = {**plain, "norm.x": wide}
    for i in range(BASE.num_layers):
        handed |= {f"blocks.{i}.norm1.x": wide, f"blocks.{i}.norm2.x": wide, f"blocks.{i}.attn.logits": EXPONENTS}
        handed |= {f"blocks.{i}.attn.qkv.out": INT8, f"blocks.{i}.mlp.fc1.out": INT8}
        handed |= {f"blocks.{i}.{layer}.out": wide for layer in ("attn.proj", "mlp.fc2")}
    before, after = (
        {(cost.site, cost.kind): cost.activation_bytes for cost in quantized_count(one, dequantize_first=False).costs}
        for one in (plain, handed)
    )
    pairs, stream, block = heads * tokens * tokens, tokens * width, "blocks.3"
    expected = {
        (f"{block}.norm1", "normalization"): (4 + 1) * stream,
        (f"{block}.attn.qkv", "linear"): (1 + 3) * stream,
        (f"{block}.attn.qk", "matmul"): 2 * stream + 4 * pairs,
        (f"{block}.attn.softmax", "softmax"): (4 + 1) * pairs,
        (f"{block}.attn.av", "matmul"): pairs + 2 * stream,
        (f"{block}.attn.proj", "linear"): (1 + 4) * stream,
        (f"{block}.mlp.fc1", "linear"): (1 + 4) * stream,
        (f"{block}.mlp.fc2", "linear"): (4 + 4) * stream,
    }
    assert {site: after[site] for site in expected} == expected
    assert all(after[site] <= before[site] for site in before)
    assert before[f"{block}.norm1", "normalization"] == 8 * stream


def test_without_quantizers_nothing_is_integer():
    work = integer_work(count_of(BASE).costs)
    assert (work.integer_macs, work.dequantized_operands, work.integer_ratio) == (0, 0, 0.0)
    assert integer_work([]).integer_ratio == 0.0
