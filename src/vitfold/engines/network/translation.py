"""A bundle's graph as a torch module: translated once, node by node, into straight code over tensors.

The module reads nothing but the graph, so that whatever a recipe made of a model runs here as it does in any other
runtime: merging, registers, pieces of foreign graphs, codes. Lengths are static, only values decide which tokens merge,
so `torch.compile(fullgraph=True)` and `torch.export` take it whole.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn

from vitfold.artifacts.bundle import MAIN
from vitfold.engines.graphs import check_graph
from vitfold.engines.network.products import PRODUCTS, attention, check_float8, find_attention
from vitfold.engines.network.rules import RULES, as_real
from vitfold.engines.session import OPEN_AXIS, Ends, only_image
from vitfold.errors import EngineError
from vitfold.model import Array
from vitfold.ops.protocol import Port

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle

_INTEGER_SOURCES = ("MatMulInteger", "QuantizeLinear")
_KEEPS_INTEGERS = ("Add", "Sub", "Mul", "Div", "Sign", "Clip", "ReduceSum", "Reshape", "Transpose")
_KEEPS_WIDTH = ("ArgMax", "Concat", "FusedMatMul", "MatMul", "ReduceMax", "Reshape", "Slice", "TopK", "Transpose")
"""What is in single precision stays so: matching, from unit vectors to ranks, whose ties half precision would draw."""
_INTEGER_TYPES = (onnx.TensorProto.INT32, onnx.TensorProto.INT64)
_REASON = 300
SITE = "site"
"""Where a call keeps the name and the operator of the ONNX node that it is of."""


class Network(nn.Module):
    """The graph of one part of a bundle: `network(pixel_values)` gives its output, or all of them as a tuple.

    Weights are parameters without gradients, codes and tables buffers. `.to(device)` and `.to(dtype)` (`.half()`,
    `.bfloat16()`) move and cast it as any module; inputs are cast to its type, outputs come in it. Scales of codes stay
    in single precision. With 8-bit floats it needs a GPU of compute capability 8.9, or a CPU.
    """

    def __init__(self, body: fx.GraphModule, ends: Ends, exact: tuple[str, ...], *, uses_float8: bool) -> None:
        super().__init__()
        self.body, self.ends = body, ends
        self._exact, self.uses_float8 = exact, uses_float8

    @property
    def dtype(self) -> torch.dtype:
        """The float type in which it computes."""
        return self.body.get_buffer("real").dtype

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Inputs in the graph's order, (batch, ...) each."""
        made: tuple[Tensor, ...] = self.body(*inputs)
        return made[0] if len(made) == 1 else made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        exact = {name: self.body.get_buffer(name) for name in self._exact}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in exact.items():
            setattr(self.body, name, values.to(self.body.get_buffer(name).device))
        if self.uses_float8:
            check_float8(self.body.get_buffer("real").device)
        return self


def torch_module(bundle: Bundle, part: str = MAIN) -> Network:
    """Return the network of a bundle's part as a torch module on the CPU, in the float type of its graph.

    `torch.compile(vitfold.torch_module(bundle).to("cuda", torch.float16), fullgraph=True)` is how it is fastest.

    Raises:
        BundleError: if the file is no graph that vitfold writes.
        EngineError: if the graph cannot be read, or holds an operator that is not translated.
    """
    graphs = bundle.graphs
    if part not in graphs:
        held = ", ".join(graphs) or "no graphs: it is simulated, make it for --target torch"
        raise EngineError(f"{bundle.path} has no part {part!r}; it holds {held}")
    check_graph(graphs[part])
    return read_network(graphs[part])


def read_network(path: Path, *, one_image: bool = False) -> Network:
    """Translate an ONNX graph.

    Raises:
        EngineError: if it cannot be read, holds an operator that is not translated, or, if `one_image`, reads more.
    """
    try:
        model = onnx.load(str(path))
        # An empty or a foreign file can be a message without a graph.
        if not model.graph.output or not model.graph.node:
            raise ValueError("it holds no graph")
        if one_image:
            only_image(path, len(model.graph.input), len(model.graph.output))
        return Translation(model.graph).network()
    except EngineError:
        raise
    except _UntranslatedError as error:
        raise EngineError(f"{path} holds {error}; run it on another engine: --engine onnxruntime") from None
    except Exception as error:  # whatever the reader, or a rule on a graph that is not ours, stumbles over
        said = " ".join(str(error).split())[:_REASON]
        raise EngineError(
            f"torch {torch.__version__} cannot load {path}: {type(error).__name__}: {said}; check the file, or upgrade "
            "with: pip install -U torch"
        ) from None


class _UntranslatedError(ValueError):
    """A node that torch has no rule for, in words."""


class Translation:
    """One graph on its way to torch: what rules may ask, and where they put what they make."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self.constants: dict[str, Array] = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = self.constant_of(node)
        self.uses_float8 = False
        self._uses = Counter(name for node in graph.node for name in node.input)
        self._uses.update(one.name for one in graph.output)
        self._producers = {name: node for node in graph.node for name in node.output}
        self._attributes: dict[int, dict[str, Any]] = {}
        self._root = nn.Module()
        self._body = fx.Graph()
        self._values: dict[str, Any] = {}
        self._held: dict[Any, fx.Node] = {}
        self._exact: list[str] = []
        self._integers: set[str] = set()
        self._wide: set[fx.Node] = set()
        self._translating_wide = False
        self._node: onnx.NodeProto | None = None
        real = next((a.dtype for a in self.constants.values() if a.dtype.kind == "f" and a.ndim > 1), np.float32)
        self._root.register_buffer("real", torch.empty(0, dtype=getattr(torch, np.dtype(real).name)))
        self.real: Any = None

    def network(self) -> Network:
        """Translate every node; what nothing reads any more goes."""
        known = {one.name for one in self._graph.initializer}
        inputs = [one for one in self._graph.input if one.name not in known]
        ports = [_port(one) for one in inputs]
        placeholders = [self._body.placeholder(_identifier(port.name)) for port in ports]
        self.real = self._body.get_attr("real")
        for port, value in zip(ports, placeholders, strict=True):
            is_real = port.dtype.startswith("float")
            self._values[port.name] = self.call(as_real, value, self.real) if is_real else value
        for node in self._graph.node:
            self._node = node
            self._translate(node)
        self._body.output(tuple(self.value(one.name) for one in self._graph.output))
        self._body.eliminate_dead_code()
        read = {node.target for node in self._body.nodes if node.op == "get_attr"} | {"real"}
        for name in [name for name, _ in (*self._root.named_parameters(), *self._root.named_buffers())]:
            if name not in read:
                delattr(self._root, name)
        body = fx.GraphModule(self._root, self._body)
        if not hasattr(body, "real"):
            body.register_buffer("real", self._root.get_buffer("real"))
        ends = Ends(tuple(ports), tuple(_port(one) for one in self._graph.output))
        exact = tuple(name for name in self._exact if name in read)
        return Network(body, ends, exact, uses_float8=self.uses_float8)

    def _translate(self, node: onnx.NodeProto) -> None:
        whole = node.op_type == "Cast" and self.attribute(node, "to", 1) in _INTEGER_TYPES
        kept = node.op_type in _KEEPS_INTEGERS and node.input[0] in self._integers
        if whole or kept or node.op_type in _INTEGER_SOURCES:
            self._integers.update(node.output)
        found = find_attention(self, node)
        if found is not None:
            self._values[node.output[0]] = attention(self, found)
            return
        rule = PRODUCTS.get(node.op_type) or RULES.get(node.op_type)
        if rule is None:
            raise _UntranslatedError(f"the operator {node.op_type} ({node.name[:60]}), which has no rule in torch")
        self._translating_wide = any(self._values.get(name) in self._wide for name in node.input)
        made = rule(self, node)
        outputs = made if isinstance(made, list) else [made]
        if self._translating_wide and node.op_type in _KEEPS_WIDTH:
            self._wide.update(outputs[:1] if node.op_type != "ArgMax" else ())  # indices are whole numbers
        elif self._translating_wide and node.op_type != "Cast":
            outputs = [self.call(as_real, one, self.real) for one in outputs]
        self._translating_wide = False
        self._values.update(zip((name for name in node.output), outputs, strict=False))

    def refuse(self, node: onnx.NodeProto, what: str) -> Any:
        """Say that a node has no rule.

        Raises:
            ValueError: always.
        """
        raise _UntranslatedError(f"the operator {node.op_type} ({node.name[:60]}), which is not translated: {what}")

    def call(self, function: Callable[..., Any], *args: Any, **keywords: Any) -> fx.Node:
        """Append a call."""
        made = self._body.call_function(function, args, keywords)
        if self._node is not None:
            made.meta[SITE] = (self._node.name, self._node.op_type)
        return made

    def items(self, made: fx.Node, count: int) -> list[fx.Node]:
        """The outputs of a call that has several."""
        return [self.call(operator.getitem, made, place) for place in range(count)]

    def widen(self, value: fx.Node) -> None:
        """Remember that a value is in single precision whatever the module's type is."""
        self._wide.add(value)

    def holds_integers(self, name: str) -> bool:
        """Say whether a value is a sum or a number of codes."""
        return name in self._integers

    def value(self, name: str) -> Any:
        """Return what stands for a value: a number for a constant without axes, else a node."""
        if name in self._values:
            return self._values[name]
        array = self.constants[name]
        if array.ndim == 0:
            return array.item()
        real = array.dtype.kind == "f"
        return self.exact(array) if real and self._translating_wide else self.hold(array)

    def input(self, node: onnx.NodeProto, place: int) -> Any:
        """Return what stands for an input."""
        return self.value(node.input[place])

    def inputs(self, node: onnx.NodeProto) -> list[Any]:
        """Return what stands for each input; None for those left out."""
        return [self.value(name) if name else None for name in node.input]

    def array(self, node: onnx.NodeProto, place: int) -> Array:
        """Return the numbers of a constant input.

        Raises:
            ValueError: if it is computed.
        """
        name = node.input[place]
        if name not in self.constants:
            self.refuse(node, f"its input {name[:60]} is computed")
        return self.constants[name]

    def integers(self, node: onnx.NodeProto, place: int) -> list[int]:
        """Return the whole numbers of a constant input."""
        return [int(one) for one in self.array(node, place).reshape(-1)]

    def number(self, node: onnx.NodeProto, place: int) -> float | int | None:
        """Return the number of a constant input, None if it is left out."""
        if len(node.input) <= place or not node.input[place]:
            return None
        found: float | int = self.array(node, place).reshape(()).item()
        return found

    def attribute(self, node: onnx.NodeProto, name: str, default: Any) -> Any:
        """Return an attribute."""
        if id(node) not in self._attributes:
            self._attributes[id(node)] = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
        return self._attributes[id(node)].get(name, default)

    def constant_of(self, node: onnx.NodeProto) -> Array:
        """Return the numbers of a Constant node."""
        for one in node.attribute:
            if one.name == "value":
                found: Array = numpy_helper.to_array(one.t)
                return found
            if one.name in ("value_float", "value_int"):
                return np.array(onnx.helper.get_attribute_value(one), np.float32 if one.name == "value_float" else None)
            if one.name == "value_ints":
                return np.array(one.ints, np.int64)
        raise _UntranslatedError(f"a constant of another kind ({node.name[:60]})")

    def producer(self, name: str, op_type: str, *, alone: bool = False) -> onnx.NodeProto | None:
        """Return the node that makes a value, if it is of this type and, if `alone`, nothing else reads the value."""
        node = self._producers.get(name)
        if node is None or node.op_type != op_type or (alone and self._uses[name] > 1):
            return None
        return node

    def hold(self, values: Array | Tensor) -> fx.Node:
        """Return the node of a parameter, or of a buffer where they are no reals; equal objects are held once."""
        return self._hold(values, exact=False)

    def exact(self, values: Array) -> fx.Node:
        """Return the node of a buffer that stays in single precision."""
        return self._hold(np.asarray(values, np.float32), exact=True)

    def _hold(self, values: Array | Tensor, *, exact: bool) -> fx.Node:
        key = (id(values), exact)
        if isinstance(values, np.ndarray) and values.nbytes < 4096:
            key = (values.dtype.str, values.shape, values.tobytes(), exact)  # type: ignore[assignment]
        if key not in self._held:
            name = f"{'exact' if exact else 'held'}_{len(self._held)}"
            tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))
            if tensor.is_floating_point() and tensor.dtype.itemsize > 1 and not exact:
                self._root.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self._root.register_buffer(name, tensor)
            self._exact += [name] if exact else []
            self._held[key] = self._body.get_attr(name)
            self._kept = (*getattr(self, "_kept", ()), values)  # an id is of one object while that lives
        return self._held[key]


def _port(one: onnx.ValueInfoProto) -> Port:
    kind = one.type.tensor_type
    axes = [axis.dim_value or (axis.dim_param or OPEN_AXIS) for axis in kind.shape.dim] or [OPEN_AXIS]
    batch, *shape = axes
    return Port(
        name=one.name,
        shape=tuple(axis if isinstance(axis, int) else OPEN_AXIS for axis in shape),
        batch="batch" if batch == OPEN_AXIS else batch,
        dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name,
    )


def _identifier(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def networks(graphs: Mapping[str, Path]) -> dict[str, Network]:
    """Translate the graph of every part; the only part of a model of images reads one image."""
    return {name: read_network(path, one_image=len(graphs) == 1 and name == MAIN) for name, path in graphs.items()}
