"""A plan of steps as a value and as a small file: which are computed in full, for what, and what it gains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitfold.diffusion.pipelines.stacks import Part, Stack
from vitfold.errors import RecipeError, UnsupportedError
from vitfold.storage.checked import ImplausibleError, check_fields, entry, parse_json, section
from vitfold.storage.ordinary import read_text, write_whole
from vitfold.version import __version__

FORMAT = 2
"""Format 1 has no rows: forecasts are lines."""
_SAMPLED = 64
Figures = tuple["Row", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to draw the held-out images: PSNR is to those of all steps, None where they are equal."""

    name: str
    full: int
    steps: int
    psnr_db: float | None
    lowest_psnr_db: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Which steps of a pipeline are computed in full, what it is for, and what it gave on held-out prompts and seeds.

    `steps` is the pipeline's `num_inference_steps`; its scheduler makes `timesteps` of them, and `runs` are taken,
    from timestep `first`. Steps that are not in `full` forecast what the blocks add by the weights of their row in
    `rows`, of the newest full steps, or without rows by a line over `position`.
    """

    pipeline: str
    stacks: Mapping[str, Stack]
    weights: str
    scheduler: Mapping[str, Any]
    guidance: Mapping[str, float]
    steps: int
    timesteps: int
    first: int
    runs: int
    passes: int
    full: tuple[int, ...]
    position: str
    held_out: Figures
    remark: str
    method: str = "solved"
    rows: tuple[tuple[float, ...], ...] = ()

    @property
    def mask(self) -> tuple[bool, ...]:
        """Whether each step is computed in full."""
        return tuple(step in self.full for step in range(self.runs))

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON.

        Raises:
            RecipeError: if the file cannot be written.
        """
        path = Path(path)
        try:
            write_whole(path, (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RecipeError(f"cannot write {path}: {error}; choose another folder") from None
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": FORMAT, "vitfold": __version__, **asdict(self)}

    def to_cache_dit(self) -> dict[str, Any]:
        """Return the plan as arguments of cache-dit: `cache_dit.DBCacheConfig(**found["cache_config"])`, and so on.

        Its first block runs at every step, and it counts by step numbers; the full steps are the same.
        """
        return {
            "cache_config": {
                "Fn_compute_blocks": 1,
                "Bn_compute_blocks": 0,
                "max_warmup_steps": next((i for i, full in enumerate(self.mask) if not full), self.runs),
                "num_inference_steps": self.runs,
                "steps_computation_mask": [int(full) for full in self.mask],
                "steps_computation_policy": "static",
                "enable_separate_cfg": self.passes > 1,
            },
            "calibrator_config": {"taylorseer_order": 1},
        }

    def __str__(self) -> str:
        lines = [
            f"{self.pipeline}: {len(self.full)} of {self.runs} steps in full: {', '.join(map(str, self.full))}",
            f"{'':24}{'full':>6}{'steps':>7}{'s/image':>10}{'PSNR dB':>9}{'lowest':>9}",
        ]
        for row in self.held_out:
            decibels = ["-" if value is None else f"{value:.1f}" for value in (row.psnr_db, row.lowest_psnr_db)]
            figures = f"{row.full:>6}{row.steps:>7}{row.seconds:>10.3g}{decibels[0]:>9}{decibels[1]:>9}"
            lines.append(f"{row.name:24}{figures}")
        return "\n".join([*lines, self.remark])


def load_plan(path: str | Path) -> StepPlan:
    """Read a plan that `StepPlan.save` wrote.

    Raises:
        RecipeError: if there is none, or it is damaged or too new.
    """
    path = Path(path)
    try:
        values = section(parse_json(read_text(path)), "the file")
        version = entry(values, "format", int)
        if not 1 <= version <= FORMAT:
            raise RecipeError(f"{path} has format {version}, this version reads up to {FORMAT}; update vitfold")
        values = {field.name: values[field.name] for field in fields(StepPlan) if field.name in values}
        check_fields(StepPlan, values, "plan", {"runs": (1, 10**5), "steps": (1, 10**5)})
        plan = StepPlan(
            **{
                **values,
                "stacks": stacks_of(values["stacks"]),
                "full": tuple(values["full"]),
                "rows": tuple(tuple(row) for row in values.get("rows", ())),
                "held_out": tuple(Row(**check_fields(Row, row, "held_out", {})) for row in values["held_out"]),
            }
        )
    except (OSError, UnicodeDecodeError, ImplausibleError, TypeError, KeyError) as error:
        raise RecipeError(f"{path} is no plan of steps ({error}); make one by vitfold.plan_steps") from None
    fitting = not plan.rows or [i for i, row in enumerate(plan.rows) if not row] == sorted(plan.full)
    steps = set(range(plan.runs))
    if not fitting or not set(plan.full) <= steps or plan.position not in ("step", "time", "sigma"):
        raise RecipeError(
            f"{path} is damaged: its full steps are no steps of it, or not those without weights; make a new plan"
        )
    return plan


def stacks_of(values: Mapping[str, Any]) -> dict[str, Stack]:
    """Return stacks from plain values."""
    return {
        name: Stack(
            parts=tuple(
                Part(**{**check_fields(Part, part, name, {}), "streams": tuple(part["streams"])})
                for part in stack["parts"]
            )
        )
        for name, stack in values.items()
    }


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Return class and configuration of a scheduler as plain JSON values."""
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(config, default=str, sort_keys=True))
    return {"class": type(scheduler).__name__, "config": plain}


def weights_digest(transformers: Mapping[str, nn.Module]) -> str:
    """Return a digest of names, shapes and a sample of all weights, the same in float32 and bfloat16.

    Raises:
        UnsupportedError: if weights are not there.
    """
    total = hashlib.sha256()
    for name, transformer in sorted(transformers.items()):
        for key, weight in sorted(transformer.state_dict().items()):
            if weight.is_meta:
                raise UnsupportedError(
                    f"the weights of {name} are offloaded; plan and accelerate before enable_sequential_cpu_offload"
                )
            total.update(f"{name}.{key}{tuple(weight.shape)}".encode())
            flat = weight.detach().reshape(-1)
            picked = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu()
            picked = picked.to(torch.bfloat16) if picked.is_floating_point() else picked
            total.update(picked.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def guidance_of(arguments: Mapping[str, Any]) -> dict[str, float]:
    """Return those numbers of a call that guide it, by name; a plan belongs to them."""
    words = ("guidance", "cfg", "strength")
    return {
        name: float(value)
        for name, value in arguments.items()
        if any(word in name for word in words) and isinstance(value, int | float) and not isinstance(value, bool)
    }


def different(now: Mapping[str, Any], planned: Mapping[str, Any]) -> Sequence[str]:
    """Return in words which values of a call are not those of a plan."""
    names = sorted(set(now) | set(planned))
    return [
        f"{name} = {now.get(name)} (plan: {planned.get(name)})" for name in names if now.get(name) != planned.get(name)
    ]
