"""What a plan will come to, said before the minutes that it takes."""

from __future__ import annotations

from vitfold.errors import RecipeError
from vitfold.images import ImageSet
from vitfold.pipeline.plan import Plan
from vitfold.schedule.landing import ROWS, leftover

FEW_PATCHES = 2
FEW_PATCHES_RATIO = 0.02


def foreseen(folded: Plan, calibration: ImageSet | None, *, keep_float: int = 0) -> tuple[str, ...]:
    """Return remarks on a plan and its calibration images, None where they are not known yet.

    Raises:
        RecipeError: if `keep_float` leaves nothing to quantize.
        CalibrationError: if the images are too few to calibrate on.
    """
    check_keep_float(folded, keep_float)
    few = None if calibration is None else _few_images(folded, calibration)
    found = [_few_tokens(folded), _left_over(folded), few]
    return tuple(one for one in found if one is not None)


def quantized_sites(folded: Plan) -> int:
    """Return how many sites a plan quantizes: linear layers, and attentions."""
    from vitfold.quant.sites import find_sites

    quant = folded.recipe.quant
    if quant is None:
        return 0
    linears, attentions = find_sites(folded.folded.spec)
    count = sum(quant.bits(one.layer, weight=True) is not None for one in linears)
    if quant.attention:
        count += sum(quant.bits(one.site, weight=False) is not None for one in attentions)
    return count


def check_keep_float(folded: Plan, count: int) -> None:
    """Check that --keep-float leaves something to quantize.

    Raises:
        RecipeError: saying how many sites there are.
    """
    if not count:
        return
    sites = quantized_sites(folded)
    if not sites:
        raise RecipeError("--keep-float leaves sites of a quantization float, and nothing is quantized; add --quant")
    if count >= sites:
        raise RecipeError(
            f"--keep-float {count} leaves nothing to quantize: the recipe quantizes {sites} sites; give fewer than "
            f"{sites}, or leave --quant out"
        )


def _few_tokens(folded: Plan) -> str | None:
    tokens, prefix = folded.tokens, folded.folded.spec.fixed
    before, after = tokens[0] - prefix, tokens[-1] - prefix
    if after == before or after > max(FEW_PATCHES, FEW_PATCHES_RATIO * before):
        return None
    protected = f", {prefix} of them no patches," if prefix else ""
    return (
        f"the schedule leaves {tokens[-1]} of {tokens[0]} tokens{protected} behind the last block: little of an image "
        "is left there; lower --merge unless a measurement says otherwise"
    )


def _left_over(folded: Plan) -> str | None:
    """Say of a plan that does not merge that few tokens are one tile too many, where its engine goes by tiles."""
    spec, rows = folded.folded.spec, folded.target.runtime.rows
    over = leftover(spec.tokens, spec.fixed, rows)
    merges = any(folded.recipe.merge.r) or spec.unmergeable or not spec.num_layers
    if merges or rows != ROWS or not 0 < over <= rows // 2:
        return None
    return (
        f"{spec.tokens} tokens are {over} more than a multiple of {rows}, by which kernels of "
        f"{folded.target.engine} go; --merge align merges them in the first block, and vitfold lengths times both"
    )


def _few_images(folded: Plan, calibration: ImageSet) -> str | None:
    from vitfold.quant.calibrate import check_enough

    quant, found = folded.recipe.quant, len(calibration.paths)
    check_enough(found)
    if quant is None or found >= quant.calibration_size:
        return None
    return (
        f"calibration takes all {found} images that there are, fewer than --calibration-size {quant.calibration_size}"
    )
