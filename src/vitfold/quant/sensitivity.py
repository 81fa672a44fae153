"""What each quantized site costs alone: the order in which to put sites back to float."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vitfold.architectures.programs import forward
from vitfold.images import ImageSet, batches
from vitfold.model import Array
from vitfold.model.spec import Head
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.progress import Say
from vitfold.quant.calibrate import Calibrated
from vitfold.quant.sites import find_sites
from vitfold.quantizer import Quantizer
from vitfold.recipe import MergeRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSensitivity:
    """The noise that quantizing one site alone adds to the output.

    `sqnr_db` is 10 log10 (signal / noise) of the outputs in decibels (None if exact), `noise_ratio` the site's
    share of the sum over all sites, `agreement` the share of equal decisions (None for embeddings and
    regressions).
    """

    site: str
    sqnr_db: float | None
    noise_ratio: float
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def measure_sensitivity(
    calibrated: Calibrated,
    merge: MergeRecipe,
    images: ImageSet,
    *,
    batch: int = 8,
    step: Say = lambda _: None,
) -> tuple[SiteSensitivity, ...]:
    """Return every quantized site, the costliest first; `step` is told of each as it is measured."""
    model = calibrated.folded
    pixels = [torch.from_numpy(group.pixel_values) for group in batches(images, model.preprocess, batch=batch)]

    def outputs(ops: Run) -> Tensor:
        with torch.inference_mode():
            return torch.cat([forward(ops, model.spec, merge, one) for one in pixels])

    expected = outputs(Run(model.params))
    signal = float(expected.double().square().sum())
    noises: dict[str, float] = {}
    agreements: dict[str, float | None] = {}
    sites = _alone(calibrated)
    for number, (site, (params, quantizers)) in enumerate(sites.items(), start=1):
        step(f"quantizing one site at a time: {site} {number}/{len(sites)}")
        found = outputs(Simulate(params, quantizers))
        noises[site] = float((found - expected).double().square().sum())
        agreements[site] = _agreement(found, expected, model.spec.head)
    total = sum(noises.values()) or 1.0
    ranked = sorted(noises, key=lambda site: noises[site], reverse=True)
    return tuple(
        SiteSensitivity(
            site=site,
            sqnr_db=None if noises[site] == 0.0 else 10.0 * float(torch.log10(torch.tensor(signal / noises[site]))),
            noise_ratio=noises[site] / total,
            agreement=agreements[site],
        )
        for site in ranked
    )


def _agreement(found: Tensor, expected: Tensor, head: Head) -> float | None:
    """The share of equal decisions: of top-1 classes, or of every label; None where nothing is decided."""
    if head == "multi_label":
        return float(((found > 0) == (expected > 0)).float().mean())
    if head == "single_label":
        return float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    return None


def _alone(calibrated: Calibrated) -> dict[str, tuple[Mapping[str, Array], Mapping[str, Quantizer]]]:
    """Parameters and quantizers with one site quantized, for every site that is."""
    exact, rounded, quantizers = calibrated.folded.params, calibrated.model.params, calibrated.quantizers
    linears, attentions = find_sites(calibrated.folded.spec)
    found: dict[str, tuple[Mapping[str, Array], Mapping[str, Quantizer]]] = {}
    for linear in linears:
        if f"{linear.layer}.w" in quantizers:
            names = (f"{linear.layer}.weight", f"{linear.layer}.bias")
            changed = {name: rounded[name] for name in names if name in rounded}
            kept = {site: quantizers[site] for site in linear.names if site in quantizers}
            found[linear.layer] = ({**exact, **changed}, kept)
    for attention in attentions:
        kept = {site: quantizers[site] for site in attention.names if site in quantizers}
        if kept:
            found[attention.site] = (exact, kept)
    return found
