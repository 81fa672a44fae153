"""What of the blocks goes where a share of their work shall, by what the output loses; losses are measured once."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.images import ImageSet
from vitfold.model import Architecture, Array, Model
from vitfold.pipeline.plan import count_costs, optimize
from vitfold.recipe import MergeRecipe, PruneRecipe

if TYPE_CHECKING:
    from vitfold.compensation import BlockLosses, Losses
    from vitfold.quant import Progress

_FORMAT = 3
_RECORD = "record"


def solve_prune(
    model: Model,
    merge: MergeRecipe,
    images: ImageSet,
    share: float,
    *,
    attention: float = 1.0,
    widths: Collection[int] | None = None,
    progress: Progress | None = None,
) -> PruneRecipe:
    """Return which heads and hidden units stay where a share of the blocks' multiply-accumulates goes.

    Args:
        merge: what merges, which makes later blocks cheaper.
        images: 512 of them are looked at; no labels are used.
        attention: what a multiply-accumulate of attention costs, where one of an MLP costs 1.
        widths: how wide heads may become (`plan.fusible_widths`); None: any multiple of 8.

    Raises:
        RecipeError: if neither heads nor units of this model can go, or not so much of them.
        CalibrationError: on too few images.
    """
    from vitfold.compensation import divide

    folded = optimize(model, quant="none").folded
    losses = pruning_losses(folded, images, progress=progress)
    if widths is not None:
        losses = losses.of_widths(widths)
    return divide(losses, block_costs(folded.spec, merge, attention), share)


def pruning_losses(folded: Model, images: ImageSet, *, progress: Progress | None = None) -> Losses:
    """Return what the output loses with heads and units of every block, measured on images and kept.

    Raises:
        RecipeError: if neither can go.
        CalibrationError: on too few images.
    """
    from vitfold.compensation import DIVIDING_IMAGES, check_enough, losses_from_dict, measure_losses
    from vitfold.quant import Progress
    from vitfold.quant.network import ImageExamples

    check_enough(len(images.paths))
    chosen = images.sample(min(DIVIDING_IMAGES, len(images.paths)), seed=0)
    key = key_of(_FORMAT, folded.digest(), chosen.digest())
    kept = read_arrays("pruning", key)
    if kept is None or _RECORD not in kept:
        examples, progress = ImageExamples(images=chosen, preprocess=folded.preprocess), progress or Progress()

        def once(block: int, measure: Callable[[], BlockLosses]) -> BlockLosses:
            """Whoever is interrupted goes on with the block that was being measured."""
            own = key_of(_FORMAT, key, block)
            known = read_arrays("pruning", own)
            if known is None or _RECORD not in known:
                known = {_RECORD: _encoded(measure())}
                keep_arrays("pruning", own, known)
            read = json.loads(known[_RECORD].tobytes())
            return {int(kind): {int(count): loss for count, loss in one.items()} for kind, one in read.items()}

        found = measure_losses(folded, examples, step=progress.step, advance=progress.advance, once=once)
        kept = {_RECORD: _encoded(found.to_dict())}
        keep_arrays("pruning", key, kept)
    return losses_from_dict(json.loads(kept[_RECORD].tobytes()))


def _encoded(values: Mapping[Any, Any]) -> Array:
    return np.frombuffer(json.dumps(values).encode(), np.uint8)


def block_costs(spec: Architecture, merge: MergeRecipe, attention: float = 1.0) -> Sequence[tuple[float, float]]:
    """Return what attention and MLP of every block cost: multiply-accumulates, those of attention weighted."""
    costs, found = count_costs(spec, merge), []
    for block in range(spec.num_layers):
        of = [cost for cost in costs if cost.block == block]
        heads, units = (sum(cost.macs for cost in of if cost.role == role) for role in ("attention", "mlp"))
        found.append((attention * heads, float(units)))
    return found
