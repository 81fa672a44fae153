"""What each engine wants from a graph: a table, not code.

Owns the names of targets and the lowering choices that measurements settled for each. How a choice
is written in ONNX is `ops.emit`'s business; running it is `engines`'.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from vitfold.errors import TargetError, nearest

Gather = Literal["gather_nd", "gather_elements", "one_hot"]
Scatter = Literal["one_hot", "scatter_elements"]
Bias = Literal["gemm", "add"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Lowering choices of one target.

    `gather` and `scatter_add` say how token rows are picked and summed, `linear_bias` whether a linear
    layer is one Gemm or a MatMul and an Add, `contrib` whether ONNX Runtime's own operators
    (com.microsoft) may appear.
    """

    name: str
    engine: str
    opset: int
    contrib: bool
    gather: Gather
    scatter_add: Scatter
    linear_bias: Bias
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            engine="onnxruntime",
            opset=20,
            contrib=True,
            gather="gather_nd",
            scatter_add="one_hot",
            linear_bias="gemm",
            why="float32 on ONNX Runtime's CPU provider, with its fused operators",
        ),
        Target(
            name="portable",
            engine="onnxruntime",
            opset=20,
            contrib=False,
            gather="gather_elements",
            scatter_add="one_hot",
            linear_bias="add",
            why="float32, standard ONNX operators only: for any runtime, at some cost on ONNX Runtime",
        ),
    )
}


_CHOICES: dict[str, tuple[str, ...]] = {
    "gather": get_args(Gather),
    "scatter_add": get_args(Scatter),
    "linear_bias": get_args(Bias),
}


def find_target(name: str) -> Target:
    """Return the target of this name; "cpu:gather=one_hot,linear_bias=add" changes single lowering choices.

    Raises:
        TargetError: offering the nearest names.
    """
    base, _, changes = name.partition(":")
    if base not in TARGETS:
        raise TargetError(f"unknown target {base!r}; {nearest(base, TARGETS)}")
    target = TARGETS[base]
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in _CHOICES:
            raise TargetError(f"unknown lowering choice {key!r} in target {name!r}; {nearest(key, _CHOICES)}")
        if value not in _CHOICES[key]:
            raise TargetError(f"{key} cannot be {value!r} in target {name!r}; {nearest(value, _CHOICES[key])}")
        changed: dict[str, Any] = {key: value, "name": name}
        target = replace(target, **changed)
    return target
