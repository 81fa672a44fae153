"""The plots of ways to sample: quality against time per image, beside plainly fewer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from vitfold.report.figures import GREY, PALETTE, Plot, draw_front, laid_out, marker
from vitfold.report.points import front
from vitfold.report.samplers import FEWER, UNACCELERATED, Sampler, methods

_RIVAL = "#d1495b"
"""Of plainly fewer steps; methods take the other colours."""
_COLOURS = tuple(colour for colour in PALETTE if colour != _RIVAL)


def likeness(samplers: Sequence[Sampler]) -> Plot | None:
    """PSNR to the unaccelerated images against time; that sampler's own time is a line, as its PSNR is infinite."""
    figure = go.Figure()
    best = front([one for one in samplers if math.isfinite(one.psnr_db)], "paired_seconds", "psnr_db")
    if not best:
        return None
    draw_front(figure, [one.paired_seconds for one in best], [one.psnr_db for one in best])
    _draw(figure, samplers, "psnr_db")
    seconds = samplers[0].paired_seconds
    figure.add_shape(
        type="line",
        x0=seconds,
        x1=seconds,
        yref="paper",
        y0=0,
        y1=1,
        line={"color": GREY, "width": 1.5},
        label={"text": UNACCELERATED, "textposition": "start", "textangle": 0, "yanchor": "bottom", "xanchor": "right"},
    )
    return _timed("PSNR to the unaccelerated images against time", figure, samplers, "PSNR, dB")


def distance(samplers: Sequence[Sampler]) -> Plot | None:
    """Frechet distance to real images against time; bars are its standard deviation over resampled seeds."""
    figure = go.Figure()
    _draw(figure, samplers, "frechet", noise="frechet_noise")
    if not figure.data:
        return None
    return _timed("Frechet distance to real images against time", figure, samplers, "Frechet distance")


def _draw(figure: go.Figure, samplers: Sequence[Sampler], field: str, *, noise: str | None = None) -> None:
    """Draw a trace per family, its colour the same in every plot; plainly fewer steps are joined."""
    for place, group in enumerate(_groups(samplers)):
        family = group[0].family
        shown = [one for one in group if getattr(one, field) is not None and math.isfinite(getattr(one, field))]
        if not shown:
            continue
        colour = {FEWER: _RIVAL, UNACCELERATED: GREY}.get(family, _COLOURS[place % len(_COLOURS)])
        spread = [None if noise is None else getattr(one, noise) for one in shown]
        figure.add_scatter(
            x=[one.paired_seconds for one in shown],
            y=[getattr(one, field) for one in shown],
            mode="lines+markers" if family.startswith(FEWER) else "markers",
            name=escape(family),
            line={"color": colour, "width": 1.5, "dash": "dash"},
            marker=marker(place, colour),
            error_y={"array": spread, "thickness": 1.5, "width": 5, "color": GREY} if any(spread) else None,
            text=[_hover(one) for one in shown],
            hovertemplate="%{text}<extra></extra>",
        )


def _groups(samplers: Sequence[Sampler]) -> list[list[Sampler]]:
    """By family: methods in order of appearance, then fewer steps, then the unaccelerated sampler."""
    families = dict.fromkeys([*(one.family for one in methods(samplers)), FEWER, UNACCELERATED])
    ordered = sorted(samplers, key=lambda one: one.full_steps)
    found = [[one for one in ordered if one.family == family] for family in families]
    return [group for group in found if group]


def _hover(one: Sampler) -> str:
    lines = [
        f"<b>{escape(one.name)}</b>",
        f"{one.full_steps} steps in full, {one.reused_steps} reused",
        f"{one.seconds_per_image:.3f} s per image{', noisy' if one.noisy else ''}",
        f"speed-up {one.speed_up:.2f}x",
    ]
    if math.isfinite(one.psnr_db):
        lines.append(f"PSNR {one.psnr_db:.1f} dB")
    if one.ssim is not None:
        lines.append(f"SSIM {one.ssim:.4f}")
    if one.frechet is not None:
        noise = "" if one.frechet_noise is None else f" ± {one.frechet_noise:.2f}"
        lines.append(f"Frechet distance {one.frechet:.2f}{noise}")
    return "<br>".join(lines)


def _timed(title: str, figure: go.Figure, samplers: Sequence[Sampler], axis: str) -> Plot:
    """From no time at all to a little beyond the slowest, the same in every plot; higher where many are named."""
    figure = laid_out(figure, "seconds per image", axis)
    figure.update_xaxes(range=[0, 1.06 * max(one.paired_seconds for one in samplers)])
    return Plot(title=title, figure=figure, height=380 + 26 * max(0, len(figure.data) - 7))
