"""What was recognised in a model that came as a graph, for `vitfold inspect MODEL.onnx`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from vitfold.model import GraphSpec, Model


def load_graph(path: Path) -> Model:
    """Load an ONNX file with what lies beside it."""
    from vitfold.sources import load_source

    return load_source(str(path)).model


def graph_document(model: Model) -> dict[str, Any]:
    """Return plain JSON values."""
    from vitfold.ops.count import SiteCost
    from vitfold.pipeline.plan import count_costs
    from vitfold.quant.sites import find_sites
    from vitfold.recipe import MergeRecipe

    spec = model.spec
    assert isinstance(spec, GraphSpec)
    costs = count_costs(spec, MergeRecipe(r=()), every_row=True)
    linears, attentions = find_sites(spec)
    names = {site.layer for site in linears} | {f"{site.site}.{part}" for site in attentions for part in ("qk", "av")}

    def share(of: Any) -> float:
        total = sum(cost.macs for cost in costs)
        return sum(cost.macs for cost in costs if of(cost)) / total if total else 0.0

    def quantizable(cost: SiteCost) -> bool:
        return cost.site in names

    return {
        "inputs": [_end(end) for end in spec.inputs],
        "outputs": [_end(end) for end in spec.outputs_of],
        "opset": spec.opset,
        "head": spec.head,
        "blocks": spec.num_layers,
        "heads": spec.num_heads,
        "head_dim": spec.head_dim,
        "embed_dim": spec.embed_dim,
        "tokens": spec.tokens,
        "prefix": spec.prefix,
        "suffix": spec.suffix,
        "grid": list(spec.grid),
        "merges": not spec.unmergeable,
        "unmergeable": spec.unmergeable or None,
        "attentions": len(attentions),
        "linears": len(linears),
        "macs": sum(cost.macs for cost in costs),
        "int8_share": share(quantizable),
        "block_share": share(lambda cost: cost.block is not None),
        "foreign_share": share(lambda cost: cost.kind == "foreign"),
        "foreign": dict(spec.foreign),
        "labels": None if model.labels is None else len(model.labels),
        "preprocess": model.preprocess.to_dict(),
    }


def _behind(found: dict[str, Any]) -> str:
    return f" and {found['suffix']} behind" if found["suffix"] else ""


def _end(end: Any) -> dict[str, Any]:
    return {"name": end.name, "type": end.dtype, "shape": list(end.shape)}


def graph_lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what `inspect` prints, line by line."""
    foreign = Counter(reason for reason in found["foreign"].values())
    merging = (
        f"{found['tokens']} tokens: {found['prefix']} in front{_behind(found)} that never merge, {found['grid'][0]} x "
        f"{found['grid'][1]} patches; --merge shortens {100 * found['block_share']:.0f} % of the work"
        if found["merges"]
        else f"nothing merges: {found['unmergeable']}"
    )
    ends = [(side, _shown(end)) for side in ("inputs", "outputs") for end in found[side]]
    return [
        *((side.removesuffix("s"), shown) for side, shown in ends),
        ("opset", f"{found['opset']}, as it is read here"),
        (
            "blocks",
            f"{found['blocks']}, width {found['embed_dim']}, {found['heads']} heads of {found['head_dim']}; "
            f"{found['attentions']} attentions, {found['linears']} linear layers",
        ),
        ("tokens", merging),
        ("int8", f"--quant reaches {100 * found['int8_share']:.1f} % of {found['macs'] / 1e9:.3g} GMACs"),
        (
            "foreign",
            "nothing: every node is an operation of vitfold's"
            if not foreign
            else f"{sum(foreign.values())} nodes stay as they are, {100 * found['foreign_share']:.1f} % of the work: "
            + "; ".join(f"{count} {reason}" for reason, count in foreign.most_common()),
        ),
    ]


def _shown(end: dict[str, Any]) -> str:
    return f"{end['name']}: {end['type']} {' x '.join(map(str, end['shape']))}"
