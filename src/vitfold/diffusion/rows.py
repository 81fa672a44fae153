"""Measured candidates of a search for steps as lines of a journal, so that an interrupted search goes on.

The pixels that a candidate drew are not kept: what was measured of them is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.journal import append_row, read_rows
from vitfold.bench.measurement import Measurement
from vitfold.diffusion import Sampled, find_method
from vitfold.diffusion.compare import SamplerRow
from vitfold.errors import JournalError

SCREENED = "screened.jsonl"


def read_groups(folder: Path | None) -> dict[str, list[tuple[SamplerRow, float | None]]]:
    """Return by its name every group that was measured: rows, and by how many dB each is further from the goal.

    Raises:
        JournalError: naming the line that is none of these.
    """
    if folder is None:
        return {}
    path = folder / SCREENED
    try:
        return {line["group"]: [_row(one) for one in line["rows"]] for line in read_rows(path)}
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"{path} holds a line that is no group of rows ({error!r}); remove the file") from None


def append_group(folder: Path | None, group: str, rows: Sequence[tuple[SamplerRow, float | None]]) -> None:
    """Append what was measured of a group.

    Raises:
        JournalError: if the folder cannot be written.
    """
    if folder is not None:
        append_row(folder / SCREENED, {"group": group, "rows": [_line(row, drop) for row, drop in rows]})


def _line(row: SamplerRow, psnr_drop_db: float | None) -> dict[str, Any]:
    sampled, measurement = row.sampled, row.measurement
    return {
        "name": row.name,
        "method": row.method.text,
        "mask": row.method.mask,
        "weights": row.method.rows,
        "steps": row.steps,
        "images": len(sampled.samples),
        "full_ns": sampled.full_ns,
        "reused_ns": sampled.reused_ns,
        "kept_bytes": sampled.kept_bytes,
        "reused_work": row.reused_work,
        "engine": measurement.engine,
        "trials_ns": measurement.trials_ns,
        "speedup": row.speedup,
        "psnr_db": row.psnr_db,
        "ssim": row.ssim,
        "psnr_drop_db": psnr_drop_db,
    }


def _row(line: Mapping[str, Any]) -> tuple[SamplerRow, float | None]:
    mask, images = line["mask"], int(line["images"])
    row = SamplerRow(
        name=line["name"],
        method=replace(
            find_method(line["method"]),
            mask=None if mask is None else tuple(mask),
            rows=tuple(map(tuple, line.get("weights", ()))),
        ),
        steps=line["steps"],
        sampled=Sampled(
            samples=np.zeros((images, 0, 0, 0), np.float32),
            full_ns=tuple(line["full_ns"]),
            reused_ns=tuple(line["reused_ns"]),
            kept_bytes=line["kept_bytes"],
        ),
        reused_work=line["reused_work"],
        measurement=Measurement(
            subject=line["name"],
            engine=line["engine"],
            batch=images,
            scope="end_to_end",
            trials_ns=tuple(map(tuple, line["trials_ns"])),
        ),
        speedup=dict(line["speedup"]),
        psnr_db=line["psnr_db"],
        ssim=line["ssim"],
        verdict=None,
        rise=None,
    )
    return row, line["psnr_drop_db"]
