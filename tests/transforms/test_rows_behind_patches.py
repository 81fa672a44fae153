"""Tokens behind the patches never merge, and outputs of some of the patches get these back."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vitfold
from vitfold.architectures.programs import program_of
from vitfold.errors import RecipeError
from vitfold.model import GraphSpec, Model
from vitfold.ops.run import Run
from vitfold.pipeline import optimize
from vitfold.program import replay
from vitfold.recipe import MergeRecipe

DIM, SIDE, QUERIES, BLOCKS = 32, 4, 4, 3


class Detector(nn.Module):
    """A class token, patches and tokens that ask for objects, in one order or another."""

    def __init__(self, order: tuple[str, ...], read: slice) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, DIM, 8, 8)
        self.parts = nn.ParameterDict({"cls": torch.randn(1, 1, DIM), "ask": torch.randn(1, QUERIES, DIM)})
        self.positions = nn.Parameter(torch.randn(1, SIDE**2, DIM))
        self.blocks = nn.Sequential(*(Block(DIM, 2, qkv_bias=True) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 5)
        self.order, self.read = order, read

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        patches = self.patch(pixels).flatten(2).transpose(1, 2) + self.positions
        parts = {name: row.expand(len(pixels), -1, -1) for name, row in self.parts.items()} | {"patches": patches}
        x = self.norm(self.blocks(torch.cat([parts[name] for name in self.order], 1)))
        return {"found": self.head(x[:, self.read]), "tokens": x}


@functools.cache
def read_as_graph(module: nn.Module) -> Model:
    return vitfold.adapt(module.eval(), image_size=(8 * SIDE, 8 * SIDE))


def made(model: Model, recipe: MergeRecipe, pixels: Tensor) -> dict[str, Tensor]:
    program = program_of(model.spec, recipe)
    names = model.spec.output_names
    with torch.inference_mode():
        return dict(zip(names, replay(program, Run(model.params), pixels, only=names), strict=True))


BEHIND = Detector(("cls", "patches", "ask"), slice(-QUERIES, None))
IN_FRONT = Detector(("cls", "ask", "patches"), slice(1, 1 + QUERIES))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(2, 3, 8 * SIDE, 8 * SIDE, generator=torch.Generator().manual_seed(0))


def test_they_are_found_behind() -> None:
    behind, in_front = read_as_graph(BEHIND).spec, read_as_graph(IN_FRONT).spec
    assert isinstance(behind, GraphSpec)
    assert isinstance(in_front, GraphSpec)
    assert (behind.prefix, behind.suffix, behind.patches) == (1, QUERIES, SIDE**2)
    assert (in_front.prefix, in_front.suffix, in_front.patches) == (1 + QUERIES, 0, SIDE**2)
    assert behind.unmergeable == ""


@pytest.mark.parametrize("rule", ["tome", "nearest", "greedy", "tofu"])
@pytest.mark.parametrize("r", [(1, 1, 1), (3, 0, 2), (0, 8, 0)])
def test_where_they_stand_makes_no_difference(rule: str, r: tuple[int, ...], pixels: Tensor) -> None:
    recipe = MergeRecipe(r=r, rule=rule)
    behind, in_front = (made(read_as_graph(one), recipe, pixels) for one in (BEHIND, IN_FRONT))
    torch.testing.assert_close(behind["found"], in_front["found"], rtol=1e-4, atol=1e-5)
    expected = in_front["tokens"]
    moved = torch.cat((expected[:, :1], expected[:, 1 + QUERIES :], expected[:, 1 : 1 + QUERIES]), 1)
    torch.testing.assert_close(behind["tokens"], moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["evit", "pitome"])
def test_rules_that_would_move_them_are_refused(rule: str) -> None:
    with pytest.raises(RecipeError, match="tome, nearest, greedy or tofu"):
        program_of(read_as_graph(BEHIND).spec, MergeRecipe(r=(1, 1, 1), rule=rule))


def test_more_than_the_patches_cannot_merge() -> None:
    with pytest.raises(RecipeError, match="at most 8 can be merged"):
        optimize(read_as_graph(BEHIND), merge=[9, 0, 0])


@pytest.mark.parametrize("read", [slice(0, 9), slice(3, 12), slice(12, 21)], ids=str)
def test_some_of_the_patches_are_given_back(read: slice, pixels: Tensor) -> None:
    module: Any = Detector(("cls", "patches", "ask"), read)
    model = read_as_graph(module)
    found = made(model, MergeRecipe(r=(2, 2, 2)), pixels)
    with torch.inference_mode():
        expected = module.head(found["tokens"][:, read])
    torch.testing.assert_close(found["found"], expected, rtol=1e-4, atol=1e-5)
