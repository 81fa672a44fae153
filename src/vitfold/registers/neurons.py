"""Register neurons: hidden units of early and middle MLPs whose activations make the sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.images import ImageSet, batches
from vitfold.model import Model, block_layers
from vitfold.model.spec import as_vit
from vitfold.ops.record import Record
from vitfold.progress import Advance
from vitfold.quant.sites import find_sites

SINKS = 4


def find_neurons(
    model: Model,
    images: ImageSet,
    site: str,
    count: int,
    *,
    batch: int = 8,
    advance: Advance | None = None,
) -> tuple[tuple[int, int], ...]:
    """Return the `count` hidden units (block, unit) that are most active on the sinks of every image.

    A unit's score is its mean |activation| on the few patch tokens that are largest at `site`, over the images; units
    of blocks up to that of the site count, since later ones cannot have made the sinks.

    Source: test-time registers (2506.08010), algorithm 1; there the sinks are outliers of the last block.
    """
    spec = as_vit(model.spec, "neurons are moved in")
    last = block_layers(spec)[site]
    ends = {s.block: f"{s.layer}.x" for s in find_sites(spec)[0] if s.role == "mlp"}
    hidden = [ends[block] for block in range(last + 1)]
    totals: dict[str, Tensor] = {name: torch.zeros(spec.mlp_dim_of(block)) for block, name in enumerate(hidden)}
    for group in batches(images, model.preprocess, batch=batch):
        seen: dict[str, Tensor] = {}

        def see(name: str, value: Tensor, seen: dict[str, Tensor] = seen) -> None:
            if name in totals or name == f"{site}.x":
                seen[name] = value

        with torch.inference_mode():
            forward(Record(model.params, see), spec, UNMERGED, torch.from_numpy(group.pixel_values))
        norms = seen[f"{site}.x"].abs().amax(-1)[:, spec.prefix :]
        tokens = norms.topk(min(SINKS, norms.shape[1]), 1).indices + spec.prefix
        for name in hidden:
            rows = seen[name].abs().gather(1, tokens[..., None].expand(-1, -1, seen[name].shape[-1]))
            totals[name] += rows.sum((0, 1))
        if advance is not None:
            advance(len(group.index))
    scores = torch.cat([totals[name] for name in hidden])
    units = [(block, unit) for block, name in enumerate(hidden) for unit in range(len(totals[name]))]
    order = scores.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(units[int(index)] for index in order))
