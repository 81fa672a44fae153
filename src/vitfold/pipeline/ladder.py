"""Accuracy of methods at several bit widths over several calibration seeds.

Rows are handed out one by one, so that the caller can keep them and an interrupted ladder goes on where it stopped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vitfold.bench.evaluation import run_over
from vitfold.bench.reference import Reference, compare_outputs, reference_outputs
from vitfold.engines import DEFAULT, Session
from vitfold.errors import VitfoldError
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.pipeline.calibration import calibrate_plan
from vitfold.pipeline.plan import Plan, optimize, registers_from_name
from vitfold.pipeline.verifying import open_written, simulation
from vitfold.pipeline.writing import write_graph
from vitfold.quant import Progress
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe, bits_from_scheme
from vitfold.target import TARGETS

_SIMULATION = TARGETS["simulation"].engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One accuracy: a method at a bit width with one calibration seed, one remedy and `polish` minutes of training."""

    method: str
    scheme: str
    seed: int
    engine: str
    registers: str = "none"
    polish: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, `registers` and minutes of `polish` only where there are some."""
        optional = {"registers": "none", "polish": 0.0}
        return {name: value for name, value in asdict(self).items() if optional.get(name) != value}


def cell_from_dict(row: Mapping[str, Any]) -> Cell:
    """Return the cell that a row belongs to."""
    return Cell(**{field.name: row.get(field.name, field.default) for field in fields(Cell)})


def plan_cells(
    methods: Sequence[str],
    schemes: Sequence[str],
    seeds: Sequence[int],
    *,
    both: Collection[str] = (),
    registers: Sequence[str] = ("none",),
    polish: Sequence[float] = (0.0,),
) -> list[Cell]:
    """Return the cells, seed by seed; what an engine executes runs there, for the methods in `both` simulated too."""
    cells = []
    for seed in seeds:
        for scheme in schemes:
            executable = bits_from_scheme(scheme)[1] == 8
            for method in methods:
                engines = [DEFAULT] if executable else [_SIMULATION]
                engines += [_SIMULATION] if executable and method in both else []
                cells += [
                    Cell(
                        method=method,
                        scheme=scheme.upper(),
                        seed=seed,
                        engine=engine,
                        registers=remedy,
                        polish=minutes,
                    )
                    for remedy in registers
                    for engine in engines
                    for minutes in polish
                ]
    return cells


def run_cells(
    model: Model,
    merge: MergeRecipe,
    cells: Sequence[Cell],
    images: ImageSet,
    calibration: ImageSet,
    *,
    size: int,
    batch: int = 4,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row per cell: the cell, its fidelity on `images`, or the error that stopped it."""
    digest = model.digest()
    told = progress or Progress()
    told.step("float model")
    expected = reference_outputs(digest, images, model.preprocess, lambda: Reference(model=model), advance=told.advance)
    for cell in cells:
        remedy = "" if cell.registers == "none" else f" with {cell.registers}"
        told.step(f"{cell.method} {cell.scheme}{remedy}, seed {cell.seed}")
        try:
            folded = _calibrated(model, merge, cell, calibration, size)
            with tempfile.TemporaryDirectory(prefix="vitfold-") as folder, _open(folded, cell, Path(folder)) as session:
                outputs = run_over(session, images, model.preprocess, batch=batch, advance=told.advance)
        except VitfoldError as error:
            yield {**cell.to_dict(), "fidelity": None, "error": str(error)}
            continue
        fidelity = compare_outputs(outputs, images, labels=model.labels, head=model.spec.head, reference=expected)
        yield {
            **cell.to_dict(),
            "fidelity": fidelity.to_dict(),
            "attention": bool(folded.recipe.quant and folded.recipe.quant.attention),
            **({} if cell.registers == "none" else {"registers_recipe": _registers(folded)}),
            **({"polished": (folded.calibration or {})["polish"]} if cell.polish else {}),
            "error": None,
        }


def _registers(folded: Plan) -> dict[str, Any] | None:
    """What a remedy was resolved to; None where "auto" found that nothing is worth doing."""
    return None if folded.recipe.registers is None else folded.recipe.registers.to_dict()


def _calibrated(model: Model, merge: MergeRecipe, cell: Cell, calibration: ImageSet, size: int) -> Plan:
    weights, activations = bits_from_scheme(cell.scheme)
    quant = QuantRecipe(
        weights=weights,
        activations=activations,
        method=cell.method,
        calibration_size=size,
        seed=cell.seed,
        polish_minutes=cell.polish,
    )
    registers = registers_from_name(cell.registers)
    folded = optimize(model, recipe=Recipe(merge=merge, quant=quant, registers=registers))
    return calibrate_plan(folded, calibration.sample(size, seed=cell.seed))


def _open(folded: Plan, cell: Cell, folder: Path) -> Session:
    if cell.engine == _SIMULATION:
        return simulation(folded)
    path = folder / "model.onnx"
    write_graph(folded, path)
    return open_written(folded, path)
