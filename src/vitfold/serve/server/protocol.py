"""Requests and answers of the Open Inference Protocol, version 2, as JSON and with tensors as bytes behind it.

Source: Open Inference Protocol, docs/inference_rest.md and its extension for binary tensor data.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitfold.serve.server.refusing import RefusedError

HEADER_LENGTH = "inference-header-content-length"
IMAGES = "images"
"""The input that takes files of images instead of tensors, as BYTES."""
_TYPES: dict[str, np.dtype[Any]] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP64": np.dtype("<f8"),
}
_MOST_DIMENSIONS = 8


def request_of(body: bytes, header_length: str | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return a request and its tensors by name: an array, or for BYTES a list of bytes.

    Raises:
        RefusedError: if it is none.
    """
    if header_length is None:
        text, rest = body, b""
    elif header_length.isdecimal() and int(header_length) <= len(body):
        text, rest = body[: int(header_length)], body[int(header_length) :]
    else:
        raise RefusedError(400, f"{HEADER_LENGTH} has to be the length of the JSON, found {header_length!r}")
    try:
        request = json.loads(text)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the request is no JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), list):
        raise RefusedError(400, "the request has no list of inputs")
    tensors: dict[str, Any] = {}
    place = 0
    for one in request["inputs"]:
        name, values, place = _tensor(one, rest, place)
        tensors[name] = values
    if place != len(rest):
        raise RefusedError(400, f"{len(rest) - place} bytes behind the JSON belong to no input")
    return request, tensors


def _tensor(one: Any, rest: bytes, place: int) -> tuple[str, Any, int]:
    if not isinstance(one, dict) or not isinstance(one.get("name"), str):
        raise RefusedError(400, "an input has no name")
    name, kind = one["name"], one.get("datatype")
    shape, count = check_shape(name, one.get("shape"))
    parameters = one.get("parameters")
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(rest) - place:
            raise RefusedError(400, f"binary_data_size of {name} is {size}, and {len(rest) - place} bytes follow")
        raw = rest[place : place + size]
        values = strings(name, raw, count) if kind == "BYTES" else numbers(name, kind, raw, shape)
        return name, values, place + size
    data = one.get("data")
    if not isinstance(data, list):
        raise RefusedError(400, f"{name} has no data")
    return name, _encoded(name, data, count) if kind == "BYTES" else plain_numbers(name, kind, data, shape), place


def check_shape(name: str, given: Any) -> tuple[list[int], int]:
    """Return a tensor's shape and the number of its elements.

    Raises:
        RefusedError: if it is no list of a few whole numbers.
    """
    whole = isinstance(given, list) and all(type(n) is int and n >= 0 for n in given)
    if not whole or len(given) > _MOST_DIMENSIONS:
        raise RefusedError(400, f"the shape of {name} is no list of whole numbers")
    return list(given), math.prod(given)


def _dtype(name: str, kind: Any) -> np.dtype[Any]:
    if not isinstance(kind, str) or kind not in _TYPES:
        raise RefusedError(400, f"{name} has the datatype {kind}; known: BYTES, {', '.join(_TYPES)}")
    return _TYPES[kind]


def numbers(name: str, kind: Any, raw: bytes, shape: Sequence[int]) -> np.ndarray:
    """Return the array that bytes are.

    Raises:
        RefusedError: if the type is unknown, or shape and bytes do not fit.
    """
    dtype = _dtype(name, kind)
    if len(raw) != math.prod(shape) * dtype.itemsize:
        raise RefusedError(400, f"{name} of shape {list(shape)} does not have {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape)


def plain_numbers(name: str, kind: Any, data: list[Any], shape: Sequence[int]) -> np.ndarray:
    """Return the array of a list of numbers, or of lists of them.

    Raises:
        RefusedError: if the type is unknown, or shape and numbers do not fit.
    """
    dtype = _dtype(name, kind)
    try:
        found = np.array(data, dtype)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise RefusedError(400, f"the data of {name} are no numbers in rows of one length") from None
    if found.size != math.prod(shape):
        raise RefusedError(400, f"{name} of shape {list(shape)} does not have {found.size} numbers")
    return found.reshape(shape)


def strings(name: str, raw: bytes, count: int) -> list[bytes]:
    """Return what stands behind each length of four bytes.

    Raises:
        RefusedError: if it is not `count` elements.
    """
    found: list[bytes] = []
    place = 0
    while place + 4 <= len(raw) and len(found) < count:
        length = int.from_bytes(raw[place : place + 4], "little")
        found.append(raw[place + 4 : place + 4 + length])
        place += 4 + length
    if place != len(raw) or len(found) != count:
        raise RefusedError(400, f"{name} does not hold {count} elements, each behind its length")
    return found


def _encoded(name: str, data: list[Any], count: int) -> list[bytes]:
    try:
        found = [base64.b64decode(one, validate=True) for one in data]
    except (binascii.Error, ValueError, TypeError):
        raise RefusedError(400, f"the data of {name} are files in base64, a text each") from None
    if len(found) != count:
        raise RefusedError(400, f"{name} has {len(found)} elements, and its shape says {count}")
    return found


def checked_outputs(outputs: Mapping[str, np.ndarray], wanted: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return the outputs of these names, all where there are none, in float32.

    Raises:
        RefusedError: if it asks for an output that there is not.
    """
    for name in wanted:
        if not isinstance(name, str) or name not in outputs:
            raise RefusedError(400, f"no output {name!r}; the model has {', '.join(outputs)}")
    return {name: np.ascontiguousarray(outputs[name], "<f4") for name in wanted or outputs}


def answer_of(request: Mapping[str, Any], model: str, outputs: Mapping[str, np.ndarray]) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if tensors stand behind it as bytes.

    Raises:
        RefusedError: if it asks for an output that there is not.
    """
    parameters = request.get("parameters")
    always = isinstance(parameters, dict) and parameters.get("binary_data_output") is True
    wanted = request.get("outputs") or [{"name": name} for name in outputs]
    if not isinstance(wanted, list):
        raise RefusedError(400, "outputs is no list")
    described, rest = [], []
    for one in wanted:
        name = one.get("name") if isinstance(one, dict) else None
        (values,) = checked_outputs(outputs, [name]).values()
        found: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(values.shape)}
        asked = one.get("parameters")
        if asked.get("binary_data", always) is True if isinstance(asked, dict) else always:
            rest.append(values.tobytes())
            found["parameters"] = {"binary_data_size": values.nbytes}
        else:
            found["data"] = values.reshape(-1).tolist()
        described.append(found)
    answer: dict[str, Any] = {"model_name": model, "outputs": described}
    if isinstance(request.get("id"), str):
        answer["id"] = request["id"]
    text = json.dumps(answer, allow_nan=False).encode()
    return b"".join((text, *rest)), len(text) if rest else None
