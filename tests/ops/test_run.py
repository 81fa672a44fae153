"""The reference interpreter: its annotations are executed, and what each operation means."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from vitfold.images import Batch
from vitfold.ops.count import Count
from vitfold.ops.emit import Emit
from vitfold.ops.protocol import Ops
from vitfold.ops.run import Run
from vitfold.program.trace import VOCABULARY
from vitfold.transforms.tokens import log_size


def ops() -> Run:
    weights = {
        "l.weight": np.ones((3, 4), np.float32),
        "p.weight": np.ones((5, 2, 4, 4), np.float32),
        "n.weight": np.ones(4, np.float32),
        "n.bias": np.zeros(4, np.float32),
    }
    return Run(weights)


WRONG = {
    "integers into a linear layer": lambda: ops().linear("l", torch.ones(2, 4, dtype=torch.int64)),
    "an array instead of a tensor": lambda: ops().add(np.ones(2), np.ones(2)),
    "an image without channels": lambda: ops().patch_embed("p", torch.ones(2, 8, 8)),
    "float indices": lambda: ops().take(torch.ones(2, 3, 4), torch.ones(2, 2)),
    "indices of another batch": lambda: ops().scatter_add(
        "s", torch.ones(2, 3, 4), torch.zeros(1, 2, dtype=torch.int64), torch.ones(2, 2, 4)
    ),
    "rows of another width": lambda: ops().prepend_rows(torch.ones(1, 1, 5), torch.ones(2, 3, 4)),
    "prefix rows with a batch": lambda: ops().prepend_rows(torch.ones(2, 1, 4), torch.ones(2, 3, 4)),
    "keys and values that differ": lambda: ops().attention(
        "a", torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4), torch.ones(2, 2, 5, 4), None
    ),
    "a bias of one key for all": lambda: ops().attention("a", *[torch.ones(2, 2, 3, 4)] * 3, torch.ones(2, 1, 3, 1)),
    "scores with a width": lambda: ops().topk_split(torch.ones(2, 3, 4), 1),
    "a vector for an identity": lambda: ops().identity_like(torch.ones(2, 3)),
    "a batch of words": lambda: Batch(pixel_values=np.array(["a", "b"]), index=(0, 1)),
    "a program over no operations": lambda: log_size(object(), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_annotations_are_executed(case):
    with pytest.raises(TypeCheckError):
        WRONG[case]()


@pytest.mark.parametrize("interpreter", [Run, Count, Emit])
def test_an_interpreter_writes_every_primitive(interpreter):
    """The lists in the docstring of `Ops` are those of the vocabulary, and a primitive has no body to inherit."""
    primitives, composites = (
        set(re.findall(r"\w+", re.sub(r"\s", " ", text)))
        for text in re.findall(r"\d\d \w+s, [^:]*:([^.]*)\.", Ops.__doc__ or "")
    )
    assert primitives | composites == set(VOCABULARY)
    assert (len(primitives), len(composites)) == (26, 18)
    assert [name for name in primitives if getattr(interpreter, name) is getattr(Ops, name)] == []
    assert [name for name in composites if getattr(interpreter, name) is getattr(Ops, name)]


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_patch_embed_takes_any_number_of_channels_in_raster_order(channels):
    weight = np.ones((1, channels, 2, 2), np.float32)
    image = torch.arange(6.0).repeat_interleave(2).reshape(2, 3 * 2).repeat_interleave(2, 0)[None, None]
    found = Run({"p.weight": weight}).patch_embed("p", image.expand(1, channels, -1, -1))
    assert found[0, :, 0].tolist() == [4.0 * channels * i for i in range(6)]


def test_parameters_are_shared_and_not_copied():
    weight = np.zeros((2, 2), np.float32)
    run = Run({"w": weight})
    weight[0, 1] = 7
    assert run.param("w")[0, 1] == 7


def test_rank_split_orders_the_largest_descending_and_the_others_ascending():
    scores = torch.tensor([[3.0, 9.0, 1.0, 9.0, 4.0]])[..., None]
    first, rest = ops().topk_split(scores, 3)
    assert (first[..., 0].tolist(), rest[..., 0].tolist()) == ([[1, 3, 4]], [[0, 2]])


def test_scatter_add_adds_all_rows_that_meet():
    found = ops().scatter_add(
        "s", torch.ones(1, 3, 1), torch.tensor([[[2], [0], [2]]]), torch.tensor([[[1.0], [10.0], [100.0]]])
    )
    assert found[0, :, 0].tolist() == [11.0, 1.0, 102.0]


def test_a_query_of_batch_one_attends_to_every_image():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 1, 4, generator=generator)
    k, v = torch.randn(2, 3, 2, 5, 4, generator=generator)
    found = ops().attention("a", q, k, v, None)
    weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1)
    torch.testing.assert_close(found, weights @ v)


def test_an_unknown_activation_is_a_bug_and_raises():
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        ops().activation("mish", torch.ones(2, 3), "site")


def test_heads_are_a_linear_layer_parted_and_turned():
    weight = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2 * 3 * 4, 5)
    x = torch.arange(2 * 7 * 5, dtype=torch.float32).reshape(2, 7, 5)
    found = Run({"l.weight": weight}).heads("l", x, 2, 3)
    y = x.numpy() @ weight.T
    assert len(found) == 2
    for part, values in enumerate(found):
        for head in range(3):
            start = (part * 3 + head) * 4
            np.testing.assert_allclose(values[:, head].numpy(), y[:, :, start : start + 4])
