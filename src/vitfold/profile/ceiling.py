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

# Some milliseconds in all: longer ones would meet other programs on a shared machine. One product alone takes a third
# of a millisecond where there is AMX, and starting a run is half of that.
CHANNELS, ROWS, INNER, COLUMNS = 3, 192, 768, 1536
LAYERS = 8
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
    """Hand out eight layers of 192 x 768 x 1536 in float and eight in integers, and a copy of 32 MiB, to run in turn.

    Integer layers take their inputs as floats, as those of a bundle do; products are written as `target` writes them,
    so that both sides of the comparison run the same kernels.

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
    macs = LAYERS * ROWS * INNER * COLUMNS
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
    """Write linear layers (ROWS, INNER) -> (ROWS, COLUMNS) and back, in turns, as an ONNX graph."""
    try:
        from vitfold.ops.emit import emit_program, write_onnx
    except ModuleNotFoundError:
        raise EngineError(
            missing_extra("onnx-ir", "optimize", "the machine's ceiling (or leave it out: --no-ceiling)")
        ) from None
    draw = np.random.default_rng(0)
    params: dict[str, Array] = {}
    quantizers: dict[str, Quantizer] = {}
    for place in range(LAYERS):
        outputs, inputs = (INNER, COLUMNS) if place % 2 else (COLUMNS, INNER)
        # As large behind a layer as in front of it.
        weight = (draw.uniform(-1, 1, (outputs, inputs)) * (3 / inputs) ** 0.5).astype(np.float32)
        if integer:
            weights, quantizers[f"{_LAYER}{place}.x"] = _grids(target, weight)
            quantizers[f"{_LAYER}{place}.w"], weight = weights, weights(weight)
        params |= {f"{_LAYER}{place}.weight": weight, f"{_LAYER}{place}.bias": np.zeros(outputs, np.float32)}

    def program(ops: Any, image: Any) -> Any:
        rows = ops.reshape(image, (ROWS, INNER))
        for place in range(LAYERS):
            rows = ops.linear(f"{_LAYER}{place}", rows)
        return rows

    shape = (CHANNELS, ROWS // CHANNELS, INNER)
    write_onnx(emit_program(program, params, target, quantizers or None, shape=shape, output_name="product"), path)
    return path


def _grids(target: Target, weight: Array) -> tuple[Uniform, Uniform]:
    """The quantizers of a layer's weights and of its inputs."""
    high, outputs = 2 ** (target.weight_bits - 1) - 1, len(weight)
    scale = np.full(outputs, np.abs(weight).max() / high, np.float32)
    weights = Uniform(scale=scale, zero_point=np.zeros(outputs, np.int32), low=-high - 1, high=high, axis=0)
    return weights, Uniform(scale=np.array(3 / 127), zero_point=np.array(0), low=-128, high=127)


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
