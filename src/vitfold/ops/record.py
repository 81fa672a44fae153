"""The interpreter that runs a program in float and shows every site's numbers to an observer.

Sites are those of `quantizer`; besides, `{layer}.y` is the output of a linear layer, `{site}.qk.y` the scaled and
biased logits of an attention and `{site}.av.y` its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.protocol import input_site
from vitfold.ops.run import Run

Observer = Callable[[str, Tensor], None]


class Record(Run):
    """`Run`, with an observer. With gradients enabled, what it sees can be differentiated."""

    def __init__(self, params: Mapping[str, Array], see: Observer, *, device: str = "cpu") -> None:
        super().__init__(params, device=device)
        self._see = see

    def _operand(self, site: str, x: Tensor) -> Tensor:
        self._see(site, x)
        return x

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """X W^T + b; seen: x and y, under the name of their rows where they have one."""
        y = super().linear(layer, x, rows)
        self._see(f"{input_site(layer, rows).removesuffix('.x')}.y", y)
        return y

    def _in_steps(self, site: str) -> bool:
        return True

    def _average(self, site: str, logits: Tensor, v: Tensor) -> Tensor:
        self._see(f"{site}.qk.y", logits)
        y = super()._average(site, logits, v)
        self._see(f"{site}.av.y", y)
        return y
