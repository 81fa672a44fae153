"""Writing ONNX nodes, constants and weights with onnx-ir: names, metadata, shared constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.target import Target

Shape = tuple[int, ...]
SITE_KEY = "vitfold.site"
MICROSOFT = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Value:
    """An ONNX value and the shape of one image's share of it (batch axis 1).

    Where it is tokens in heads, (B, H, N, K) or (B, N, H, K), `rows` are the same numbers as (B, N, H K), if they are
    there.
    """

    onnx: ir.Value
    shape: Shape
    rows: ir.Value | None = None


class Writer:
    """An onnx-ir tape with named nodes, shared constants and parameters as initializers.

    `scope` names the nodes that have no site of their own; `real` is the graph's float type.
    """

    def __init__(self, params: Mapping[str, Array], target: Target) -> None:
        self.tape = Tape()
        self.params = params
        self.scope = "input"
        self.real = ir.DataType.from_numpy(np.dtype(target.graph_floats))
        self._constants: dict[tuple[str, Shape, bytes], ir.Value] = {}
        self._weights: dict[tuple[str, bool], ir.Value] = {}
        self._names: Counter[str] = Counter()

    def _unique(self, base: str) -> str:
        self._names[base] += 1
        seen = self._names[base]
        return base if seen == 1 else f"{base}.{seen}"

    def nodes(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        site: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """Append a node of `site`, or of the scope, and return its outputs."""
        name = self._unique(site if site is not None else f"{self.scope}.{op_type.lower()}")
        names = [name] if outputs == 1 else [f"{name}.out{i}" for i in range(outputs)]
        values: Sequence[ir.Value] = self.tape.op_multi_out(
            op_type,
            inputs,
            attributes=attributes or None,
            outputs=[ir.Value(name=f"{n}:0") for n in names],
            domain=domain,
            name=name,
            metadata_props={SITE_KEY: site or self.scope},
        )
        return values

    def node(
        self, op_type: str, *inputs: ir.Value | None, site: str | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """Append a node of one output."""
        return self.nodes(op_type, *inputs, site=site, domain=domain, **attributes)[0]

    def _as_real(self, array: Array, name: str) -> Array:
        """Return reals in the graph's float type.

        Raises:
            TargetError: if half precision cannot hold one of them.
        """
        with np.errstate(over="ignore"):
            real = array.astype(self.real.numpy(), copy=False)
        if real is not array and not np.isfinite(real).all() and np.isfinite(array).all():
            raise TargetError(
                f"half precision cannot hold a number of {name}: {np.abs(array).max():,.0f} is beyond 65,504; make the "
                "bundle in single precision: --target portable"
            )
        return real

    def constant(self, array: Array) -> ir.Value:
        """Return an initializer, reals in the graph's float type; equal small constants are shared."""
        if array.dtype == np.float32:
            array = self._as_real(array, self.scope)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._unique(f"const.{len(self._constants)}")
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def integers(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(np.array(values, np.int64))

    def long(self, value: Array | int) -> ir.Value:
        """An int64 scalar, or an array of them."""
        return self.constant(np.asarray(value, np.int64))

    def number(self, value: float) -> ir.Value:
        """A scalar of the graph's float type."""
        return self.constant(np.array(value, np.float32))

    def weight(self, name: str, *, transposed: bool = False) -> ir.Value:
        """Return a parameter as initializer; a transposed copy exists only while it is written."""
        key = (name, transposed)
        if key not in self._weights:
            array = self._as_real(self.params[name], name)
            if transposed:
                shape = (array.shape[1], array.shape[0])
                self._weights[key] = self.lazy(f"{name}.T", shape, self.real, lambda: array.T)
            else:
                self._weights[key] = self.tape.initializer(ir.tensor(array, name=name))
        return self._weights[key]

    def lazy(self, name: str, shape: Shape, kind: ir.DataType, make: Callable[[], Array]) -> ir.Value:
        """Return an initializer whose numbers exist only while they are written."""

        def tensor() -> ir.Tensor:
            return ir.tensor(np.ascontiguousarray(make()), name=name)

        return self.tape.initializer(ir.LazyTensor(tensor, kind, ir.Shape(shape), name=name))

    def bias(self, layer: str) -> ir.Value | None:
        """The bias of a layer; None where it has none."""
        name = f"{layer}.bias"
        return self.weight(name) if name in self.params else None

    def total(self, site: str, parts: Sequence[ir.Value]) -> ir.Value:
        """The sum of products."""
        sum_of = parts[0]
        for part in parts[1:]:
            sum_of = self.node("Add", sum_of, part, site=f"{site}.sum")
        return sum_of
