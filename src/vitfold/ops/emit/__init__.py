"""The interpreter that writes an ONNX graph for one target. Never imports torch."""

from vitfold.ops.emit.graph import (
    INPUT_NAME,
    SHARED_WEIGHTS,
    Graph,
    emit_graph,
    emit_ports,
    emit_program,
    write_onnx,
    write_together,
)
from vitfold.ops.emit.lowering import Emit
from vitfold.ops.emit.writer import MICROSOFT, SITE_KEY, Value

__all__ = [
    "INPUT_NAME",
    "MICROSOFT",
    "SHARED_WEIGHTS",
    "SITE_KEY",
    "Emit",
    "Graph",
    "Value",
    "emit_graph",
    "emit_ports",
    "emit_program",
    "write_onnx",
    "write_together",
]
