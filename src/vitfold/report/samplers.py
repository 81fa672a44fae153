"""Ways to sample as points: time, likeness and distance of each row of what `vitfold diffusion` measures."""

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
    unaccelerated images; `psnr_db` is infinite where all pixels are equal. `paired_seconds` is the time of the
    unaccelerated sampler over the paired speed-up: comparable also where rows were timed minutes apart.
    """

    name: str
    reuse: str
    family: str
    full_steps: int
    reused_steps: int
    seconds_per_image: float
    paired_seconds: float
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
        families = [UNACCELERATED, *(_family(row, content) for row in content["rows"][1:])]
        return [_sampler(row, family, content) for row, family in zip(content["rows"], families, strict=True)]
    except (KeyError, TypeError) as error:
        raise ReportError(
            f"{document.name} is not what vitfold diffusion sample writes ({error!r}); measure again"
        ) from None


def _sampler(row: Mapping[str, Any], family: str, content: Mapping[str, Any]) -> Sampler:
    return Sampler(
        name=row["name"],
        reuse=row["reuse"],
        family=family,
        full_steps=row["full_steps"],
        reused_steps=row["reused_steps"],
        seconds_per_image=row["seconds_per_image"],
        paired_seconds=content["rows"][0]["seconds_per_image"] / row["speedup"],
        speed_up=row["speedup"],
        noisy=row["noisy"],
        psnr_db=float("inf") if row["psnr_db"] is None else row["psnr_db"],
        ssim=row["ssim"],
        frechet=row.get("frechet"),
        frechet_noise=row.get("frechet_noise"),
    )


def _family(row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """The method, and what it is compressed with: by the row's name, or by the plan of the bundle that is called so."""
    method, plan = row["reuse"].partition(":")[0], content.get("bundles", {}).get(row["name"])
    compressed: list[str] = []
    if plan is not None:
        compressed += [f"r={plan['merge']}"] if plan["merge"] else []
        compressed += [plan["quant"]] if plan["quant"] != _PLAIN else []
    elif row["name"].startswith(f"{row['reuse']}, "):
        compressed += [word for word in row["name"].split(", ")[1:] if not word.endswith(" steps")]
    if method == _PLAIN:
        method = FEWER if row["steps"] < content["steps"] else ""
    return ", ".join(filter(None, (method, *compressed))) or UNACCELERATED


def fewer_steps(samplers: Sequence[Sampler]) -> list[Sampler]:
    """Return the plain alternative: the unaccelerated sampler with fewer steps."""
    return [one for one in samplers if one.family == FEWER]


def methods(samplers: Sequence[Sampler]) -> list[Sampler]:
    """Return what is neither the unaccelerated sampler nor plainly fewer steps of it."""
    return [one for one in samplers if one.family not in (FEWER, UNACCELERATED)]


def fastest_within(samplers: Sequence[Sampler], least_db: float) -> Sampler | None:
    """Return the fastest that is at least so near to the unaccelerated images, if any is."""
    near = [one for one in samplers if one.psnr_db >= least_db]
    return max(near, key=lambda one: one.speed_up, default=None)


def has_choice(document: Document) -> bool:
    """Whether the document is one of a choice: of a search, or of `--reuse auto`."""
    return "held_out" in document.content or document.content.get("chosen") is not None


def chosen(document: Document) -> Sampler | None:
    """Return what was chosen, by a search as it was measured on held-out seeds; None if nothing was good enough."""
    content = document.content
    if "held_out" in content:
        winner = content["held_out"]["winner"]
        return None if winner is None else _sampler(winner, _family(winner, content), content)
    return next((one for one in methods(samplers_of(document)) if one.reuse == content["chosen"]), None)
