"""Where a model's outliers are: token norms per block over a folder of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.images import ImageSet, batches
from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.progress import Advance
from vitfold.transforms.tokens import Tokens

KEPT = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norms:
    """Norms max_c |x_c| of tokens behind every block.

    `max_norm`, `mean_norm`, `prefix_norm` and `patch_norm` have one entry per block: over all tokens, their mean, and
    the largest of prefix tokens and of patches. `patches` are those of the first images, in raster order.
    """

    max_norm: Float[np.ndarray, " L"]
    mean_norm: Float[np.ndarray, " L"]
    prefix_norm: Float[np.ndarray, " L"]
    patch_norm: Float[np.ndarray, " L"]
    patches: Float[np.ndarray, "S L M"]

    @property
    def rarest(self) -> int:
        """The block behind which a patch exceeds its image's median patch most."""
        medians = np.maximum(np.median(self.patches, axis=2), 1e-12)
        return int((self.patches.max(2) / medians).max(0).argmax())


def measure_norms(
    model: Model,
    images: ImageSet,
    *,
    batch: int = 8,
    advance: Advance | None = None,
) -> Norms:
    """Run the float model over the images and keep the norms of its tokens."""
    spec = model.spec
    largest = np.zeros((3, spec.num_layers))
    total, count = np.zeros(spec.num_layers), 0
    patches: list[list[Tensor]] = [[] for _ in range(spec.num_layers)]
    ops = Run(model.params)
    for group in batches(images, model.preprocess, batch=batch):

        def observe(boundary: int, tokens: Tokens[Tensor]) -> None:
            block = boundary - 1
            if block < 0:
                return
            norms = tokens.x.abs().amax(-1)
            parts = (norms, norms[:, : spec.prefix], norms[:, spec.prefix :])
            for row, part in enumerate(parts):
                largest[row, block] = max(largest[row, block], float(part.max()) if part.numel() else 0.0)
            total[block] += float(norms.mean(1).sum())
            if sum(map(len, patches[block])) < KEPT:
                patches[block].append(parts[2])

        with torch.inference_mode():
            pixels = torch.from_numpy(group.pixel_values)
            forward(ops, spec, UNMERGED, pixels, observe=observe)
        count += len(group.index)
        if advance is not None:
            advance(len(group.index))
    return Norms(
        max_norm=largest[0],
        mean_norm=total / count,
        prefix_norm=largest[1],
        patch_norm=largest[2],
        patches=torch.stack([torch.cat(rows) for rows in patches], 1).numpy(),
    )
