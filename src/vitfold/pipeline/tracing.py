"""Which original tokens each row holds, block by block: what pictures of merged tokens are drawn from."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Num

from vitfold.architectures.programs import forward
from vitfold.model import Array, Model
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe
from vitfold.transforms.tokens import Tokens


def trace_groups(model: Model, merge: MergeRecipe, pixels: Num[np.ndarray, "B ..."]) -> Int[np.ndarray, "L B patches"]:
    """Return behind every block the row that holds each patch, in raster order; patches of one row are merged.

    The float model decides, also for a quantized recipe, whose rounding may pair single tokens otherwise.
    """
    import torch

    rows: list[Array] = []
    prefix, tokens = model.spec.prefix, model.spec.tokens

    def observe(boundary: int, found: Tokens[torch.Tensor]) -> None:
        if boundary == 0:
            return
        if found.source is None:
            held = np.broadcast_to(np.arange(tokens), (len(pixels), tokens))
        else:
            held = found.source.argmax(dim=1).numpy()
        rows.append(held[:, prefix : tokens - model.spec.suffix])

    with torch.inference_mode():
        forward(Run(model.params), model.spec, merge, torch.from_numpy(pixels), sources=True, observe=observe)
    return np.stack(rows)
