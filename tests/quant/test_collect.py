"""Samples of calibration: the right rows, bounded, kept, and loud where activations are useless."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from quantizing import collected
from vitfold.architectures.programs import forward
from vitfold.artifacts.cache import cache_folder
from vitfold.errors import CalibrationError
from vitfold.images import ImageSet, batches, find_images
from vitfold.model import Model
from vitfold.ops.record import Record
from vitfold.quant import calibrate
from vitfold.quant.collect import Samples, probe
from vitfold.quant.sites import find_sites
from vitfold.recipe import MergeRecipe, QuantRecipe

pytestmark = pytest.mark.usefixtures("own_cache")
NONE = MergeRecipe(r=())


def many(folder: Path, count: int) -> ImageSet:
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 255, (33, 35, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return find_images(folder)


class Streams:
    """Everything that a model computes on an image set, batch by batch as `collect` runs it."""

    def __init__(self, model: Model, merge: MergeRecipe, images: ImageSet, batch: int) -> None:
        seen: dict[str, list[torch.Tensor]] = {}
        ops = Record(model.params, lambda site, value: seen.setdefault(site, []).append(value))
        with torch.inference_mode():
            for group in batches(images, model.preprocess, batch=batch):
                forward(ops, model.spec, merge, torch.from_numpy(group.pixel_values))
        self.seen = seen

    def rows(self, site: str) -> list[torch.Tensor]:
        return [value.reshape(-1, value.shape[-1]) for value in self.seen[site]]


NO_CLASS = {"class_token": False, "pool": "avg"}
"""The class token enters the first block alike in every image; without it all rows are different."""


def positions(rows: torch.Tensor, among: torch.Tensor) -> list[int]:
    """Where each row stands."""
    equal = (rows[:, None] == among[None]).all(-1)
    return [int(line.nonzero()[0, 0]) for line in equal]


@pytest.mark.parametrize("merge", [NONE, MergeRecipe(r=(5, 3))], ids=["r=0", "merging"])
@pytest.mark.parametrize("rows", [12, 29, 60, 10**6])
def test_shares_ranges_and_the_largest_rows(tiny_model, photos, merge, rows):
    model = tiny_model(**NO_CLASS)
    samples = collected(model, merge, photos, gradients=None, batch=4, rows=rows)
    streams = Streams(model, merge, photos, 4)
    quota = max(1, rows // 6)
    for site in find_sites(model.spec)[0]:
        one, parts = samples.linears[site.layer], streams.rows(f"{site.layer}.x")
        whole = torch.cat(parts)
        assert float(one.share.sum()) == pytest.approx(len(whole), rel=1e-6)
        np.testing.assert_array_equal(one.low, whole.amin(0))
        np.testing.assert_array_equal(one.high, whole.amax(0))
        assert len(one.x) == sum(min(len(part), quota * n) for part, n in zip(parts, (4, 2), strict=True))
        found = positions(one.x, whole)
        assert len(set(found)) == len(found), "no row is taken twice"
        start = 0
        for part, images in zip(parts, (4, 2), strict=True):
            count = quota * images
            if count < len(part):
                largest = set((part.abs().amax(1).topk(count // 2).indices + start).tolist())
                assert largest <= set(found)
                taken = one.share[[i for i, p in enumerate(found) if p in largest]]
                assert (taken == 1).all(), "the largest rows stand for themselves"
            start += len(part)
        assert set(positions(one.ordinary, whole)) <= set(found)
        assert len(one.ordinary) > 0


def test_weighted_by_their_shares_rows_give_the_streams_moments(tiny_model, tmp_path):
    model, images = tiny_model(), many(tmp_path / "m", 24)
    samples = collected(model, NONE, images, gradients=None, rows=24 * 8)
    one = samples.linears["blocks.1.mlp.fc2"]
    whole = torch.cat(Streams(model, NONE, images, 8).rows("blocks.1.mlp.fc2.x"))
    reach, exact = one.x.abs().amax(1, keepdim=True), float(whole.abs().amax(1).mean())
    assert float((reach * one.share).sum() / one.share.sum()) == pytest.approx(exact, rel=0.02)
    assert float(reach.mean()) > 1.03 * exact, "without shares the largest dominate"


def test_the_ordinary_rows_are_drawn_from_every_batch(tiny_model, tmp_path):
    """Whatever the last batch's size is, which rounds the shares differently."""
    model, images = tiny_model(**NO_CLASS), many(tmp_path / "m", 7)
    samples = collected(model, NONE, images, gradients=None, batch=4, rows=7 * 3)
    ordinary = samples.linears["blocks.0.attn.qkv"].ordinary
    parts = Streams(model, NONE, images, 4).rows("blocks.0.attn.qkv.x")
    found = positions(ordinary, torch.cat(parts))
    assert len([p for p in found if p < len(parts[0])]) == 6
    assert len([p for p in found if p >= len(parts[0])]) == 5


def test_the_same_seed_gives_the_same_rows(tiny_model, photos, monkeypatch, tmp_path):
    model = tiny_model()

    def taken(seed: int, folder: str) -> torch.Tensor:
        monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / folder))
        return collected(model, NONE, photos, gradients=None, seed=seed, rows=24).linears["blocks.0.attn.qkv"].x

    first, again, other = taken(1, "a"), taken(1, "b"), taken(2, "c")
    np.testing.assert_array_equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "features",
    [
        NO_CLASS,
        {"class_token": False, "pool": "map", "map_heads": 2, "map_mlp_width": 24},
        {**NO_CLASS, "outputs": 0, "output": "image_embeds"},
    ],
    ids=["logits", "map", "embedding"],
)
def test_gradients_stand_at_their_rows(tiny_model, photos, features):
    """Against autograd on the whole stream, with the signs that the loss draws."""
    model, merge = tiny_model(**features), MergeRecipe(r=(5, 3))
    samples = collected(model, merge, photos, gradients="gauss-newton", batch=6, rows=30, seed=3)
    (group,) = batches(photos, model.preprocess, batch=6)
    seen: dict[str, torch.Tensor] = {}
    ops = Record(model.params, seen.__setitem__)
    with torch.enable_grad():
        output = forward(ops, model.spec, merge, torch.from_numpy(group.pixel_values).requires_grad_())
        if model.spec.output != "logits":
            output = output / output.norm(dim=-1, keepdim=True)
        signs = torch.randint(0, 2, output.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
        loss = (output * signs).sum()
    for layer, one in samples.linears.items():
        (expected,) = torch.autograd.grad(loss, seen[f"{layer}.y"], retain_graph=True)
        x = seen[f"{layer}.x"].detach().reshape(-1, one.x.shape[1])
        rows = expected.reshape(-1, expected.shape[-1])[positions(one.x, x)]
        assert one.grad is not None
        torch.testing.assert_close(one.grad, rows, rtol=1e-4, atol=1e-6)
        assert one.grad.any()
    for site, attention in samples.attentions.items():
        for name, found in (("qk", attention.grad_logits), ("av", attention.grad_output)):
            (expected,) = torch.autograd.grad(loss, seen[f"{site}.{name}.y"], retain_graph=True)
            assert found is not None
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(attention.logits.softmax(-1), seen[f"{site}.softmax"].detach())


def curvature_of_divergence(weight: torch.Tensor, x: torch.Tensor, head: str) -> torch.Tensor:
    """The diagonal of the Hessian of the divergence from the model itself, by autograd twice: that is the Fisher's."""
    logits = weight @ x

    def divergence(x: torch.Tensor) -> torch.Tensor:
        if head == "single_label":
            p = logits.softmax(-1)
            return (p * (p.log() - (weight @ x).log_softmax(-1))).sum()
        return torch.nn.functional.binary_cross_entropy_with_logits(weight @ x, logits.sigmoid(), reduction="sum")

    assert torch.autograd.functional.jacobian(divergence, x).abs().max() < 1e-12, "PTQ4ViT's gradient says nothing"
    return torch.autograd.functional.hessian(divergence, x).diagonal()


@pytest.mark.parametrize("head", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("curvature", ["fisher", "gauss-newton"])
def test_squared_gradients_of_the_probe_estimate_the_curvature(head, curvature):
    rng = np.random.default_rng(0)
    weight, x = torch.from_numpy(rng.standard_normal((4, 5))), torch.from_numpy(rng.standard_normal(5))
    plain = head == "regression" or curvature == "gauss-newton"
    expected = weight.square().sum(0) if plain else curvature_of_divergence(weight, x, head)
    generator, draws = torch.Generator().manual_seed(0), 8000
    rows = x.repeat(draws, 1).requires_grad_()
    (found,) = torch.autograd.grad(probe(rows @ weight.T, head, curvature, generator), rows)
    torch.testing.assert_close(found.square().mean(0), expected, rtol=0.05, atol=0)


def tensors(samples: Samples) -> dict[str, torch.Tensor]:
    """Every tensor of the samples by name."""
    found = {}
    for group in (samples.linears, samples.attentions):
        for site, one in group.items():
            for field in fields(one):
                if (value := getattr(one, field.name)) is not None:
                    found[f"{site}.{field.name}"] = value
    return found


def assert_same(first: Samples, second: Samples) -> None:
    assert first.images == second.images
    a, b = tensors(first), tensors(second)
    assert set(a) == set(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


class Runs(TorchFunctionMode):
    """Counts how many batches were embedded as patches, which every run of a model begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.conv2d:
            self.counted.append(1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def runs() -> Iterator[list[int]]:
    with Runs() as runs:
        yield runs.counted


@pytest.mark.parametrize("gradients", [None, "gauss-newton", "fisher"])
def test_a_second_call_runs_no_model(tiny_model, photos, runs, gradients):
    model = tiny_model()
    advanced: list[int] = []
    first = collected(model, NONE, photos, gradients=gradients, advance=advanced.append)
    assert len(runs) == 1
    second = collected(model, NONE, photos, gradients=gradients, advance=advanced.append)
    assert len(runs) == 1
    assert sum(advanced) == 12, "progress reaches the end either way"
    assert_same(first, second)


def test_every_choice_has_samples_of_its_own(tiny_model, photos, runs):
    model = tiny_model()
    changes = [
        {},
        {"gradients": "gauss-newton"},
        {"seed": 1},
        {"rows": 50},
        {"merge": MergeRecipe(r=(3, 3))},
        {"merge": MergeRecipe(r=(3, 3), prop_attn=False)},
        {"images": photos.first(3)},
        {"model": tiny_model(seed=1)},
    ]
    for change in changes:
        chosen = {"model": model, "merge": NONE, "images": photos, "gradients": None, **change}
        collected(chosen.pop("model"), chosen.pop("merge"), chosen.pop("images"), **chosen)
    assert len(runs) == len(changes)


def test_a_damaged_entry_is_made_again(tiny_model, photos, runs):
    model = tiny_model()
    first = collected(model, NONE, photos, gradients=None)
    (entry,) = (cache_folder() / "calibration").iterdir()
    whole = entry.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\0" * 100):
        entry.write_bytes(damaged)
        assert_same(collected(model, NONE, photos, gradients=None), first)
        assert entry.read_bytes() == whole
    assert len(runs) == 4


def test_an_interrupt_leaves_nothing(tiny_model, photos):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected(tiny_model(), NONE, photos, gradients=None, batch=2, advance=stop)
    assert not [path for path in cache_folder().rglob("*") if path.is_file()]


def test_a_read_only_cache_is_no_error(tiny_model, photos, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "file"))
    assert collected(tiny_model(), NONE, photos, gradients=None).images == 6


def with_param(model: Model, name: str, change) -> Model:
    return model.with_params(model.spec, {**model.params, name: change(model.params[name])})


@pytest.mark.parametrize(
    ("name", "site"),
    [("blocks.0.attn.qkv.weight", "blocks.0.attn.proj"), ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2")],
)
def test_activations_that_are_not_finite_are_named(tiny_model, photos, name, site):
    """The first site that sees them, on which image; and nothing is kept."""
    model = with_param(tiny_model(), name, lambda a: (a * (3e38 / np.float64(np.abs(a).max()))).astype(np.float32))
    with pytest.raises(CalibrationError, match=rf"{site}\.x are NaN or infinite on images like .*0\.png"):
        collected(model, NONE, photos, gradients=None)
    assert not cache_folder().exists()


def test_a_constant_input_is_named(tiny_model, photos):
    model = with_param(tiny_model(), "blocks.1.norm2.weight", np.zeros_like)
    with pytest.raises(CalibrationError, match=r"input of blocks\.1\.mlp\.fc1 is constant over 6 images"):
        calibrate(model, NONE, QuantRecipe(method="minmax"), photos)
    quant = QuantRecipe(method="minmax", sites={"blocks.1.mlp.*": "float"})
    found = calibrate(model, NONE, quant, photos)
    assert "blocks.1.mlp.fc1.x" not in found.quantizers


def test_memory_does_not_grow_with_the_images(tiny_model, tmp_path):
    """Rows are shared out; ranges have no row, and attention operands stop after a few batches."""
    model = tiny_model()
    twenty, sixty = (
        collected(model, NONE, many(tmp_path / str(count), count), gradients="gauss-newton", rows=120)
        for count in (20, 60)
    )
    bytes_of = [sum(t.nbytes for t in tensors(samples).values()) for samples in (twenty, sixty)]
    head = 40 * (32 + 1 + 10) * 4
    assert bytes_of[1] <= bytes_of[0] + head, "the head sees one row per image, which is the least to keep"
    more = collected(model, NONE, many(tmp_path / "more", 60), gradients=None, rows=6)
    assert len(more.linears["blocks.0.attn.qkv"].x) == 60, "at least one row per image"
