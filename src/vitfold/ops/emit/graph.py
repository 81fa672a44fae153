"""A whole ONNX graph from a program, and its file: inputs, outputs, opsets, and where weights are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from vitfold.model import Array, Model
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
    program: Callable[[Emit, Value], Value],
    model: Model,
    target: Target,
    quantizers: Mapping[str, Quantizer] | None = None,
) -> Graph:
    """Run `program` over the emitting operations and return the ONNX graph; the batch stays symbolic.

    The model's weights lie on the grids of `quantizers`, if given; sites without one stay float.

    Raises:
        TargetError: naming the site whose quantizer the target cannot execute.
    """
    spec = model.spec
    shape = (spec.channels, *spec.image_size)
    return emit_program(program, model.params, target, quantizers, shape=shape, output_name=spec.output)


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
) -> Graph:
    """Like `emit_program`, for a program of several inputs, `program(ops, *values)`, and as many outputs as names."""
    ops = Emit(params, target, quantizers)
    entries = [
        ir.Value(name=port.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((port.batch, *port.shape)))
        for port in inputs
    ]
    results = program(ops, *(ops.enter(entry, (1, *port.shape)) for entry, port in zip(entries, inputs, strict=True)))
    exits = []
    for name, result in zip(outputs, results, strict=True):
        output = ops.leave(result)
        output.name = name
        output.type = ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape(("batch", *result.shape[1:]))
        exits.append(output)
    graph = ir.Graph(
        entries,
        exits,
        nodes=ops.writer.tape.nodes,
        initializers=ops.writer.tape.initializers,
        opset_imports={"": target.opset, MICROSOFT: 1} if target.contrib else {"": target.opset},
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


def write_onnx(graph: Graph, path: Path) -> None:
    """Write the graph; weights beyond 256 MiB go to `<name>.data` beside it.

    Such a file is written several times faster than one protobuf message, and has no 2 GiB limit.
    """
    external = f"{path.name}.data" if graph.weight_bytes > EXTERNAL_DATA_BYTES else None
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
