"""A whole ONNX graph from a program, and its file: inputs, outputs, opsets, and where weights are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitfold.model import Architecture, Array, GraphSpec, Model
from vitfold.ops.count import SiteCost
from vitfold.ops.emit.lowering import Emit
from vitfold.ops.emit.writer import MICROSOFT, Value
from vitfold.ops.protocol import Port
from vitfold.quantizer import Quantizer
from vitfold.target import Target

INPUT_NAME = "pixel_values"
EXTERNAL_DATA_BYTES = 256 * 1024 * 1024
SHARED_WEIGHTS = "weights.bin"
_LEAST_SHARED_BYTES = 1024
_ALIGNMENT = 64
_IR_VERSION = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """An emitted graph, not yet written, and the work that it does per image."""

    model: ir.Model
    costs: tuple[SiteCost, ...]
    weight_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return sum(cost.macs for cost in self.costs)


def emit_graph(
    program: Callable[[Emit, Value], Value | tuple[Value, ...]],
    model: Model,
    target: Target,
    quantizers: Mapping[str, Quantizer] | None = None,
    *,
    projections: Mapping[str, str] | None = None,
) -> Graph:
    """Run `program` over the emitting operations and return the ONNX graph; its ends are those of the architecture.

    The model's weights lie on the grids of `quantizers`, if given; sites without one stay float. Where `projections`
    names the linear layer that reads an attention, products of integers hand on codes to it.

    Raises:
        TargetError: naming the site whose quantizer the target cannot execute.
    """
    spec = model.spec

    def results(ops: Emit, pixels: Value) -> tuple[Value, ...]:
        made = program(ops, pixels)
        return made if isinstance(made, tuple) else (made,)

    return emit_ports(
        results,
        model.params,
        target,
        quantizers,
        inputs=(input_port(spec),),
        outputs=spec.output_names,
        dtypes={end.name: end.dtype for end in spec.outputs_of} if isinstance(spec, GraphSpec) else {},
        projections=projections,
    )


def input_port(spec: Architecture) -> Port:
    """Return the end at which images enter."""
    if not isinstance(spec, GraphSpec):
        return Port(name=spec.input, shape=spec.input_shape)
    end = spec.inputs[0]
    return Port(name=end.name, shape=spec.input_shape, batch=end.shape[0], dtype=end.dtype)


def emit_program(
    program: Callable[[Emit, Value], Value],
    params: Mapping[str, Array],
    target: Target,
    quantizers: Mapping[str, Quantizer] | None = None,
    *,
    shape: tuple[int, int, int],
    output_name: str,
) -> Graph:
    """Like `emit_graph`, for any program over inputs (B, *shape) and the parameters that it reads."""
    return emit_ports(
        lambda ops, pixels: (program(ops, pixels),),
        params,
        target,
        quantizers,
        inputs=(Port(name=INPUT_NAME, shape=shape),),
        outputs=(output_name,),
    )


def emit_ports(
    program: Callable[..., tuple[Value, ...]],
    params: Mapping[str, Array],
    target: Target,
    quantizers: Mapping[str, Quantizer] | None = None,
    *,
    inputs: Sequence[Port],
    outputs: Sequence[str],
    dtypes: Mapping[str, str] | None = None,
    projections: Mapping[str, str] | None = None,
) -> Graph:
    """Like `emit_program`, for a program of several inputs, `program(ops, *values)`, and as many outputs as names.

    Args:
        dtypes: the types of outputs that are not in single precision, by NumPy's names.
        projections: the linear layer that reads each attention, by its site.
    """
    ops = Emit(params, target, quantizers, projections)
    entries = [
        ir.Value(name=port.name, type=ir.TensorType(_kind(port.dtype)), shape=ir.Shape((port.batch, *port.shape)))
        for port in inputs
    ]
    results = program(ops, *(ops.enter(entry, (1, *port.shape)) for entry, port in zip(entries, inputs, strict=True)))
    exits = []
    for name, result in zip(outputs, results, strict=True):
        kind = _kind((dtypes or {}).get(name, "float32"))
        output = ops.leave(result, kind)
        output.name = name
        output.type = ir.TensorType(kind)
        output.shape = ir.Shape((inputs[0].batch if dtypes else "batch", *result.shape[1:]))
        exits.append(output)
    graph = ir.Graph(
        entries,
        exits,
        nodes=ops.writer.tape.nodes,
        initializers=ops.writer.tape.initializers,
        opset_imports={"": ops.opset, MICROSOFT: 1} if target.contrib else {"": ops.opset},
        name="vitfold",
    )
    onnx = ir.Model(graph, ir_version=_IR_VERSION, producer_name="vitfold")
    RemoveUnusedNodesPass()(onnx)
    kept = graph.initializers.values()
    weight_bytes = sum(value.const_value.nbytes for value in kept if value.const_value is not None)
    return Graph(
        model=onnx,
        costs=tuple(ops.count.costs),
        weight_bytes=weight_bytes,
    )


def _kind(dtype: str) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(dtype))


def write_onnx(graph: Graph, path: Path, *, external_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Write the graph; weights beyond `external_bytes` go to `<name>.data` beside it.

    Such a file is written several times faster than one protobuf message, and has no 2 GiB limit.
    """
    external = f"{path.name}.data" if graph.weight_bytes > external_bytes else None
    ir.save(graph.model, path, external_data=external)


def write_together(graphs: Mapping[str, Graph], folder: Path) -> None:
    """Write every graph as NAME.onnx; weights lie once in `SHARED_WEIGHTS`, whichever graphs read them."""
    offsets: dict[bytes, int] = {}
    with (folder / SHARED_WEIGHTS).open("wb") as file:
        for graph in graphs.values():
            for value in graph.model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _LEAST_SHARED_BYTES:
                    continue
                data = tensor.tobytes()
                key = hashlib.sha256(data).digest()
                if key not in offsets:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    offsets[key] = file.tell()
                    file.write(data)
                value.const_value = ir.ExternalTensor(
                    SHARED_WEIGHTS,
                    offsets[key],
                    len(data),
                    tensor.dtype,
                    shape=tensor.shape if isinstance(tensor.shape, ir.Shape) else ir.Shape(tensor.shape),
                    name=str(value.name),
                    base_dir=folder,
                )
    for name, graph in graphs.items():
        ir.save(graph.model, folder / f"{name}.onnx")
