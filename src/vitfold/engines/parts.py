"""Parts of a model as graphs on ONNX Runtime's CPU provider, which read and write kept tensors in place.

Owns the memory of those tensors and binds it (IO binding): between steps nothing is copied but what comes from outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from vitfold.engines.graphs import check_graph
from vitfold.engines.onnxruntime import EXCEPTIONS, load_graph, reason_of, session_options
from vitfold.engines.session import PLAIN, SHOWN, check_threads
from vitfold.errors import BundleError, EngineError
from vitfold.model import Array
from vitfold.ops.protocol import Port

Ends = tuple[Sequence[Port], Sequence[Port]]


class PartsSession:
    """One graph per part, `paths[part]`, with the inputs and outputs that `ends[part]` names.

    `execution` says how integer products run: a key of `engines.onnxruntime.EXECUTIONS`.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        ends: Mapping[str, Ends],
        *,
        threads: int | None = None,
        execution: str = PLAIN,
    ) -> None:
        check_threads(threads)
        self._ends, self.execution = ends, execution
        self._sessions = {part: _load(path, ends[part], threads, execution) for part, path in paths.items()}
        self._kept: dict[str, Array] = {}
        self._bindings: dict[tuple[str, int, tuple[tuple[str, str], ...]], ort.IOBinding] = {}
        self._rows = 0

    @property
    def engine(self) -> str:
        """Name, version, and how integer products run where that is not as usual."""
        return f"onnxruntime {ort.__version__}{SHOWN[self.execution]}"

    def call(self, part: str, *inputs: Array) -> Array:
        """Run a part once on arrays and return its first output."""
        names = [port.name for port in self._ends[part][0]]
        try:
            result: Array = self._sessions[part].run(None, dict(zip(names, inputs, strict=True)))[0]
        except EXCEPTIONS as error:
            raise EngineError(f"ONNX Runtime failed while running {part}: {reason_of(error)}") from None
        return result

    def prepare(self, rows: int) -> None:
        """Fill what is kept with zeros; bound memory stays where it is while the batch does."""
        if rows != self._rows:
            self._kept, self._bindings, self._rows = {}, {}, rows
        for array in self._kept.values():
            array.fill(0)

    def write(self, name: str, values: Array) -> None:
        """Copy values in."""
        if name not in self._kept:
            self._kept[name] = np.zeros(values.shape, np.float32)
        self._kept[name][: len(values)] = values

    def run(self, part: str, rows: int, renamed: Mapping[str, str] | None = None) -> None:
        """Run a part on what is kept; the first time binds its ends to their memory."""
        key = (part, rows, tuple(sorted((renamed or {}).items())))
        if key not in self._bindings:
            self._bindings[key] = self._bind(part, rows, renamed or {})
        try:
            self._sessions[part].run_with_iobinding(self._bindings[key])
        except EXCEPTIONS as error:
            raise EngineError(f"ONNX Runtime failed while running {part}: {reason_of(error)}") from None

    def _bind(self, part: str, rows: int, renamed: Mapping[str, str]) -> ort.IOBinding:
        binding = self._sessions[part].io_binding()
        inputs, outputs = self._ends[part]
        for ports, bind in ((inputs, binding.bind_input), (outputs, binding.bind_output)):
            for port in ports:
                array = self._memory(port, renamed.get(port.name, port.name), rows)
                bind(port.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        return binding

    def _memory(self, port: Port, name: str, rows: int) -> Array:
        if name not in self._kept:
            room = port.batch if isinstance(port.batch, int) else self._rows
            self._kept[name] = np.zeros((room, *port.shape), np.float32)
        return self._kept[name] if isinstance(port.batch, int) else self._kept[name][:rows]

    def read(self, name: str, rows: int) -> Array:
        """Return the first rows of a tensor: a view, until the next part runs."""
        return self._kept[name][:rows]

    @property
    def kept_bytes(self) -> int:
        """Bytes of all tensors that it keeps."""
        return sum(array.nbytes for array in self._kept.values())

    def close(self) -> None:
        """Drop graphs and tensors."""
        self._bindings, self._sessions, self._kept = {}, {}, {}


def _load(path: Path, ends: Ends, threads: int | None, execution: str) -> ort.InferenceSession:
    check_graph(path)
    session = load_graph(path, session_options(threads, execution=execution))
    for ports, found in zip(ends, (session.get_inputs(), session.get_outputs()), strict=True):
        shapes = {end.name: (end.type, tuple(end.shape)) for end in found}
        if {port.name for port in ports} != set(shapes):
            raise _other_graph(path, f"it has the ends {', '.join(sorted(shapes))[:200]}")
        for port in ports:
            kind, shape = shapes[port.name]
            fits = len(shape) == len(port.shape) + 1 and all(
                not isinstance(size, int) or size == wanted for size, wanted in zip(shape[1:], port.shape, strict=True)
            )
            if kind != "tensor(float)" or not fits or (isinstance(shape[0], int) and shape[0] != port.batch):
                raise _other_graph(path, f"its {port.name[:60]} is {kind} of shape {shape}")
    return session


def _other_graph(path: Path, found: str) -> BundleError:
    return BundleError(f"{path} is not the graph that the plan needs: {found}; make the bundle again")
