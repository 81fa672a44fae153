"""The kernels of one transformer block as the targets write it, for any number of tokens, without a build.

It prices schedules that have not been emitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitfold.audit.kernels import Kernel, Kind, Precision, Product
from vitfold.audit.limits import check_attention

_HALF = 2
_LONG = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockShape:
    """Widths of a block: tokens D, heads H of width K, MLP hidden and what enters fc2 (they differ for SwiGLU)."""

    width: int
    heads: int
    head_width: int
    hidden: int
    inner: int


def block_kernels(
    shape: BlockShape, precision: Literal["fp16", "int8", "fp8"], *, batch: int, tokens: int, merged: int, sizes: bool
) -> tuple[Kernel, ...]:
    """Return the kernels of a block that `tokens` enter and `tokens - merged` leave.

    `sizes` says that tokens were merged before: then attention reads log sizes. Attention that cannot fuse in INT8
    stays FP16; its codes for the projection are then turned by a copy.
    """
    rows, left = batch * tokens, batch * (tokens - merged)
    code = _HALF if precision == "fp16" else 1
    attention = shape.heads * shape.head_width
    quantized = precision != "fp16"
    stream = _HALF * shape.width
    normed = (code + (_HALF if quantized else 0)) * shape.width

    def gemm(site: str, rows: int, inputs: int, outputs: int, residual: int = 0) -> Kernel:
        moved = rows * (code * inputs + _HALF * outputs + residual)
        product = Product(matrices=1, rows=rows, columns=outputs, depth=inputs)
        return _kernel(site, "gemm", moved, product, code * inputs * outputs, precision)

    def norm(site: str, rows: int) -> Kernel:
        """LayerNorm; in 8 bits it also adds the residual, which FP16 products do themselves."""
        return _kernel(site, "fused", rows * ((2 if quantized else 1) * stream + normed))

    residual = 0 if quantized else stream
    metric = shape.head_width * _HALF if merged else 0
    kernels = [gemm("attn.qkv", rows, shape.width, 3 * attention)]
    kernels += _attention(shape, precision, rows=rows, tokens=tokens, sizes=sizes, metric=metric)
    kernels.append(gemm("attn.proj", rows, attention, shape.width, residual))
    if merged:
        kernels += _merge(shape, batch, tokens, merged, quantized=quantized, code=code)
    else:
        kernels.append(norm("norm2", rows))
    kernels.append(gemm("mlp.fc1", left, shape.width, shape.hidden))
    if quantized or shape.hidden != shape.inner:
        kernels.append(_kernel("mlp.act", "fused", left * (_HALF * shape.hidden + code * shape.inner)))
    kernels += [gemm("mlp.fc2", left, shape.inner, shape.width, residual), norm("norm1", left)]
    return tuple(kernels)


def schedule_kernels(
    shape: BlockShape,
    precision: Literal["fp16", "int8", "fp8"],
    *,
    batch: int,
    tokens: int,
    r: Sequence[int],
) -> tuple[Kernel, ...]:
    """Return the kernels of all blocks of a schedule that `tokens` enter."""
    found: list[Kernel] = []
    sizes = False
    for merged in r:
        found += block_kernels(shape, precision, batch=batch, tokens=tokens, merged=merged, sizes=sizes)
        tokens, sizes = tokens - merged, sizes or merged > 0
    return tuple(found)


def _attention(
    shape: BlockShape, precision: Literal["fp16", "int8", "fp8"], *, rows: int, tokens: int, sizes: bool, metric: int
) -> list[Kernel]:
    """Splitting q, k and v, which makes the metric too; attention; a copy where it is FP16 between INT8 products."""
    width = shape.heads * shape.head_width
    codes = _HALF if precision == "fp16" else 1
    turned = precision == "int8" and check_attention((shape.head_width,), (tokens,)) is not None
    operands = _HALF if turned else codes
    matrices = rows // tokens * shape.heads
    kernels = [
        _kernel("attn.split", "fused", rows * (3 * width * (_HALF + operands) + metric)),
        _kernel(
            "attn",
            "attention",
            rows * (width * (3 * operands + codes) + (_HALF if sizes else 0)),
            Product(matrices=matrices, rows=tokens, columns=tokens, depth=shape.head_width, attends=True),
            precision="fp16" if turned else precision,
        ),
    ]
    if turned:
        kernels.append(_kernel("attn.turn", "copy", 2 * rows * width * codes))
    return kernels


def _merge(shape: BlockShape, batch: int, tokens: int, merged: int, *, quantized: bool, code: int) -> list[Kernel]:
    """Norms, scores, best partner, ranking, picking and summing; the last joins the LayerNorm."""
    a = b = tokens // 2
    left, joined, stream = tokens - merged, (shape.width + 1) * _HALF, _HALF * shape.width
    metric = shape.head_width * _HALF
    summed = 2 * left * joined
    return [
        _kernel("merge.norms", "fused", batch * (tokens * metric + (a + b) * (metric + _HALF))),
        _kernel(
            "merge.scores",
            "product",
            batch * ((a + b) * (metric + _HALF) + a * b * _HALF),
            Product(matrices=batch, rows=a, columns=b, depth=shape.head_width),
            precision="fp16",
        ),
        _kernel("merge.best", "sort", batch * (a * b * _HALF + a * (_HALF + _LONG))),
        _kernel("merge.rank", "sort", batch * a * (2 * _HALF + _LONG)),
        _kernel("merge.pick", "fused", batch * (tokens * stream * (2 if quantized else 1) + summed + 2 * a * _LONG)),
        _kernel("norm2", "fused", batch * (summed + left * (stream + code * shape.width + 2 * _HALF))),
    ]


def _kernel(
    site: str,
    kind: Kind,
    moved: int,
    product: Product | None = None,
    weight_bytes: int = 0,
    precision: Precision | None = None,
) -> Kernel:
    return Kernel(
        name=site,
        kind=kind,
        precision=precision,
        product=product,
        bytes_moved=moved,
        weight_bytes=weight_bytes,
        nodes=(),
        sites=(site,),
        block=None,
        shapes=(),
    )
