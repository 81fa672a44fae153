"""What `vitfold optimize` made, on the terminal or as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitfold.cli.terminal import heading, note, out, print_json
from vitfold.ops.energy import energy_of
from vitfold.pipeline import count_costs
from vitfold.recipe import MergeRecipe
from vitfold.report.tables import describe_integer, describe_registers, percent
from vitfold.schedule import describe_r

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle
    from vitfold.pipeline import Plan, Race, Solution
    from vitfold.registers import RemedySearchResult

PRUNED = {"heads": "heads", "head_dims": "widths of the heads", "units": "hidden units"}
"""What `[prune]` names for every block, and what it is called."""
_MEASURED = (
    ("agreement", "agree with the unfolded model"),
    ("top1", "top-1"),
    ("probability_error", "mean difference of probabilities"),
    ("relative_error", "relative error"),
    ("miou", "mIoU"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeResult:
    """What was made: no bundle by a dry run, no race where nothing was to be decided by one.

    `merging` is the race against the same without merging.

    `missed` says why a gate kept the bundle from its place, `kept` names the user's own files in the one it replaced.
    """

    folded: Plan
    bundle: Bundle | None = None
    race: Race | None = None
    merging: Race | None = None
    missed: str | None = None
    kept: tuple[str, ...] = ()


def report_made(made: OptimizeResult, measured: RemedySearchResult | None, *, json: bool) -> None:
    """Print what was made, and why quantization was given up or should have been."""
    values = _planned(made.folded)
    if measured is not None:
        values["remedies"] = {
            "sensitive_site": measured.site,
            "chosen": measured.chosen.name,
            "remedies": [one.to_dict() for one in measured.remedies],
        }
    kept = "quantized" if made.folded.quantizers else "float"
    if made.bundle is not None:
        values |= {
            "bundle": None if made.missed is not None else str(made.bundle.path),
            "size_bytes": made.bundle.size_bytes,
            "digest": made.bundle.digest,
            "verified": dict(made.bundle.manifest.verified),
            "fidelity": made.bundle.manifest.fidelity,
            "race": None if made.race is None else {**made.race.to_dict(), "kept": kept},
            "merging": None if made.merging is None else made.merging.to_dict(),
        }
    if json:
        print_json(values)
    else:
        _print(values)
    if made.kept:
        note(f"not vitfold's, and left in the bundle: {', '.join(made.kept)}")
    if made.race is not None and not made.race.faster:
        ending = "kept all the same (--keep-slower)" if kept == "quantized" else "the float model was kept instead"
        note(f"not faster than float on this machine ({made.race.median:.2f}x): {made.race.reason}; {ending}")
    if made.merging is not None and not made.merging.faster:
        note(
            f"merging does not pay on this machine ({made.merging.median:.2f}x): {made.merging.reason}; merge more "
            "tokens in few blocks, or let --merge auto or --max-drop choose"
        )


def _planned(folded: Plan) -> dict[str, Any]:
    base = folded.recipe.merge
    quant, work = folded.recipe.quant, folded.work().to_dict()
    original = energy_of(count_costs(folded.model.spec, MergeRecipe(r=())))
    return {
        "source": folded.model.origin.source,
        "target": folded.target.name,
        "recipe": folded.recipe.to_dict(),
        "schedule": describe_r(base.r),
        "quantization": None if quant is None else f"{quant.scheme} by {quant.method}",
        "simulated": folded.simulated,
        **work,
        "tokens": list(folded.tokens),
        "weight_bytes": folded.model.size_bytes,
        "energy": {**work["energy"], "original_uj": original.total_uj},
    }


def _print(values: dict[str, Any]) -> None:
    _print_plan(values)
    if "bundle" in values:
        _print_bundle(values)
    else:
        out.print("  dry run: nothing was written")


def _print_plan(values: dict[str, Any]) -> None:
    heading(values["source"], f" for {values['target']}")
    out.print(f"  merge     {values['schedule']}")
    if "prune" in values["recipe"]:
        still = "" if "bundle" in values else "; the work below still has all of them"
        out.print(f"  prune     {_pruned(values['recipe']['prune'])}{still}")
    if values["quantization"]:
        shown = "simulated: no engine executes it" if values["simulated"] else "integer linear layers"
        if not values["simulated"] and values["recipe"]["quant"].get("attention"):
            shown += " and attention"
        if values["recipe"]["quant"].get("outputs"):
            shown += ", outputs rounded"
        out.print(f"  quant     {values['quantization']} ({shown})")
    if "registers" in values["recipe"] or "remedies" in values:
        out.print(f"  registers {_registers(values)}")
    if values["integer"] is not None:
        out.print(f"  integer   {describe_integer(values['integer'])}")
    out.print(f"  tokens    {' '.join(map(str, values['tokens']))}")
    out.print(f"  work      {values['macs'] / 1e9:.3g} GMACs, {values['bytes'] / 1e6:.3g} MB moved per image")
    if values["quantization"] and values["integer"] is None:
        return  # which products are integer is known with the ranges
    energy = values["energy"]
    out.print(
        f"  energy    {energy['total_uj'] / 1e3:.3g} mJ per image, the original {energy['original_uj'] / 1e3:.3g} "
        f"({energy['source']})",
        soft_wrap=True,
    )


def _pruned(prune: dict[str, Any]) -> str:
    """What of the blocks goes, or stays."""
    if "mlp" in prune:
        return f"{percent(prune['mlp'])} of the hidden units of every MLP"
    kept = (f"{PRUNED[name]} of each block {' '.join(map(str, prune[name]))}" for name in PRUNED if name in prune)
    return ", ".join(kept)


def _registers(values: dict[str, Any]) -> str:
    """What is done about sinks, and what it measured against doing nothing."""
    shown = describe_registers(values["recipe"].get("registers"))
    found = values.get("remedies")
    if found is None:
        return shown
    rows = {row["name"]: row for row in found["remedies"]}
    chosen, nothing = rows[found["chosen"]], rows["none"]
    sure = chosen["confirmed_db"] is not None and nothing["confirmed_db"] is not None
    key = "confirmed_db" if sure else "sqnr_db"
    gain = "" if chosen is nothing else f": {chosen[key]:.1f} dB instead of {nothing[key]:.1f} without"
    return f"{shown}{gain}, the best of {len(rows)} measured at {found['sensitive_site']}"


def _print_bundle(values: dict[str, Any]) -> None:
    error = values["verified"]["median_relative_error"]
    narrowed = values["verified"].get("narrow_relative_error")
    floats = "" if narrowed is None else f", {narrowed:.1e} in floats of fewer bits"
    out.print(f"  verified  {values['verified']['engine']} within {error:.1e} of the reference{floats}")
    fidelity = values["fidelity"]
    if fidelity is not None:
        parts = [f"{percent(fidelity[key])} {name}" for key, name in _MEASURED if fidelity.get(key) is not None]
        if fidelity["cosine"] is not None:
            parts.append(f"cosine {fidelity['cosine']:.4f}")
        if not parts or fidelity.get("probability_error") is not None:
            parts.append("equal" if fidelity["sqnr_db"] is None else f"SQNR {fidelity['sqnr_db']:.1f} dB")
        out.print(f"  fidelity  {', '.join(parts)}, on {fidelity['images']} images")
    if values["race"] is not None:
        ratio = values["race"]["speed_up"]
        out.print(
            f"  race      {ratio['median']:.2f}x ± {ratio['iqr'] / 2:.2f} over the float graph, batch 1",
        )
    if values["merging"] is not None:
        ratio = values["merging"]["speed_up"]
        out.print(f"  merging   {ratio['median']:.2f}x ± {ratio['iqr'] / 2:.2f} over the same without it, batch 1")
    if values["bundle"] is None:
        return
    out.print(f"  bundle    {values['bundle']} ({values['size_bytes'] / 1e6:.1f} MB)", soft_wrap=True)
    following = "audit" if values["target"].startswith("tensorrt") else "bench"
    note(f"next: vitfold {following} {values['bundle']}, or vitfold predict {values['bundle']} IMAGE")


def print_solution(found: Solution) -> None:
    """Print what `--merge auto` chose, and by what."""
    model = (
        f"on {found.gpu} at batch {found.batch}, in a roofline model of the blocks with assumed tiles and waves, "
        "not a measurement"
    )
    where = "by a table measured here at batch 1" if found.gpu is None else model
    plain, like = f"{found.ms_none:.3f} ms without merging", f"{found.ms_like:.3f} ms with r = {found.like}"
    if not any(found.r):
        note(f"merging cannot pay: {plain}, {like} {where}")
        return
    kept = f"distortion {found.distortion:.4f} of {found.distortion_like:.4f} allowed, on {found.images} images"
    note(f"r = {describe_r(found.r)}: {found.ms:.3f} ms, {plain}, {like} {where}; {kept}")
