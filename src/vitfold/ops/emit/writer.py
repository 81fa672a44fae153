"""Writing ONNX nodes, constants and weights with onnx-ir.

Owns names, metadata and the sharing of constants. What is written is `lowering`'s choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.target import Target

Shape = tuple[int, ...]
SITE_KEY = "vitfold.site"


class Writer:
    """An onnx-ir tape with named nodes, shared constants and parameters as initializers."""

    def __init__(self, params: Mapping[str, Array], target: Target) -> None:
        self.tape = Tape()
        self._params = params
        self._target = target
        self._real = np.dtype(target.float_type)
        self._scope = "input"
        self._constants: dict[tuple[str, Shape, bytes], ir.Value] = {}
        self._weights: dict[tuple[str, bool], ir.Value] = {}
        self._names: Counter[str] = Counter()

    @property
    def _real_type(self) -> ir.DataType:
        return ir.DataType.from_numpy(self._real)

    def _unique(self, base: str) -> str:
        self._names[base] += 1
        seen = self._names[base]
        return base if seen == 1 else f"{base}.{seen}"

    def _nodes(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int = 1,
        site: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        name = self._unique(site if site is not None else f"{self._scope}.{op_type.lower()}")
        names = [name] if outputs == 1 else [f"{name}.out{i}" for i in range(outputs)]
        values: Sequence[ir.Value] = self.tape.op_multi_out(
            op_type,
            inputs,
            attributes=attributes or None,
            outputs=[ir.Value(name=f"{n}:0") for n in names],
            domain=domain,
            name=name,
            metadata_props={SITE_KEY: site or self._scope},
        )
        return values

    def _node(
        self, op_type: str, *inputs: ir.Value | None, site: str | None = None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        return self._nodes(op_type, *inputs, site=site, domain=domain, **attributes)[0]

    def _as_real(self, array: Array, name: str) -> Array:
        """Return reals in the graph's float type.

        Raises:
            TargetError: if half precision cannot hold one of them.
        """
        with np.errstate(over="ignore"):
            real = array.astype(self._real, copy=False)
        if real is not array and not np.isfinite(real).all() and np.isfinite(array).all():
            raise TargetError(
                f"half precision cannot hold a number of {name}: {np.abs(array).max():,.0f} is beyond 65,504; make the "
                "bundle in single precision: --target portable"
            )
        return real

    def _constant(self, array: Array) -> ir.Value:
        """Return an initializer, reals in the graph's float type; equal small constants are shared."""
        if array.dtype == np.float32:
            array = self._as_real(array, self._scope)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._unique(f"const.{len(self._constants)}")
            self._constants[key] = self.tape.initializer(ir.tensor(array, name=name))
        return self._constants[key]

    def _integers(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _number(self, value: float) -> ir.Value:
        return self._constant(np.array(value, np.float32))

    def _weight(self, name: str, *, transposed: bool = False) -> ir.Value:
        """Return a parameter as initializer; a transposed copy exists only while it is written."""
        key = (name, transposed)
        if key not in self._weights:
            array = self._as_real(self._params[name], name)
            label = f"{name}.T" if transposed else name
            if transposed:
                shape = ir.Shape((array.shape[1], array.shape[0]))

                def turned(array: Array = array, label: str = label) -> ir.Tensor:
                    return ir.tensor(np.ascontiguousarray(array.T), name=label)

                tensor: ir.TensorProtocol = ir.LazyTensor(turned, self._real_type, shape, name=label)
            else:
                tensor = ir.tensor(array, name=label)
            self._weights[key] = self.tape.initializer(tensor)
        return self._weights[key]
