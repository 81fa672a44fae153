"""The interpreter that runs a program in float and shows every site's numbers to an observer.

Owns which values are seen under which names; what is kept of them is the observer's choice. Sites are
those of `quantizer`; besides, `{layer}.y` is the output of a linear layer, `{site}.qk.y` the scaled and
biased logits of an attention and `{site}.av.y` its output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.run import Run

Observer = Callable[[str, Tensor], None]


class Record(Run):
    """`Run`, with an observer. With gradients enabled, what it sees can be differentiated."""

    def __init__(self, params: Mapping[str, Array], see: Observer, *, device: str = "cpu") -> None:
        super().__init__(params, device=device)
        self._see = see

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """X W^T + b; seen: x and y, under the name of their rows where they have one."""
        owner = f"{layer}.{rows}" if rows else layer
        self._see(f"{owner}.x", x)
        y = super().linear(layer, x)
        self._see(f"{owner}.y", y)
        return y

    def attention(
        self,
        site: str,
        q: Float[Tensor, "#B H N K"],
        k: Float[Tensor, "B H M K"],
        v: Float[Tensor, "B H M K"],
        bias: Float[Tensor, "#B 1 1 M"] | None,
    ) -> Float[Tensor, "B H N K"]:
        """softmax(q k^T / sqrt(K) + bias) v; seen: q, k, v, softmax, and both products."""
        q = q.expand(k.shape[0], -1, -1, -1)
        for name, operand in (("q", q), ("k", k), ("v", v)):
            self._see(f"{site}.{name}", operand)
        logits = (q @ k.transpose(-1, -2)) * (1.0 / math.sqrt(q.shape[-1]))
        if bias is not None:
            logits = logits + bias
        self._see(f"{site}.qk.y", logits)
        weights = logits.softmax(-1)
        self._see(f"{site}.softmax", weights)
        y = weights @ v
        self._see(f"{site}.av.y", y)
        return y
