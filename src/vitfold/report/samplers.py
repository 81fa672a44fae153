"""Ways to sample as points: time, likeness and distance of one row of `vitfold diffuse`, or of what writes such rows.

Owns the translation, and which way is the unaccelerated one, which the plain alternative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitfold.errors import ReportError
from vitfold.report.loading import Document

UNACCELERATED = "unaccelerated"
FEWER = "fewer steps"
_PLAIN = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """One way to sample as it was measured; None where it was not.

    `family` is the method without its numbers and what it is compressed with. `psnr_db` and `ssim` compare with the
    unaccelerated images; `psnr_db` is infinite where all pixels are equal.
    """

    name: str
    reuse: str
    family: str
    full_steps: int
    reused_steps: int
    seconds_per_image: float
    speed_up: float
    noisy: bool
    psnr_db: float
    ssim: float | None
    frechet: float | None
    frechet_noise: float | None


def samplers_of(document: Document) -> list[Sampler]:
    """Translate the rows; the first one is the unaccelerated sampler.

    Raises:
        ReportError: if a row lacks what every row has.
    """
    content = document.content
    try:
        return [_sampler(row, place, content["steps"]) for place, row in enumerate(content["rows"])]
    except (KeyError, TypeError) as error:
        raise ReportError(f"{document.name} is not what vitfold diffuse writes ({error!r}); measure again") from None


def _sampler(row: Mapping[str, Any], place: int, steps: int) -> Sampler:
    return Sampler(
        name=row["name"],
        reuse=row["reuse"],
        family=UNACCELERATED if place == 0 else _family(row, steps),
        full_steps=row["full_steps"],
        reused_steps=row["reused_steps"],
        seconds_per_image=row["seconds_per_image"],
        speed_up=row["speedup"],
        noisy=row["noisy"],
        psnr_db=float("inf") if row["psnr_db"] is None else row["psnr_db"],
        ssim=row["ssim"],
        frechet=row.get("frechet"),
        frechet_noise=row.get("frechet_noise"),
    )


def _family(row: Mapping[str, Any], steps: int) -> str:
    """A row is called by its method, and behind a comma by what it is compressed with; bundles have other names."""
    name, reuse = row["name"], row["reuse"]
    if reuse == _PLAIN and row["steps"] < steps:
        return FEWER
    compressed = name.removeprefix(f"{reuse}, ") if name.startswith(f"{reuse}, ") else ""
    method = "" if reuse == _PLAIN else reuse.partition(":")[0]
    return ", ".join(filter(None, (method, compressed))) or UNACCELERATED


def fewer_steps(samplers: Sequence[Sampler]) -> list[Sampler]:
    """Return the plain alternative: the sampler with fewer steps, the fewest first."""
    return sorted((one for one in samplers if one.family == FEWER), key=lambda one: one.full_steps)


def methods(samplers: Sequence[Sampler]) -> list[Sampler]:
    """Return what is neither the unaccelerated sampler nor plainly fewer steps of it."""
    return [one for one in samplers if one.family not in (FEWER, UNACCELERATED)]


def fastest_within(samplers: Sequence[Sampler], least_db: float) -> Sampler | None:
    """Return the fastest that is at least so near to the unaccelerated images, if any is."""
    near = [one for one in samplers if one.psnr_db >= least_db]
    return max(near, key=lambda one: one.speed_up, default=None)
