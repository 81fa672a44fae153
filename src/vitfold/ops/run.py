"""The interpreter that executes a program eagerly in torch; the reference for all others.

Owns what each operation means numerically. Gradients flow when the caller asks for them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vitfold.model import Array


class Run:
    """Torch values; parameters are shared with the NumPy arrays, not copied."""

    def __init__(self, params: Mapping[str, Array], *, device: str = "cpu") -> None:
        self._params = {name: torch.from_numpy(array).to(device) for name, array in params.items()}

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Names are of no use here."""

    def param(self, name: str) -> Tensor:
        """Return the parameter itself."""
        return self._params[name]

    def patch_embed(self, layer: str, image: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        """Convolve with stride = kernel."""
        weight = self._params[f"{layer}.weight"]
        patches = F.conv2d(image, weight, self._params.get(f"{layer}.bias"), stride=weight.shape[2:])
        return patches.flatten(2).transpose(1, 2)

    def constant(self, values: Array) -> Tensor:
        """The numbers in single precision."""
        return torch.from_numpy(np.asarray(values, np.float32))

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """X W^T + b."""
        return F.linear(x, self._params[f"{layer}.weight"], self._params.get(f"{layer}.bias"))

    def heads(self, layer: str, x: Float[Tensor, "B N I"], parts: int, heads: int) -> tuple[Tensor, ...]:
        """`linear`, then one view per part."""
        y = self.linear(layer, x)
        rows = self.reshape(y, (y.shape[1], parts * heads, y.shape[2] // (parts * heads)))
        return self.split(self.transpose(rows, (0, 2, 1, 3)), parts, 1)

    def layer_norm(self, layer: str, x: Float[Tensor, "*B D"], eps: float) -> Float[Tensor, "*B D"]:
        """LayerNorm over the last axis."""
        return F.layer_norm(x, x.shape[-1:], self._params[f"{layer}.weight"], self._params[f"{layer}.bias"], eps)

    def activation(self, kind: str, x: Float[Tensor, "*B"], site: str) -> Float[Tensor, "*B"]:
        """The function named `kind`."""
        if kind == "gelu_erf":
            return F.gelu(x)
        if kind == "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        if kind == "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        if kind == "silu":
            return F.silu(x)
        if kind == "relu":
            return F.relu(x)
        if kind == "elu":
            return F.elu(x)
        raise ValueError(f"unknown activation {kind!r}")

    def attention(
        self,
        site: str,
        q: Float[Tensor, "#B H N K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        bias: Float[Tensor, "#B 1 1 M"] | None,
    ) -> Float[Tensor, "B H N K"]:
        """Scaled dot-product attention."""
        if q.shape[0] != k.shape[0]:
            q = q.expand(k.shape[0], -1, -1, -1)
        mask = None if bias is None else bias.expand(-1, -1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0 / math.sqrt(q.shape[-1]))

    def matmul(
        self, site: str, a: Float[Tensor, ...], b: Float[Tensor, ...], *, transpose_b: bool = False
    ) -> Float[Tensor, ...]:
        """Batched product of the last two axes."""
        return a @ (b.transpose(-1, -2) if transpose_b else b)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        return a + b

    def add_scalar(self, a: Tensor, value: float) -> Tensor:
        """a + value."""
        return a + value

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a * b."""
        return a * b

    def scale(self, a: Tensor, value: float) -> Tensor:
        """a * value."""
        return a * value

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        """a / b."""
        return a / b

    def log(self, a: Tensor) -> Tensor:
        """Natural logarithm."""
        return torch.log(a)

    def tanh(self, a: Tensor) -> Tensor:
        """Hyperbolic tangent."""
        return torch.tanh(a)

    def norm(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 1"]:
        """Euclidean norm of rows."""
        return x.square().sum(-1, keepdim=True).sqrt()

    def softmax(self, site: str, a: Tensor) -> Tensor:
        """Softmax over the last axis."""
        return a.softmax(-1)

    def similarity(self, site: str, metric: Float[Tensor, "B N K"], a: range, b: range) -> Float[Tensor, "B A M"]:
        """Cosine of rows."""
        unit = F.normalize(metric, dim=-1)
        return unit[:, a.start : a.stop : a.step] @ unit[:, b.start : b.stop : b.step].transpose(-1, -2)

    def mean(self, a: Tensor, axis: int) -> Tensor:
        """Mean over one axis."""
        return a.mean(axis)

    def sum(self, a: Tensor, axis: int) -> Tensor:
        """Sum over one axis."""
        return a.sum(axis)

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

    def abs_max(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 1"]:
        """Largest absolute value of each row."""
        return x.abs().amax(-1, keepdim=True)

    def reduce_max(self, a: Tensor, axis: int) -> Tensor:
        """Maximum over one axis."""
        return a.amax(axis)

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

    def scatter_add(
        self, site: str, x: Float[Tensor, "B N D"], index: Int[Tensor, "B R 1"], rows: Float[Tensor, "B R D"]
    ) -> Float[Tensor, "B N D"]:
        """Add rows onto rows."""
        return x.scatter_add(1, index.expand_as(rows), rows)

    def merge_rows(
        self,
        site: str,
        parts: tuple[Float[Tensor, "B N _"], ...],
        survivors: Int[Tensor, "B M 1"],
        into: Int[Tensor, "B R 1"],
        moved: Int[Tensor, "B R 1"],
    ) -> tuple[Float[Tensor, "B M _"], ...]:
        """Each part by itself."""
        return tuple(self.scatter_add(site, self.take(x, survivors), into, self.take(x, moved)) for x in parts)

    def ones_like(self, a: Tensor) -> Tensor:
        """Ones."""
        return torch.ones_like(a)

    def identity_like(self, a: Float[Tensor, "B N 1"]) -> Float[Tensor, "B N N"]:
        """One identity matrix per image."""
        return torch.eye(a.shape[1], dtype=a.dtype, device=a.device).expand(a.shape[0], -1, -1)
