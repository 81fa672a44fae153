"""The compiler's list of kernels, read.

A line that does not fit it, and a layer type that nobody knows, are kept by name: an audit says what it did not
understand.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_HEAD = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), ")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\], "
    r"Strides: \[(?P<strides>[-\d,]*)\].*?Datatype: (?P<type>\w+)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_END = ("I/O Tensors:", "Engine Metadata:", "Bindings:")
BITS = {
    "Double": 64, "Float": 32, "Half": 16, "BFloat16": 16, "BF16": 16, "FP8": 8, "Int4": 4, "FP4": 4,
    "Int8": 8, "UInt8": 8, "Bool": 8, "Int32": 32, "Int64": 64,
}  # fmt: skip
KNOWN_TYPES = ("kgen", "gemm", "runtime_fusion", "correlation", "shape_call", "signal", "wait", "conv", "memcpy")
_NO_KERNEL = ("signal", "wait", "shape_call")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorUse:
    """A tensor that a kernel reads or writes."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    type: str

    @property
    def elements(self) -> int:
        """Distinct numbers: an axis of stride 0 repeats one."""
        if len(self.strides) != len(self.shape):
            return math.prod(self.shape)
        return math.prod(length for length, stride in zip(self.shape, self.strides, strict=True) if stride != 0)

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return math.ceil(self.elements * BITS.get(self.type, 32) / 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One line of the list. `nodes` are the names of the ONNX nodes that went into it."""

    name: str
    type: str
    inputs: tuple[TensorUse, ...]
    constants: tuple[TensorUse, ...]
    outputs: tuple[TensorUse, ...]
    nodes: tuple[str, ...]

    @property
    def is_kernel(self) -> bool:
        """False for synchronization between streams and shape arithmetic on the host."""
        return self.type not in _NO_KERNEL


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerList:
    """All layers in execution order, and what could not be read."""

    layers: tuple[Layer, ...]
    unknown_types: tuple[str, ...] = ()
    unread: tuple[str, ...] = field(default=())

    @property
    def kernels(self) -> tuple[Layer, ...]:
        """Layers that run on the GPU."""
        return tuple(layer for layer in self.layers if layer.is_kernel)


def parse_layers(text: str) -> LayerList:
    """Read the message that starts with "Layers:"; a text that ends early gives the layers up to there."""
    layers, unknown, unread = [], [], []
    for line in text.removeprefix("Layers:").splitlines():
        if line.startswith(_END):
            break
        if not line.strip():
            continue
        layer = _parse(line)
        if layer is None:
            unread.append(line[:120])
            continue
        layers.append(layer)
        if layer.type not in KNOWN_TYPES and layer.type not in unknown:
            unknown.append(layer.type)
    return LayerList(layers=tuple(layers), unknown_types=tuple(unknown), unread=tuple(unread))


def _parse(line: str) -> Layer | None:
    head = _HEAD.match(line)
    if head is None:
        return None
    name, kind = head["name"], head["type"]
    if kind in _NO_KERNEL:
        return Layer(name=name, type=kind, inputs=(), constants=(), outputs=(), nodes=())
    body, closed, tail = line[head.end() :].partition(", TacticName:")
    before, _, outputs = body.partition("Outputs: [")
    inputs, _, constants = before.partition("Constants: [")
    if not closed or not outputs:
        return None
    return Layer(
        name=name,
        type=kind,
        inputs=_tensors(inputs),
        constants=_tensors(constants),
        outputs=_tensors(outputs),
        nodes=tuple(_NODE.findall(tail)),
    )


def _tensors(text: str) -> tuple[TensorUse, ...]:
    return tuple(
        TensorUse(
            name=found["name"], shape=_numbers(found["shape"]), strides=_numbers(found["strides"]), type=found["type"]
        )
        for found in _TENSOR.finditer(text)
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
