"""Candidates for a register: the tokens of largest norm over a pool of images, with their keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.errors import RecipeError
from vitfold.images import ImageSet, batches
from vitfold.model import Model, block_layers
from vitfold.ops.record import Record
from vitfold.progress import Advance
from vitfold.quant.sites import find_sites

CANDIDATES = 32
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """The patch tokens of largest norm at a site, the largest first, and what they are in every block's attention.

    `place` is the image's number in the pool and the token's in the sequence.
    """

    norm: Float[np.ndarray, " C"]
    place: Int[np.ndarray, "C 2"]
    k: Float[np.ndarray, "C L H K"]
    v: Float[np.ndarray, "C L H K"]

    def register(self, token: int, average: int) -> tuple[Float[np.ndarray, "L H K"], Float[np.ndarray, "L H K"]]:
        """Return the mean keys and values of `average` candidates from the rank `token` on.

        Raises:
            RecipeError: if there are not as many.
        """
        if token + average > len(self.norm):
            raise RecipeError(
                f"registers.token = {token} and average = {average} ask for {token + average} candidates, the images "
                f"gave {len(self.norm)}; lower them or give more images"
            )
        rows = slice(token, token + average)
        return self.k[rows].mean(0), self.v[rows].mean(0)


def curate(
    model: Model,
    images: ImageSet,
    site: str,
    *,
    count: int = CANDIDATES,
    batch: int = 8,
    advance: Advance | None = None,
) -> Candidates:
    """Return the `count` patch tokens of largest norm in the input of layer `site`; kept for the next call.

    Equation: S = argtop-k of max_c |z_c| over the tokens z at the site, over all images.

    Raises:
        RecipeError: if there is no such layer, or it does not see single tokens.

    Source: RegCache (2510.04547), section 4.1.
    """
    key = key_of(_FORMAT, model.digest(), images.digest(), site, count, batch)
    kept = read_arrays("registers", key)
    if kept is None or set(kept) != {"norm", "place", "k", "v"}:
        kept = _pass(model, images, site, count=count, batch=batch, advance=advance)
        keep_arrays("registers", key, kept)
    elif advance is not None:
        advance(len(images.paths))
    return Candidates(**kept)


def _pass(
    model: Model, images: ImageSet, site: str, *, count: int, batch: int, advance: Advance | None
) -> dict[str, np.ndarray]:
    if site not in block_layers(model.spec):
        raise RecipeError(f"registers.site: no block has a linear layer {site!r}; give one such as blocks.6.mlp.fc2")
    best: dict[str, Tensor] | None = None
    seen = 0
    for group in batches(images, model.preprocess, batch=batch):
        found = _largest(model, torch.from_numpy(group.pixel_values), site, count)
        found["place"][:, 0] += seen
        if best is not None:
            joined = {name: torch.cat((best[name], found[name])) for name in found}
            order = joined["norm"].argsort(descending=True, stable=True)[:count]
            found = {name: values[order] for name, values in joined.items()}
        best = found
        seen += len(group.index)
        if advance is not None:
            advance(len(group.index))
    assert best is not None
    return {name: np.ascontiguousarray(values.numpy()) for name, values in best.items()}


def _largest(model: Model, pixels: Float[Tensor, "B 3 H W"], site: str, count: int) -> dict[str, Tensor]:
    """The largest tokens of one batch."""
    spec = model.spec
    seen: dict[str, Tensor] = {}

    attentions = [one.site for one in find_sites(spec)[1] if one.block is not None]
    watched = {f"{site}.x", *(f"{attention}.{part}" for attention in attentions for part in ("k", "v"))}

    def see(name: str, value: Tensor) -> None:
        if name in watched:
            seen[name] = value

    with torch.inference_mode():
        forward(Record(model.params, see), spec, UNMERGED, pixels)
    norms = seen[f"{site}.x"].abs().amax(-1)[:, spec.prefix :]
    order = norms.flatten().argsort(descending=True, stable=True)[:count]
    image, patch = order // norms.shape[1], order % norms.shape[1]
    token = patch + spec.prefix

    def rows(part: str) -> Tensor:
        per_block = [seen[f"{attention}.{part}"][image, :, token] for attention in attentions]
        return torch.stack(per_block, 1)

    return {"norm": norms[image, patch], "place": torch.stack((image, token), 1), "k": rows("k"), "v": rows("v")}


def places(candidates: Candidates) -> list[Mapping[str, int]]:
    """Return where the candidates come from, as plain JSON values."""
    return [{"image": int(image), "token": int(token)} for image, token in candidates.place]
