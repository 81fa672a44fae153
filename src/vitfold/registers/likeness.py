"""How alike outlier tokens of different images are: whether one register can stand for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.images import ImageSet, batches
from vitfold.model import Model
from vitfold.ops.record import Record
from vitfold.progress import Advance


@dataclass(frozen=True, slots=True, kw_only=True)
class Likeness:
    """Mean cosines between tokens of different images: of each image's largest patch, and of all its others."""

    outliers: float
    others: float


def measure_likeness(
    model: Model, images: ImageSet, site: str, *, batch: int = 8, advance: Advance | None = None
) -> Likeness:
    """Compare patch tokens across images in the input of layer `site`.

    Equation: mean over images i != j of cos(z_i, z_j), z_i = argmax_z max_c |z_c| over the patches z of image i; and
    mean over i != j and all other patches n of i and m of j of cos(z_in, z_jm), which is
    (|sum_i s_i|^2 - sum_i |s_i|^2) / sum_(i != j) N_i N_j with s_i = sum_n z_in / |z_in|.

    Raises:
        ValueError: if there are not two images.

    Source: RegCache (2510.04547), section 3, observation 2.
    """
    if len(images.paths) < 2:
        raise ValueError("tokens of different images need two images")
    largest, sums, seen = [], [], {}
    ops = Record(model.params, lambda name, x: seen.update({name: x}) if name == f"{site}.x" else None)
    for group in batches(images, model.preprocess, batch=batch):
        with torch.inference_mode():
            forward(ops, model.spec, UNMERGED, torch.from_numpy(group.pixel_values))
        patches = seen[f"{site}.x"][:, model.spec.prefix :].double()
        first = patches.abs().amax(-1).argmax(1)
        rows = torch.nn.functional.normalize(patches, dim=-1)
        one = rows[torch.arange(len(rows)), first]
        largest.append(one)
        sums.append(rows.sum(1) - one)
        if advance is not None:
            advance(len(group.index))
    others = patches.shape[1] - 1
    return Likeness(
        outliers=_between(torch.cat(largest)), others=_between(torch.cat(sums)) / others**2 if others else 0.0
    )


def _between(rows: Float[Tensor, "S D"]) -> float:
    """The mean inner product of two different rows."""
    count = len(rows)
    return float((rows.sum(0).square().sum() - rows.square().sum()) / (count * (count - 1)))
