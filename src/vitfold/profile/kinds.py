"""Which kind of operation a node is, and which part of the model it belongs to: one table."""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = (
    "linear",
    "attention",
    "softmax",
    "normalization",
    "activation",
    "quantize",
    "layout",
    "merging",
    "other",
)
OTHER = "other"
HEADS = "head"
"""The part behind the last block; the one in front of the first is `embed`."""

_LAYERS = r"(?:qkv|proj|fc1|fc2|patch_embed|head|head_dist|pool\.q|pool\.kv)"

# The first rule whose site and operator both match decides. Sites are vitfold's names of nodes, operators the engine's;
# fused nodes keep the name of one of their parts, and operators say what the name cannot.
_RULES: tuple[tuple[str, str, str], ...] = (
    # A merge's own nodes; the metric (mean of keys) and the logarithm of sizes that its attention adds.
    (r"\.merge\b|pool\.unmerge|\.attn\.(reducemean|log|bias)$", r"", "merging"),
    (r"", r"[Qq]uantizeLinear$|FakeQuantize", "quantize"),
    # OpenVINO fuses both products and the softmax into one `Subgraph` named after the transpose behind; q's scale too.
    (r"\.attn\.(transpose|mul)$", r"^Subgraph$", "attention"),
    (r"", r"^(Transpose|Reshape|Split|VariadicSplit|Slice|Concat|Pad|Gather\w*|Cast|Convert|Reorder\w*)$", "layout"),
    (r"\.attn\.[qkv]$|\.(x|w|y|scale)$", r"", "quantize"),
    (r"\.softmax(\.sum)?$", r"", "softmax"),
    (r"", r"^Softmax$", "softmax"),
    (r"(^|\.)(norm\d?|[qk]_norm|pre_norm|pool_norm)$", r"", "normalization"),
    (r"", r"LayerNormalization$|^MVN$", "normalization"),
    (r"\.act$", r"", "activation"),
    (r"", r"Gelu$|^(Relu|Sigmoid|Swish)$", "activation"),
    (r"\.attn\.(qk|av)(\.sum)?$", r"", "attention"),
    (r"", r"Attention$", "attention"),
    (rf"(^|\.){_LAYERS}(\.bias\w*|\.sum|/WithoutBiases)?$", r"", "linear"),
    (r"", r"^(Gemm|Conv|Convolution|FullyConnected|MatMulIntegerToFloat)$", "linear"),
)
_COMPILED = tuple((re.compile(site), re.compile(op), kind) for site, op, kind in _RULES)
_SITE = re.compile(
    r"(?:blocks\.\d+(?:\.[A-Za-z]\w*)+|(?:embed|pool|patch_embed|pre_norm|norm|pool_norm|head\w*)(?:\.\w+)*)"
)
_BLOCK = re.compile(r"blocks\.(\d+)")
_REPEAT = re.compile(r"\.\d+$")


def site_of(name: str) -> str | None:
    """Return the site within an engine's name of a node, without the number of its repetition, or None."""
    found = _SITE.search(name)
    return None if found is None else _REPEAT.sub("", found.group())


def kind_of(name: str, op: str) -> str:
    """Return the kind of a node; "other" for what the table does not know, residual additions among it."""
    site = site_of(name) or ""
    for pattern, operator, kind in _COMPILED:
        if pattern.search(site) and operator.search(op):
            return kind
    return OTHER


def part_of(site: str) -> str:
    """Return the block of a site as "blocks.3", or "embed" or "head" for what stands around the blocks."""
    found = _BLOCK.match(site)
    if found is not None:
        return found.group()
    return "embed" if site.startswith(("embed", "patch_embed", "pre_norm")) else HEADS


def place_of(part: str) -> tuple[int, int]:
    """Return where a part stands in the model: engines do not run all nodes in its order."""
    found = _BLOCK.match(part)
    return (1, int(found[1])) if found is not None else (0 if part == "embed" else 2, 0)


def parts_of(names: Sequence[str]) -> list[str]:
    """Return the part of each node, in order of execution; a node without a site belongs where the next one does."""
    parts: list[str | None] = [None if site is None else part_of(site) for site in map(site_of, names)]
    following = HEADS
    for place in range(len(parts) - 1, -1, -1):
        found = parts[place]
        following = following if found is None else found
        parts[place] = following
    return [part for part in parts if part is not None]
