"""The reference executor: parts run by torch, tensors kept in a dictionary.

Owns nothing that a graph does not do too; it is what graphs are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from vitfold.diffusion.parts import Part
from vitfold.model import Array
from vitfold.ops.protocol import Port
from vitfold.ops.run import Run


class Eager:
    """Parts of a model over `Run` or what is built on it."""

    def __init__(self, parts: Mapping[str, Part], ops: Run) -> None:
        self._parts = parts
        self._ops = ops
        self._kept: dict[str, Tensor] = {}
        self._rows = 0

    def call(self, part: str, *inputs: Array) -> Array:
        """Run a part once on arrays and return its first output."""
        with torch.inference_mode():
            result: Array = self._parts[part].run(self._ops, *(torch.from_numpy(array) for array in inputs))[0].numpy()
        return result

    def prepare(self, rows: int) -> None:
        """Forget everything."""
        self._kept, self._rows = {}, rows

    def write(self, name: str, values: Array) -> None:
        """Set a tensor."""
        self._kept[name] = torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def run(self, part: str, rows: int, renamed: Mapping[str, str] | None = None) -> None:
        """Run a part on what is kept; what nothing has written yet is zeros."""
        renamed = renamed or {}
        found = self._parts[part]
        inputs = [self._tensor(port, renamed.get(port.name, port.name), rows) for port in found.inputs]
        with torch.inference_mode():
            outputs = found.run(self._ops, *inputs)
        for port, output in zip(found.outputs, outputs, strict=True):
            self._kept[renamed.get(port.name, port.name)] = output

    def _tensor(self, port: Port, name: str, rows: int) -> Tensor:
        batch = port.batch if isinstance(port.batch, int) else rows
        if name not in self._kept:
            self._kept[name] = torch.zeros(batch, *port.shape)
        return self._kept[name][:batch]

    def read(self, name: str, rows: int) -> Array:
        """Return the first rows of a tensor."""
        array: Array = self._kept[name][:rows].numpy()
        return array

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that it keeps."""
        return sum(tensor.nbytes for tensor in self._kept.values())
