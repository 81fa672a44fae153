"""The kernels of one block as a picture: what runs in which order, in which type, and how many bytes each moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_COLOURS = {
    "gemm": "#3b6fb6", "attention": "#7a4fb0", "fused": "#3f8f5f", "sort": "#b08a2e", "product": "#5a8fd0",
    "copy": "#b8433c", "edge": "#808890", "convolution": "#3b6fb6", "other": "#808890",
}  # fmt: skip
_ROW, _LEFT, _BAR, _WIDTH = 30, 130, 300, 860
_STYLE = (
    "<style>text{font:13px sans-serif;fill:#24292f}.b{fill:#fff}.p{fill:#f6f8fa}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.p{fill:#161b22}}</style>"
)


def block_picture(audits: Sequence[Mapping[str, Any]]) -> str:
    """Draw the middle block of every audit, one below the other, bars to one scale."""
    most = max(kernel["bytes_moved"] for audit in audits for kernel in audit["middle_block"])
    parts, y = [], 8
    for audit in audits:
        parts.append(_heading(audit, y))
        y += 34
        for kernel in audit["middle_block"]:
            parts.append(_row(kernel, y, most))
            y += _ROW
        y += 18
    size = f'width="{_WIDTH}" height="{y}" viewBox="0 0 {_WIDTH} {y}"'
    back = f'<rect class="p" width="{_WIDTH}" height="{y}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{_STYLE}{back}{"".join(parts)}</svg>\n'


def _heading(audit: Mapping[str, Any], y: int) -> str:
    kernels = audit["middle_block"]
    moved = sum(kernel["bytes_moved"] for kernel in kernels) / 1e6
    text = f"{audit['name']}: {len(kernels)} kernels a block, {moved:.1f} MB ({audit['gpu']}, batch {audit['batch']})"
    return f'<text x="12" y="{y + 20}" font-weight="bold">{escape(text)}</text>'


def _row(kernel: Mapping[str, Any], y: int, most: int) -> str:
    width = max(3, round(_BAR * kernel["bytes_moved"] / most))
    kind = kernel["kind"] + (f" {kernel['precision']}" if kernel["precision"] else "")
    sites = ", ".join(dict.fromkeys(site.partition(".")[2].partition(".")[2] or site for site in kernel["sites"]))
    label = f"{kernel['bytes_moved'] / 1e6:.1f} MB  {sites}"
    return (
        f'<text x="12" y="{y + 19}">{escape(kind)}</text>'
        f'<rect x="{_LEFT}" y="{y + 4}" width="{width}" height="{_ROW - 10}" rx="3" fill="{_COLOURS[kernel["kind"]]}"/>'
        f'<text x="{_LEFT + width + 8}" y="{y + 19}">{escape(label[:90])}</text>'
    )
