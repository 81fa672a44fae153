"""Whether integer products are exact here: a property of engine, processor and form, measured once per machine.

x86 processors without VNNI or AMX add pairs of u8 x s8 products in saturating 16 bits, so graphs with 8-bit weights
give wrong numbers there, silently. Tables of processors go out of date; a product of extreme codes shows it within
milliseconds. `probes/` holds one tiny graph per form, written by `examples/write_probes.py`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from vitfold.artifacts.bundle import MAIN
from vitfold.artifacts.cache import keep_bytes, key_of, read_bytes
from vitfold.engines.session import Session, open_on
from vitfold.errors import EngineError
from vitfold.processor import processor
from vitfold.products import Product, products_of
from vitfold.target import ENGINES, FLOATING, PLAIN, WIDE, Target, cpu_target, find_target

SWITCH = "VITFOLD_SATURATE"
"""Set to 1, this processor counts as one whose 8-bit products saturate: what it would do is done here."""
IMAGE = (3, 8, 8)
INNER = 192
COLUMNS = 16
_ROWS = (1, 5, 33)
_KIND = "exactness"


def right_codes(bits: int) -> Int[np.ndarray, "K O"]:
    """Return the weight of a probe: columns of the largest, of the least, of both in turn, then mixed codes."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    k, o = np.meshgrid(np.arange(INNER), np.arange(COLUMNS), indexing="ij")
    codes: Int[np.ndarray, "K O"] = low + (37 * k + 101 * o + 17 * k * o) % (high - low + 1)
    codes[:, 0], codes[:, 1] = high, low
    codes[:, 2] = np.where(k[:, 2] % 4 < 2, high, low)
    return codes


def left_codes(rows: int) -> Int[np.ndarray, "R K"]:
    """Return the input of a probe, from -128 to 127: a row of the largest, one of the least, then mixed numbers."""
    r, k = np.meshgrid(np.arange(rows), np.arange(INNER), indexing="ij")
    codes: Int[np.ndarray, "R K"] = (29 * k + 83 * r + 7 * k * r) % 256 - 128
    codes[:1], codes[1:2] = 127, -128
    return codes


def probe_path(product: Product) -> Path:
    """Return the graph that computes this form: images (R, 3, 8, 8) -> x w of (R, 16), or x x^T of (R, R)."""
    return Path(__file__).with_name("probes") / f"{product.name}.onnx"


def is_exact(engine: str, product: Product, execution: str = PLAIN) -> bool:
    """Return whether an engine computes a form of product exactly here, executed in one of its ways.

    Raises:
        EngineError: if the engine is not installed.
    """
    engine = ENGINES[engine].exact_floats
    if not _may_saturate(engine):
        return True
    if os.environ.get(SWITCH) == "1" and product.saturates_in_16_bits and not _wide_enough(product, execution):
        return False
    return _measured(engine, product, execution)


def exact_execution(engine: str, products: Iterable[Product]) -> str | None:
    """Return the first way in which an engine computes all these products exactly here, None if there is none."""
    needed = tuple(products)
    for execution in _ways(engine, needed):
        if all(is_exact(engine, product, execution) for product in needed):
            return execution
    return None


def find_execution(engine: str, products: Iterable[Product]) -> str:
    """Return the first way in which an engine computes all these products exactly here.

    Raises:
        EngineError: naming the targets that are exact here, if there is none.
    """
    needed = tuple(products)
    execution = exact_execution(engine, needed)
    if execution is not None:
        return execution
    raise cannot_be_exact(engine, min(needed, key=lambda product: exact_execution(engine, [product]) is not None))


def cannot_be_exact(engine: str, product: Product) -> EngineError:
    """Return the error that names what an engine would compute wrongly here, and the targets that are exact."""
    return EngineError(
        f"{engine} cannot compute {product} exactly on this processor ({processor()['name']}): pairs of products "
        f"saturate in 16 bits, and answers would be wrong; make the bundle again with --target "
        f"{ENGINES[engine].exact_targets}"
    )


def runs_here(target: Target) -> bool:
    """Return whether the engine of a target computes its 8-bit products exactly here, and at their usual speed.

    Raises:
        EngineError: if the engine is not installed.
    """
    products = products_of(target.to_dict(), weight_bits=8, attention=target.quantize_attention)
    return all(is_exact(target.engine, product) for product in products)


def quantized_target(engine: str) -> Target:
    """Return the target of an engine for quantized models on this processor: the first one that is exact here.

    Raises:
        EngineError: if the engine is not installed.
    """
    names = ENGINES[engine].quantized_targets
    if names:
        targets = [find_target(name) for name in names]
    else:
        facts = processor()
        targets = [cpu_target(facts["instruction_sets"], facts["architecture"]), find_target("cpu-avx2")]
    return next((target for target in targets[:-1] if runs_here(target)), targets[-1])


def describe_execution(execution: str, engine: str) -> str | None:
    """Say what an unusual execution means for the user, and the cure; None for the usual one."""
    if execution == PLAIN:
        return None
    how = "as u8 x u8" if execution == WIDE else "in floats"
    return (
        f"8-bit products saturate in {engine} on this processor, so they run {how}: exact, but slower than a bundle "
        f"made with --target {ENGINES[engine].exact_targets}"
    )


def _ways(engine: str, products: tuple[Product, ...]) -> tuple[str, ...]:
    """Return how these products can be executed, the usual way first.

    Q/DQ pairs that are left as floats run about as fast as u8 x u8, and always load: ONNX Runtime's change of weights
    to uint8 fails where two of them share a zero point.
    """
    if not _may_saturate(engine) or not products:
        return (PLAIN,)
    floats = WIDE not in ENGINES[engine].ways or all(product.form == "qdq" for product in products)
    return (PLAIN, FLOATING if floats else WIDE)


def _may_saturate(engine: str) -> bool:
    """Say whether an engine has another way than its usual one; TensorRT adds in 32 bits on every GPU."""
    return len(ENGINES[engine].ways) > 1


def _wide_enough(product: Product, execution: str) -> bool:
    """Say whether an execution replaces the kernels that saturate."""
    return (execution == WIDE and product.constant) or (execution == FLOATING and product.form == "qdq")


@functools.lru_cache(maxsize=256)
def _measured(engine: str, product: Product, execution: str) -> bool:
    path = probe_path(product)
    try:
        opened = open_on(ENGINES[engine], {MAIN: path}, threads=1, execution=execution)
    except EngineError:
        if execution == PLAIN:
            raise
        return False  # this engine has no kernel for the form that this execution makes of the product
    with opened as session:
        key = key_of(
            hashlib.sha256(path.read_bytes()).hexdigest(),
            session.engine,
            execution,
            processor(),
        )
        kept = read_bytes(_KIND, key, ".txt")
        if kept in (b"exact", b"not exact"):
            return kept == b"exact"
        exact = all(_runs_exactly(session, product, rows) for rows in _ROWS)
    keep_bytes(_KIND, key, ".txt", b"exact" if exact else b"not exact")
    return exact


def _runs_exactly(session: Session, product: Product, rows: int) -> bool:
    left = left_codes(rows)
    right = right_codes(product.right_bits) if product.constant else left.T
    found: Float[np.ndarray, "R O"] = session(left.reshape(rows, *IMAGE))
    return np.array_equal(found, (left @ right).astype(np.float32))
