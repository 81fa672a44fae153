"""Merging as a change of programs that no model family wrote: whatever needs the original tokens gets them back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitfold.architectures.programs import shapes_of
from vitfold.architectures.vit import embed, transformer_block
from vitfold.errors import ProgramError
from vitfold.ops.protocol import Port
from vitfold.ops.run import Run
from vitfold.program import replay, trace
from vitfold.program.axes import token_spans
from vitfold.recipe import RULES, MergeRecipe
from vitfold.transforms import without_dead_rows
from vitfold.transforms.merging import Deletion, Layout, merged, stream_name
from vitfold.transforms.rewriting import only_outputs

R = (5, 3, 2)
GRID = (4, 4)


def traced(model, ends):
    """The model's blocks, with `ends(ops, spec, xs)` on the streams in front of and behind every block."""
    spec = model.spec

    def written(ops, image):
        xs = [embed(ops, spec, image)]
        for block in range(spec.num_layers):
            xs.append(transformer_block(ops, spec, block, xs[-1]))
        ops.scope("ends", role="head")
        return ends(ops, spec, xs)

    count = len(ends(Counting(), spec, [None] * (spec.num_layers + 1)))
    return trace(
        written,
        shapes_of(spec),
        inputs=(Port(name="pixel_values", shape=(3, *spec.image_size)),),
        outputs=[f"y{i}" for i in range(count)],
    )


class Counting:
    """An interpreter that only lets a program tell how many outputs it has."""

    def __getattr__(self, _):
        return lambda *args, **kwargs: (self, self)


def layout_of(spec):
    return Layout(prefix=spec.prefix, grid=spec.grid)


def grid_of_patches(ops, spec, x):
    patches = ops.slice(x, 1, spec.prefix, spec.tokens)
    return ops.reshape(ops.transpose(patches, (0, 2, 1)), (spec.embed_dim, *spec.grid))


def windows(ops, spec, x):
    """Windows of 2 x 2 patches: the token axis parts into two."""
    patches = ops.slice(x, 1, spec.prefix, spec.tokens)
    rows = ops.reshape(patches, (2, 2, 2, 2, spec.embed_dim))
    return ops.reshape(ops.transpose(rows, (0, 1, 3, 2, 4, 5)), (4, 4, spec.embed_dim))


ENDS = {
    "a tap of every block": lambda ops, spec, xs: tuple(xs[1:]),
    "patches alone": lambda ops, spec, xs: (ops.slice(xs[-1], 1, spec.prefix, spec.tokens),),
    "a grid": lambda ops, spec, xs: (grid_of_patches(ops, spec, xs[-1]),),
    "windows": lambda ops, spec, xs: (windows(ops, spec, xs[-1]),),
    "heads": lambda ops, spec, xs: (
        ops.transpose(ops.reshape(xs[-1], (spec.tokens, 4, spec.embed_dim // 4)), (0, 2, 1, 3)),
    ),
    "tokens last": lambda ops, spec, xs: (ops.transpose(xs[-1], (0, 2, 1)),),
    "a norm per token": lambda ops, spec, xs: (ops.reshape(ops.norm(xs[-1]), (spec.tokens,)),),
    "the sum of two blocks": lambda ops, spec, xs: (ops.add(xs[1], xs[2]),),
    "products of tokens": lambda ops, spec, xs: (ops.matmul("ends.m", xs[-1], xs[-1], transpose_b=True),),
    "the largest": lambda ops, spec, xs: (ops.reduce_max(xs[-1], 1),),
    "channels side by side": lambda ops, spec, xs: (ops.concat((xs[1], xs[-1]), 2),),
}


@pytest.fixture
def three(tiny_model):
    return tiny_model(num_layers=3, pos_embed="none", registers=2)


def equal_patches(random_images, spec):
    """Every patch of an image is the same, so that merging changes nothing at all."""
    tile = random_images(spec, 2)[:, :, :8, :8]
    return torch.from_numpy(np.tile(tile, (1, 1, 4, 4)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ends", ENDS)
def test_every_reader_finds_the_tokens_that_it_expects(three, random_images, ends, rule):
    spec = three.spec
    program = traced(three, ENDS[ends])
    shorter = merged(program, shapes_of(spec), MergeRecipe(r=R, rule=rule), layout_of(spec))
    images = equal_patches(random_images, spec)
    with torch.inference_mode():
        expected = replay(program, Run(three.params), images)
        found = replay(shorter, Run(three.params), images, only=tuple(program.outputs))
        lean = without_dead_rows(only_outputs(shorter, *program.outputs), shapes_of(spec))
        some = replay(lean, Run(three.params), images)
    tolerance = 1e-4 if rule in ("tome", "nearest", "greedy", "pitome") else 0.2
    for one, other, dead in zip(found, expected, some, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm() / other.norm()) < tolerance
        torch.testing.assert_close(dead, one, rtol=1e-4, atol=1e-4)
    count = shorter.shapes[shorter.outputs[stream_name(3, "x")]][1]
    assert count == spec.tokens - sum(R)


def test_restored_rows_are_those_that_hold_them(three, random_images):
    spec = three.spec
    program = traced(three, ENDS["heads"])
    shorter = merged(program, shapes_of(spec), MergeRecipe(r=R), layout_of(spec), sources=True)
    images = torch.from_numpy(random_images(spec, 2))
    wanted = ("y0", stream_name(3, "x"), stream_name(3, "source"))
    with torch.inference_mode():
        heads, x, source = replay(shorter, Run(three.params), images, only=wanted)
    held = source.argmax(1)
    whole = torch.stack([x[image, held[image]] for image in range(2)])
    torch.testing.assert_close(heads.transpose(1, 2).reshape(whole.shape), whole)


def test_tokens_are_found_through_every_operation_that_moves_them(three):
    program = traced(three, lambda ops, spec, xs: (ENDS["heads"](ops, spec, xs)[0], grid_of_patches(ops, spec, xs[-1])))
    spans = token_spans(program)
    heads, grid = program.outputs["y0"], program.outputs["y1"]
    assert (spans[heads].axis, spans[heads].start, spans[heads].stop) == (2, 0, 19)
    assert grid not in spans, "a grid has two axes for its tokens"
    patches = next(node for node in program.nodes if node.op == "slice" and node.scope == "ends")
    assert (spans[patches.outputs[0]].start, spans[patches.outputs[0]].stop) == (3, 19)


def test_a_block_without_a_residual_addition_says_so(three):
    def written(ops, image):
        x = embed(ops, three.spec, image)
        ops.scope("blocks.0.attn", 0, "attention")
        q, k, v = ops.heads("blocks.0.attn.qkv", x, 3, three.spec.num_heads)
        return ops.attention("blocks.0.attn", q, k, v, None)

    inputs = (Port(name="pixel_values", shape=(3, *three.spec.image_size)),)
    program = trace(written, shapes_of(three.spec), inputs=inputs, outputs=("y",))
    with pytest.raises(ProgramError, match="block 0 has no attention with a residual addition"):
        merged(program, shapes_of(three.spec), MergeRecipe(r=(2,)), layout_of(three.spec))


@pytest.mark.parametrize("ends", ["patches alone", "a grid"])
def test_deleted_patches_come_back_as_the_mean_of_their_neighbours(three, random_images, ends):
    spec = three.spec
    program = traced(three, ENDS[ends])
    deletion = Deletion(block=1, count=4)
    shorter = merged(program, shapes_of(spec), MergeRecipe(r=R), layout_of(spec), deletion=deletion)
    images = equal_patches(random_images, spec)
    with torch.inference_mode():
        (expected,) = replay(program, Run(three.params), images)
        (found,) = replay(shorter, Run(three.params), images, only=("y0",))
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    rows = found.flatten(2)
    spread = (rows - rows.mean(2 if ends == "a grid" else 1, keepdim=True)).abs().max()
    assert float(spread) < 1e-3, "equal patches stay equal, those that were deleted too"


def test_every_table_of_operations_speaks_the_vocabulary():
    """An operation under a name of yesterday would silently be one without a rule."""
    from vitfold.program import VOCABULARY, axes, queries
    from vitfold.transforms import replay, rows

    tables = (axes.ON_LAST_AXIS, axes._RULES, queries._ROWWISE, replay._ROWWISE, rows.RULES)
    assert set().union(*tables) <= set(VOCABULARY)
