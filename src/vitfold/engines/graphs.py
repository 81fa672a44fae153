"""The outside of an ONNX file, read before a runtime is.

What every graph of vitfold has in common: one well-formed graph of plain nodes, weights of the size that their
shapes say, in this file or in one beside it. Runtimes are written for graphs that somebody means well by, and on
others they may end the process.

Source: ONNX, onnx/onnx.proto, and the encoding of protocol buffers.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

from vitfold.errors import BundleError
from vitfold.storage.ordinary import check_ordinary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL = {1: _VARINT, 2: _BYTES, 3: _BYTES, 4: _BYTES, 5: _VARINT, 6: _BYTES, 7: _BYTES, 8: _BYTES, 14: _BYTES}
_GRAPH = dict.fromkeys((1, 2, 5, 10, 11, 12, 13, 14, 16), _BYTES)
_NODE = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 8, 9), _BYTES)
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    16: 16,
    17: 8,
    21: 4,
    22: 4,
}
"""Bits of an element, by TensorProto.DataType."""
_SUBGRAPHS = (6, 11)
_LARGEST_AXIS = 2**40
_MOST_VARINT = 10

Buffer = memoryview


class _MalformedError(ValueError):
    """What is wrong with a file, in words."""


def check_graph(path: Path) -> None:
    """Check that a file is an ONNX graph of the kind that vitfold writes; its weights are not read.

    Raises:
        BundleError: saying what is wrong with it.
    """
    try:
        check_ordinary(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = memoryview(mapped)
            try:
                _check_model(view, path.parent)
            finally:
                view.release()
    except _MalformedError as error:
        raise BundleError(f"{path} is no graph that vitfold wrote: {error}; make the bundle again") from None
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise BundleError(f"{path} cannot be read as a graph ({error}); make the bundle again") from None


def _check_model(model: Buffer, folder: Path) -> None:
    graphs = []
    for number, wire, start, end, _ in _fields(model, 0, len(model)):
        if _MODEL.get(number) != wire:
            raise _MalformedError(f"it is no ONNX model (field {number})")
        if number == 7:
            graphs.append((start, end))
    if len(graphs) != 1:
        raise _MalformedError(f"it holds {len(graphs)} graphs")
    for number, wire, start, end, _ in _fields(model, *graphs[0]):
        if _GRAPH.get(number) != wire:
            raise _MalformedError(f"its graph has an unknown field {number}")
        if number == 1:
            _check_node(model, start, end)
        elif number == 5:
            _check_tensor(model, start, end, folder)


def _check_node(model: Buffer, begin: int, stop: int) -> None:
    operator = domain = ""
    for number, wire, start, end, _ in _fields(model, begin, stop):
        if _NODE.get(number) != wire:
            raise _MalformedError(f"a node has an unknown field {number}")
        if number == 5:
            _check_attribute(model, start, end)
        elif number != 9:
            text = _text(model, start, end)
            operator = text if number == 4 else operator
            domain = text if number == 7 else domain
    if not operator or domain not in _DOMAINS:
        raise _MalformedError(f"a node has the operator {operator[:40]!r} of {domain[:40]!r}")


def _check_attribute(model: Buffer, begin: int, stop: int) -> None:
    for number, wire, start, end, _ in _fields(model, begin, stop):
        if number in _SUBGRAPHS:
            raise _MalformedError("a node holds a graph of its own")
        if number == 1 and wire == _BYTES:
            _text(model, start, end)
        elif number == 5 and wire == _BYTES:
            _check_tensor(model, start, end, None)


def _check_tensor(model: Buffer, begin: int, stop: int, folder: Path | None) -> None:
    """Check that a tensor has as many bytes as its shape and type say, here or in a file beside the graph."""
    dims: list[int] = []
    kind = typed = 0
    raw: int | None = None
    outside: dict[str, str] = {}
    name = "?"
    for number, wire, start, end, value in _fields(model, begin, stop):
        if number == 1:
            dims += [value] if wire == _VARINT else list(_packed(model, start, end))
        elif number == 2 and wire == _VARINT:
            kind = value
        elif number == 8 and wire == _BYTES:
            name = _text(model, start, end)
        elif number == 9 and wire == _BYTES:
            raw = end - start
        elif number == 13 and wire == _BYTES:
            outside |= dict([_pair(model, start, end)])
        elif number in (4, 5, 6, 7, 10, 11):
            typed += 1
    if kind not in _BITS or any(size > _LARGEST_AXIS for size in dims):
        raise _MalformedError(f"the tensor {name[:60]} has a type or a shape that no weight has")
    needed = (math.prod(dims) * _BITS[kind] + 7) // 8
    if outside:
        _check_outside(outside, needed, folder, name)
    elif raw != needed and (raw is not None or (not typed and needed)):
        raise _MalformedError(f"the tensor {name[:60]} takes {needed} bytes and has {raw or 0}")


def _check_outside(outside: dict[str, str], needed: int, folder: Path | None, name: str) -> None:
    location = outside.get("location", "")
    if folder is None or not location or Path(location).name != location or "\\" in location:
        raise _MalformedError(f"the tensor {name[:60]} lies in {location[:60]!r}, which is no file of the bundle")
    numbers = [outside.get(key, "0") for key in ("offset", "length")]
    if not all(text.isdecimal() and len(text) < 16 for text in numbers):
        raise _MalformedError(f"the tensor {name[:60]} does not say where it lies in {location[:60]}")
    offset, length = map(int, numbers)
    path = folder / location
    if not path.is_file() or length not in (0, needed) or offset + needed > path.stat().st_size:
        raise _MalformedError(f"the tensor {name[:60]} lies beyond the end of {location[:60]}")


def _pair(model: Buffer, begin: int, stop: int) -> tuple[str, str]:
    found = {number: _text(model, start, end) for number, _, start, end, _ in _fields(model, begin, stop)}
    return found.get(1, ""), found.get(2, "")


def _packed(model: Buffer, at: int, stop: int) -> Iterator[int]:
    while at < stop:
        value, at = _varint(model, at, stop)
        yield value


def _text(model: Buffer, start: int, end: int) -> str:
    try:
        return str(model[start:end], "utf-8")
    except UnicodeDecodeError:
        raise _MalformedError("a name is no text") from None


def _fields(model: Buffer, at: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield number, wire type, where the value begins and ends, and the value of a varint."""
    while at < stop:
        tag, at = _varint(model, at, stop)
        number, wire, value = tag >> 3, tag & 7, 0
        start = at
        if wire == _VARINT:
            value, at = _varint(model, at, stop)
        elif wire == _BYTES:
            length, start = _varint(model, at, stop)
            at = start + length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise _MalformedError(f"it is no protocol buffer (wire type {wire})")
        if at > stop or number == 0:
            raise _MalformedError("it is cut short or no protocol buffer")
        yield number, wire, start, at, value


def _varint(model: Buffer, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for place in range(_MOST_VARINT):
        if at >= stop:
            break
        byte = model[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise _MalformedError("it is cut short or no protocol buffer")
