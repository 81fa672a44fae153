"""Parameters with a row for every token (rotary tables, biases of pairs) give those of the places that tokens keep."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from vitfold.ops.count import Count
from vitfold.ops.emit import emit_ports, write_onnx
from vitfold.ops.protocol import Port
from vitfold.ops.run import Run
from vitfold.program import replay, trace
from vitfold.recipe import MergeRecipe
from vitfold.target import TARGETS
from vitfold.transforms.merging import Layout, merged

TOKENS, WIDTH, HEADS = 9, 8, 2
BATCH, PREFIX = 3, 1


def params(seed: int = 0):
    random = np.random.default_rng(seed)
    shapes = {
        **{f"{i}.{name}.weight": (rows, WIDTH) for i in (0, 1) for name, rows in (("qkv", 3 * WIDTH), ("proj", WIDTH))},
        "turn": (1, 1, TOKENS - PREFIX, WIDTH // HEADS),
        "bias": (1, HEADS, TOKENS, TOKENS),
    }
    return {name: (0.7 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def two_blocks(ops, x):
    """Attention with keys multiplied, behind the prefix, by a table, and a bias for every pair."""
    for block in (0, 1):
        ops.scope(f"blocks.{block}.attn", block, "attention")
        q, k, v = ops.heads(f"{block}.qkv", x, 3, HEADS)
        front, patches = ops.slice(k, 2, 0, PREFIX), ops.slice(k, 2, PREFIX, TOKENS)
        k = ops.concat((front, ops.multiply(patches, ops.param("turn"))), 2)
        y = ops.attention(f"blocks.{block}.attn", q, k, v, ops.param("bias"))
        x = ops.add(x, ops.linear(f"{block}.proj", ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (TOKENS, WIDTH))))
    return x


def program(r):
    held = {name: array.shape for name, array in params().items()}
    plain = trace(two_blocks, held, inputs=(Port(name="x", shape=(TOKENS, WIDTH)),), outputs=("y",))
    recipe = MergeRecipe(r=r, order="index")
    return merged(plain, held, recipe, Layout(prefix=PREFIX, grid=(2, 4)), sources=True)


def test_a_token_keeps_the_rows_of_the_place_where_it_was_joined():
    """Two equal tokens merge in block 0; block 1 is computed by hand with one of them, of size 2."""
    numbers = params()
    numbers["0.proj.weight"] *= 0.0  # block 0 changes nothing, so that tokens stay equal
    numbers["turn"][:] = np.abs(numbers["turn"]) + 0.5
    random = np.random.default_rng(1)
    x = random.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    gone, kept = 2, 5  # the first of A and one of B behind a prefix of one
    numbers["turn"][0, 0, gone - PREFIX] = numbers["turn"][0, 0, kept - PREFIX] * 1.01  # keys nearly alike, rows not
    x[0, gone] = x[0, kept]
    with torch.inference_mode():
        found = replay(program((1, 0)), Run(numbers), torch.from_numpy(x), only=("y",))[0][0].numpy()
    rows = [i for i in range(TOKENS) if i != gone]
    tokens = x[0, rows]
    size = np.array([2.0 if i == kept else 1.0 for i in rows])
    qkv = (tokens @ numbers["1.qkv.weight"].T).reshape(len(rows), 3, HEADS, WIDTH // HEADS).transpose(1, 2, 0, 3)
    turn = np.concatenate((np.ones((PREFIX, WIDTH // HEADS)), numbers["turn"][0, 0]))[rows]
    scores = qkv[0] @ (qkv[1] * turn).transpose(0, 2, 1) / np.sqrt(WIDTH // HEADS)
    scores = scores + numbers["bias"][0][:, rows][:, :, rows] + np.log(size)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    y = tokens + (weights @ qkv[2]).transpose(1, 0, 2).reshape(len(rows), WIDTH) @ numbers["1.proj.weight"].T
    expected = y[[rows.index(kept if i == gone else i) for i in range(TOKENS)]]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_given_back_in_between():
    nodes = program((2, 2)).nodes
    assert sum(node.op == "lookup" for node in nodes) == 2
    assert sum("unmerge" in node.site for node in nodes) == 1, "only the output, which promises all tokens"


@pytest.mark.parametrize("target", ["cpu", "portable", "openvino", "tensorrt-fp16"])
def test_every_target_writes_it(target, tmp_path):
    numbers, shorter = params(), program((2, 1))
    graph = emit_ports(
        lambda ops, x: replay(shorter, ops, x, only=("y",)), numbers, TARGETS[target],
        inputs=(Port(name="x", shape=(TOKENS, WIDTH)),), outputs=("y",),
    )  # fmt: skip
    write_onnx(graph, tmp_path / "m.onnx")
    x = np.random.default_rng(3).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x})
    with torch.inference_mode():
        (expected,) = replay(shorter, Run(numbers), torch.from_numpy(x), only=("y",))
    atol = 0.15 if "fp16" in target else 1e-5  # outputs reach 20
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=atol)


@pytest.mark.parametrize("lead", [(), (1,), (2,), (2, 3)])
def test_rows_and_entries_are_those_of_numpy(lead, tmp_path):
    random = np.random.default_rng(0)
    table = random.standard_normal((1, *lead, 5, 5)).astype(np.float32)
    rows, columns = random.integers(0, 5, (BATCH, 4, 1)), random.integers(0, 5, (BATCH, 3, 1))

    def both(ops, x):
        some = ops.affine_index(ops.topk_split(x, 4)[0], 1, 0)
        others = ops.topk_split(x, 3)[0]
        return ops.lookup("t", some), ops.lookup("t", some, others)

    run = Run({"t": table})
    expected = np.stack([np.take(table[0], rows[i, :, 0], -2) for i in range(BATCH)])
    np.testing.assert_array_equal(run.lookup("t", torch.from_numpy(rows)).numpy(), expected)
    entries = np.stack([table[0][..., rows[i], columns[i, :, 0]] for i in range(BATCH)])
    np.testing.assert_array_equal(run.lookup("t", torch.from_numpy(rows), torch.from_numpy(columns)).numpy(), entries)
    count = Count({"t": table.shape})
    assert count.lookup("t", (1, 4, 1), (1, 3, 1)) == (1, *entries.shape[1:])
    graph = emit_ports(
        both, {"t": table}, TARGETS["cpu"], inputs=(Port(name="x", shape=(5, 1)),), outputs=("rows", "entries")
    )
    write_onnx(graph, tmp_path / "t.onnx")
    scores = random.permuted(np.tile(np.arange(5.0, dtype=np.float32), (BATCH, 1)), axis=1)[..., None]
    found = onnxruntime.InferenceSession(tmp_path / "t.onnx").run(None, {"x": scores})
    for one, other in zip(found, both(run, torch.from_numpy(scores)), strict=True):
        np.testing.assert_array_equal(one, other.numpy())
