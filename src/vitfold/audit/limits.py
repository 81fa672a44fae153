"""What NVIDIA's compiler cannot do, as far as it is known before any build.

Source: the fusion rules of TensorRT's INT8 attention (NVIDIA/TensorRT issues 2981, 3714, 4167).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

INT8_ATTENTION_TOKENS = 512
INT8_ATTENTION_WIDTHS = (32, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing worth knowing: which kind, where (sites), why, and the cure."""

    kind: str
    where: tuple[str, ...]
    cause: str
    cure: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "where": list(self.where)}


def check_attention(head_widths: Sequence[int], tokens: Sequence[int]) -> Finding | None:
    """Say before any build that attention in INT8 cannot be one kernel: in which blocks (none: in all), and why.

    Args:
        head_widths: how wide the heads of each block are.
        tokens: how many enter each block.
    """
    odd = [block for block, width in enumerate(head_widths) if width not in INT8_ATTENTION_WIDTHS]
    if odd:
        widths = ", ".join(map(str, sorted({head_widths[block] for block in odd})))
        return Finding(
            kind="attention cannot fuse",
            where=() if len(odd) == len(head_widths) else tuple(f"blocks.{block}.attn" for block in odd),
            cause=f"heads of width {widths}; TensorRT fuses INT8 attention of width 32 and 64 only",
            cure="keep attention in FP16 (quant.attention = false), or use --target tensorrt-fp8: it fuses every width",
        )
    long = [block for block, count in enumerate(tokens) if count > INT8_ATTENTION_TOKENS]
    if not long:
        return None
    return Finding(
        kind="attention cannot fuse",
        where=tuple(f"blocks.{block}.attn" for block in long),
        cause=f"{max(tokens)} tokens; TensorRT fuses INT8 attention of at most {INT8_ATTENTION_TOKENS}",
        cure="merge tokens early (a schedule that comes under 512), keep these blocks' attention in FP16, or use FP8",
    )
