"""The interpreter that executes a program eagerly in torch: what each operation means numerically.

Gradients flow when the caller asks for them. Interpreters that see or round values derive from it and override
`_operand`, which is shown what stands in front of a product, and `_step`, which is shown what an attention computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.foreign import run_foreign
from vitfold.ops.protocol import Ops, input_site

_ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "power": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "log": torch.log,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "reciprocal": torch.reciprocal,
    "negative": torch.neg,
    "abs": torch.abs,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "floor": torch.floor,
}
_REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
    "abs_max": lambda a, axis, keepdim: a.abs().amax(axis, keepdim=keepdim),
    "norm": lambda a, axis, keepdim: a.square().sum(axis, keepdim=keepdim).sqrt(),
}
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_erf": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "elu": F.elu,
}


class Run(Ops[Tensor]):
    """Torch values; parameters are shared with the NumPy arrays, not copied, and `learned` ones stand for theirs."""

    def __init__(
        self, params: Mapping[str, Array], *, learned: Mapping[str, Tensor] | None = None, device: str = "cpu"
    ) -> None:
        self._params = {name: torch.from_numpy(array).to(device) for name, array in params.items()}
        self._params |= learned or {}
        self._device = device

    def shape(self, a: Tensor) -> tuple[int, ...]:
        """Its shape."""
        return tuple(a.shape)

    def _operand(self, site: str, x: Tensor) -> Tensor:
        """What a linear layer or a product of attention takes for the operand `site`."""
        return x

    def _in_steps(self, site: str) -> bool:
        """Say whether operands or steps of this attention are seen or changed."""
        return False

    def _step(self, site: str, x: Tensor) -> Tensor:
        """What the step `site` of an attention hands on."""
        return x

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Names are of no use here."""

    def param(self, name: str) -> Tensor:
        """Return the parameter itself."""
        return self._params[name]

    def constant(self, values: Array) -> Tensor:
        """The numbers in single precision."""
        return torch.from_numpy(np.asarray(values, np.float32)).to(self._device)

    def patch_embed(self, layer: str, image: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        """Convolve with stride = kernel."""
        weight = self._params[f"{layer}.weight"]
        patches = F.conv2d(image, weight, self._params.get(f"{layer}.bias"), stride=weight.shape[2:])
        return patches.flatten(2).transpose(1, 2)

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """X W^T + b."""
        x = self._operand(input_site(layer, rows), x)
        return F.linear(x, self._params[f"{layer}.weight"], self._params.get(f"{layer}.bias"))

    def layer_norm(self, layer: str, x: Float[Tensor, "*B D"], eps: float) -> Float[Tensor, "*B D"]:
        """LayerNorm over the last axis."""
        return F.layer_norm(x, x.shape[-1:], self._params[f"{layer}.weight"], self._params[f"{layer}.bias"], eps)

    def activation(self, kind: str, x: Float[Tensor, "*B"], site: str) -> Float[Tensor, "*B"]:
        """The function named `kind`."""
        if kind not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {kind!r}")
        return _ACTIVATIONS[kind](x)

    def attention(
        self,
        site: str,
        q: Float[Tensor, "#B H N K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        bias: Float[Tensor, "#B #H #N M"] | None,
    ) -> Float[Tensor, "B H N K"]:
        """Scaled dot-product attention, fused where nothing within it is asked for."""
        if self._in_steps(site):
            return self._attention_in_steps(site, q, k, v, bias)
        if q.shape[0] != k.shape[0]:
            q = q.expand(k.shape[0], -1, -1, -1)
        mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0 / math.sqrt(q.shape[-1]))

    def _attention_in_steps(self, site: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(K) + bias) v, every operand and every step shown."""
        q = q.expand(k.shape[0], -1, -1, -1)
        q, k, v = (self._operand(f"{site}.{name}", x) for name, x in (("q", q), ("k", k), ("v", v)))
        logits = self._logits(site, q, k)
        if bias is not None:
            logits = self._step(f"{site}.bias", logits + bias)
        return self._average(site, logits, v)

    def _logits(self, site: str, q: Tensor, k: Tensor) -> Tensor:
        """Q k^T / sqrt(K)."""
        return self._step(f"{site}.qk", (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1])))

    def _average(self, site: str, logits: Tensor, v: Tensor) -> Tensor:
        """softmax(logits) v."""
        weights = self._step(f"{site}.softmax", logits.softmax(-1))
        return self._step(f"{site}.av", self._operand(f"{site}.softmax", weights) @ v)

    def matmul(
        self, site: str, a: Float[Tensor, ...], b: Float[Tensor, ...], *, transpose_b: bool = False
    ) -> Float[Tensor, ...]:
        """Batched product of the last two axes."""
        return a @ (b.transpose(-1, -2) if transpose_b else b)

    def softmax(self, site: str, a: Tensor) -> Tensor:
        """Softmax over the last axis."""
        return a.softmax(-1)

    def elementwise(self, op: str, a: Tensor, b: Tensor | None = None) -> Tensor:
        """The function named `op`."""
        return _ELEMENTWISE[op](a) if b is None else _ELEMENTWISE[op](a, b)

    def reduce(self, op: str, a: Tensor, axis: int, *, keep: bool = False) -> Tensor:
        """The function named `op`."""
        return _REDUCTIONS[op](a, axis, keepdim=keep)

    def unit(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Rows of length 1."""
        return F.normalize(x, dim=-1)

    def reshape(self, a: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Reshape behind the batch axis."""
        return a.reshape(a.shape[0], *shape)

    def transpose(self, a: Tensor, perm: tuple[int, ...]) -> Tensor:
        """Permute axes."""
        return a.permute(perm)

    def split(self, a: Tensor, parts: int, axis: int) -> tuple[Tensor, ...]:
        """Split into equal parts."""
        return a.chunk(parts, axis)

    def slice(self, a: Tensor, axis: int, start: int, stop: int, step: int = 1) -> Tensor:
        """start:stop:step of one axis."""
        index = [slice(None)] * a.ndim
        index[axis] = slice(start, stop, step)
        return a[tuple(index)]

    def concat(self, parts: tuple[Tensor, ...], axis: int) -> Tensor:
        """Concatenate."""
        return torch.cat(parts, axis)

    def prepend_rows(
        self, rows: Float[Tensor, "1 *H P D"], x: Float[Tensor, "B *H N D"]
    ) -> Float[Tensor, "B *H P+N D"]:
        """Rows in front of every image's."""
        return torch.cat((rows.expand(x.shape[0], *rows.shape[1:]), x), -2)

    def argmax(self, a: Float[Tensor, "B N M"]) -> tuple[Float[Tensor, "B N 1"], Int[Tensor, "B N 1"]]:
        """Largest value of the last axis and its index."""
        values, index = a.max(-1, keepdim=True)
        return values, index

    def topk_split(
        self, scores: Float[Tensor, "B N 1"], count: int, *, by_score: bool = False
    ) -> tuple[Int[Tensor, "B R 1"], Int[Tensor, "B K 1"]]:
        """Indices of the `count` largest, and of the others."""
        if by_score:
            rest = scores.shape[1] - count
            order = torch.sort(scores, dim=1, stable=True).indices
            return order[:, rest:], order[:, :rest]
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        return order[:, :count], order[:, count:].sort(1).values

    def affine_index(self, index: Int[Tensor, "B R 1"], step: int, start: int) -> Int[Tensor, "B R 1"]:
        """start + step * index."""
        return start + step * index

    def pad_index(self, index: Int[Tensor, "B R 1"], before: range, after: range) -> Int[Tensor, "B M 1"]:
        """Constant indices in front and behind."""
        ends = (torch.tensor(tuple(end), dtype=index.dtype, device=index.device) for end in (before, after))
        front, back = (end[None, :, None].expand(index.shape[0], -1, -1) for end in ends)
        return torch.cat((front, index, back), 1)

    def take(self, x: Shaped[Tensor, "B N D"], index: Int[Tensor, "B R 1"]) -> Shaped[Tensor, "B R D"]:
        """Gather rows of every image."""
        return x.gather(1, index.expand(-1, -1, x.shape[2]))

    def lookup(self, name: str, rows: Int[Tensor, "B R 1"], columns: Int[Tensor, "B M 1"] | None = None) -> Tensor:
        """Index the parameter."""
        table = self._params[name][0]
        flat = table.reshape(-1, *table.shape[-2:])
        index = rows[:, :, 0]
        found = flat[:, index] if columns is None else flat[:, index[:, :, None], columns[:, None, :, 0]]
        return found.transpose(0, 1).reshape(len(rows), *table.shape[:-2], *found.shape[2:])

    def scatter_add(
        self, site: str, x: Float[Tensor, "B N D"], index: Int[Tensor, "B R 1"], rows: Float[Tensor, "B R D"]
    ) -> Float[Tensor, "B N D"]:
        """Add rows onto rows."""
        return x.scatter_add(1, index.expand_as(rows), rows)

    def foreign(
        self,
        site: str,
        parts: tuple[Tensor, ...],
        graph: Array,
        weights: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        macs: int = 0,
    ) -> tuple[Tensor, ...]:
        """In ONNX Runtime; no gradient passes through."""
        found = run_foreign(graph, [part.detach().cpu().numpy() for part in parts], [self._params[w] for w in weights])
        return tuple(torch.from_numpy(array).to(self._device) for array in found)

    def identity_like(self, a: Float[Tensor, "B N 1"]) -> Float[Tensor, "B N N"]:
        """One identity matrix for all images: a view."""
        return torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(a.shape[0], -1, -1)
