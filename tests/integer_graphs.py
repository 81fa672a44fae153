"""Graphs of the target "integer" for tests: every tensor of a run, by site and operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from oracles import reordered as oracle
from vitfold.model import Array, Model
from vitfold.ops.emit import INPUT_NAME, SITE_KEY
from vitfold.quantizer import Quantizer
from vitfold.target import TARGETS

INTEGER = TARGETS["integer"]


def every_tensor(graph: onnx.ModelProto, images: Array, level: str) -> dict[str, Array]:
    exposed = onnx.ModelProto()
    exposed.CopyFrom(graph)
    known = {output.name for output in graph.graph.output}
    inferred = onnx.shape_inference.infer_shapes(graph).graph.value_info
    exposed.graph.output.extend(value for value in inferred if value.name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {INPUT_NAME: images}), strict=True))


class Emitted:
    """One run of a graph: its tensors by site and operator."""

    def __init__(self, graph: onnx.ModelProto, tensors: dict[str, Array]) -> None:
        self._graph = graph.graph
        self._tensors = tensors
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}

    def node(self, site: str, op_type: str) -> onnx.NodeProto:
        (found,) = [
            node
            for node in self._graph.node
            if node.op_type == op_type and any(e.key == SITE_KEY and e.value == site for e in node.metadata_props)
        ]
        return found

    def value(self, name: str) -> Array:
        return self._constants[name] if name in self._constants else self._tensors[name]

    def output(self, site: str, op_type: str) -> Array:
        return self.value(self.node(site, op_type).output[0])

    def quantized(self, site: str, low: int = 0, high: int = 255) -> tuple[Array, float, int]:
        """Check the codes of one QuantizeLinear against the oracle; return codes, scale and zero point."""
        x, scale, zero_point = (self.value(name) for name in self.node(site, "QuantizeLinear").input)
        found = self.output(site, "QuantizeLinear")
        np.testing.assert_array_equal(found, oracle.codes(x, float(scale), int(zero_point), low, high))
        return found, float(scale), int(zero_point)

    def linear(self, layer: str, model: Model, quantizers: dict[str, Quantizer], codes: Array) -> None:
        """Check accumulators and the floats behind them."""
        x, w = quantizers[f"{layer}.x"], quantizers[f"{layer}.w"]
        weight = w.codes(model.params[f"{layer}.weight"]).T
        expected = oracle.product(codes, weight, int(x.zero_point) - x.low, w.zero_point)
        found = self.output(layer, "MatMulInteger")
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
        floats = oracle.scaled(expected, w.scale * x.scale) + model.params[f"{layer}.bias"]
        np.testing.assert_array_equal(self.output(f"{layer}.bias", "Add"), floats)
