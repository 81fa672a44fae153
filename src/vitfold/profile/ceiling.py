"""What this machine reaches at best: products in float and in integers, and copies."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.engines import ENGINES, Session, open_graph, quantized_target, usable_cores
from vitfold.engines.session import Call
from vitfold.errors import EngineError, missing_extra
from vitfold.model import Array
from vitfold.quantizer import Quantizer, Uniform
from vitfold.target import Target, find_target

# About a millisecond each, like the model's own nodes: longer ones would meet other programs on a shared machine.
CHANNELS, ROWS, INNER, COLUMNS = 3, 192, 768, 1536
COPY_BYTES = 32 << 20
_LAYER = "probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Multiply-accumulates and bytes per nanosecond (G per second) of this machine in this engine."""

    float_gmacs: float
    integer_gmacs: float
    copy_gbytes: float

    def __post_init__(self) -> None:
        if min(self.float_gmacs, self.integer_gmacs, self.copy_gbytes) <= 0:
            raise ValueError("a ceiling is positive")

    def least_ns(self, *, float_macs: int | float, integer_macs: int | float, read_bytes: int | float) -> float:
        """Return the least time of some work, if products and reading weights from memory overlap perfectly.

        Equation: max(macs_float / float_rate + macs_integer / integer_rate, weight_bytes / copy_rate).

        Source: the roofline model (Williams et al., 2009).
        """
        products = float_macs / self.float_gmacs + integer_macs / self.integer_gmacs
        return max(products, read_bytes / self.copy_gbytes)

    def to_dict(self) -> dict[str, float]:
        """Return plain JSON values."""
        return {
            "float_gmacs_per_s": self.float_gmacs,
            "integer_gmacs_per_s": self.integer_gmacs,
            "copy_gbytes_per_s": self.copy_gbytes,
        }


@contextlib.contextmanager
def probes(engine: str, *, target: str, threads: int | None = None) -> Iterator[dict[str, Call]]:
    """Hand out a product of 192 x 768 x 1536 in float and one in integers, and a copy of 32 MiB, to run in turn.

    The integer product takes the input as float, as every layer of a bundle does; products are written as `target`
    writes them, so that both sides of the comparison run the same kernels.

    Raises:
        EngineError: if the extra that writes graphs is missing, or the engine refuses one.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vitfold-")))
        x = np.random.default_rng(0).uniform(-1, 1, (1, CHANNELS, ROWS // CHANNELS, INNER)).astype(np.float32)
        calls: dict[str, Call] = {}
        for name, integer in (("float", False), ("integer", True)):
            path = _write(folder / f"{name}.onnx", _probe_target(engine, target, integer=integer), integer=integer)
            session: Session = stack.enter_context(open_graph(path, engine, threads=threads))
            session(x)
            calls[name] = session.run
        calls["copy"] = stack.enter_context(_copier(threads or usable_cores()))
        yield calls


def ceiling_of(samples_ns: Mapping[str, tuple[int, ...]]) -> Ceiling:
    """Return what the probes reached in their best runs."""
    best = {name: min(samples) for name, samples in samples_ns.items()}
    macs = ROWS * INNER * COLUMNS
    return Ceiling(
        float_gmacs=macs / best["float"],
        integer_gmacs=macs / best["integer"],
        copy_gbytes=2 * COPY_BYTES / best["copy"],
    )


def _probe_target(engine: str, name: str, *, integer: bool) -> Target:
    """The target whose form of a product is compared with: the bundle's own, or its engine's in the other type."""
    if not integer:
        return find_target(ENGINES[engine].float_target)
    own = find_target(name)
    if own.name.startswith("cpu-") and own.engine == engine:
        return own
    return quantized_target(engine)


def _write(path: Path, target: Target, *, integer: bool) -> Path:
    """Write one linear layer (ROWS, INNER) -> (ROWS, COLUMNS) as an ONNX graph."""
    try:
        from vitfold.ops.emit import emit_program, write_onnx
    except ModuleNotFoundError:
        raise EngineError(
            missing_extra("onnx-ir", "optimize", "the machine's ceiling (or leave it out: --no-ceiling)")
        ) from None
    draw = np.random.default_rng(0)
    high = 2 ** (target.weight_bits - 1) - 1
    weight = draw.uniform(-1, 1, (COLUMNS, INNER)).astype(np.float32)
    quantizers: Mapping[str, Quantizer] | None = None
    if integer:
        low, scale = -high - 1, np.full(COLUMNS, 1 / high, np.float32)
        weights = Uniform(scale=scale, zero_point=np.zeros(COLUMNS, np.int32), low=low, high=high, axis=0)
        inputs = Uniform(scale=np.array(1 / 127), zero_point=np.array(0), low=-128, high=127)
        weight = weights(weight)
        quantizers = {f"{_LAYER}.w": weights, f"{_LAYER}.x": inputs}
    params = {f"{_LAYER}.weight": weight, f"{_LAYER}.bias": np.zeros(COLUMNS, np.float32)}

    def program(ops: Any, image: Any) -> Any:
        return ops.linear(_LAYER, ops.reshape(image, (ROWS, INNER)))

    shape = (CHANNELS, ROWS // CHANNELS, INNER)
    write_onnx(emit_program(program, params, target, quantizers, shape=shape, output_name="product"), path)
    return path


@contextlib.contextmanager
def _copier(threads: int) -> Iterator[Callable[[], None]]:
    """Hand out a function that copies COPY_BYTES with all threads."""
    source = np.ones(COPY_BYTES // 8)
    copy = np.empty_like(source)
    pairs: list[tuple[Array, Array]] = list(
        zip(np.array_split(copy, threads), np.array_split(source, threads), strict=True)
    )
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            for _ in pool.map(lambda pair: np.copyto(*pair), pairs):
                pass

        yield copy_all
