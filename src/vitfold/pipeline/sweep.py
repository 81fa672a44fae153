"""Many recipes of one model, a row each, in a folder that an interrupted sweep goes on in.

The folder: `sweep.json` says what is swept over, `rows.jsonl` holds the rows, bundles lie beside.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.artifacts.journal import HEAD, ROWS, append_row, read_rows
from vitfold.errors import BundleError, JournalError, RecipeError, VitfoldError
from vitfold.model import Architecture
from vitfold.pipeline.plan import optimize
from vitfold.pipeline.trials import CHECKED_IMAGES, EvalContext, Trial, failed_row, measure_attempt
from vitfold.pipeline.writing import save
from vitfold.progress import Say
from vitfold.recipe import quant_from_scheme
from vitfold.schedule import resolve_r
from vitfold.storage.ordinary import read_text, write_whole

PLAIN = "float.fold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is tried: every schedule by every rule with every quantization and, where it quantizes, every method.

    What merges is tried plain, with its weights refitted to that, or both, as `compensate` says.
    """

    merges: tuple[str, ...]
    rules: tuple[str, ...] = ("tome",)
    compensate: tuple[bool, ...] = (False,)
    quants: tuple[str, ...] = ("none",)
    methods: tuple[str, ...] = ("vitfold",)
    target: str = "cpu"

    def attempts(self, spec: Architecture) -> list[Trial]:
        """Return one attempt per recipe, named by what it does.

        Raises:
            RecipeError: on a schedule, bits or a method that is not understood, and if one is given twice.
        """
        from vitfold.quant import find_method

        for name in self.methods:
            find_method(name)
        found = []
        for merge in self.merges:
            r = resolve_r(merge, spec)
            ways = product(self.rules, self.compensate) if any(r) else (("tome", False),)
            for (rule, mended), quant in product(ways, self.quants):
                quantizes = quant_from_scheme(quant.lower()) is not None
                methods: tuple[str | None, ...] = self.methods if quantizes else (None,)
                found += [
                    Trial(
                        name=attempt_name(merge, quant.lower(), method, rule, compensate=mended),
                        r=r,
                        rule=rule,
                        compensate=mended,
                        quant=quant.lower(),
                        method=method,
                        target=self.target,
                    )
                    for method in methods
                ]
        names = [attempt.name for attempt in found]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise RecipeError(f"the sweep has {', '.join(twice)} twice; give each schedule, bits and method once")
        return found


def begin_sweep(folder: Path, head: Mapping[str, Any], beside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make the folder of a sweep, or go on in it; return the rows that it has.

    `head` has to be the same when it goes on; `beside` is kept with it and does not have to.

    Raises:
        JournalError: if the folder holds something else, or a sweep over something else.
    """
    path = folder / HEAD
    if path.exists():
        try:
            before = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise JournalError(f"cannot read {path}: {error}; give another folder") from None
        if not isinstance(before, dict):
            raise JournalError(f"{path} does not say what was swept over; give another folder")
        other = [key for key, value in head.items() if before.get(key) != value]
        if other:
            raise JournalError(
                f"{folder} holds a sweep with another {', '.join(other)} ({other[0]} was {before.get(other[0])!r}, is "
                f"{head[other[0]]!r}); give another folder"
            )
        return read_rows(folder / ROWS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(entry.name != f".{HEAD}.partial" for entry in folder.iterdir()):
            raise JournalError(f"{folder} is not empty and holds no sweep; give another folder")
        write_whole(path, (json.dumps({**head, **beside}, indent=1) + "\n").encode())
    except OSError as error:
        raise JournalError(f"cannot write {folder}: {error}; choose another folder") from None
    return []


def run_sweep(
    folder: Path,
    attempts: Sequence[Trial],
    rows: Sequence[Mapping[str, Any]],
    trying: Callable[[], EvalContext],
    *,
    retry: bool = False,
    command: Callable[[Trial], str],
    say: Say = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Yield the row of every attempt that has none yet, after it was appended to the folder's rows.

    An attempt that failed keeps its row, unless `retry`. `trying` is called only if something is left to do.
    """
    done = {row["recipe"] for row in rows if not (retry and row["error"] is not None)}
    left = [attempt for attempt in attempts if attempt.name not in done]
    if not left:
        return
    shared = trying()
    plain = plain_bundle(folder / PLAIN, shared, say=say)
    for index, attempt in enumerate(left, start=len(attempts) - len(left) + 1):

        def named(step: str, index: int = index, name: str = attempt.name) -> None:
            say(f"{name} ({index} of {len(attempts)}): {step}")

        try:
            row = measure_attempt(attempt, shared, folder, plain, rows=rows, say=named)
        except VitfoldError as error:
            row = failed_row(attempt, error)
        row["commands"] = [command(attempt)]
        append_row(folder / ROWS, row)
        rows = [*rows, row]
        yield row


def plain_bundle(path: Path, trying: EvalContext, *, say: Say = lambda _: None) -> Bundle:
    """Return the float bundle that merges nothing, made anew unless an earlier run left it whole."""
    try:
        found = open_bundle(path)
        if found.manifest.model_digest == trying.model.digest():
            return found
    except BundleError:
        pass
    say("float model: writing")
    return save(optimize(trying.model), path, images=trying.images.first(CHECKED_IMAGES), overwrite=True)


def attempt_name(merge: str, quant: str, method: str | None, rule: str = "tome", *, compensate: bool = False) -> str:
    """Return a short name of a recipe that is also one for a file: r4-w8a8, r8~-1-pitome-w8a8-ptq4vit, align."""
    text = merge.strip().lower().replace(",", "_").replace(":", "~").replace(" ", "")
    parts = ["r0" if text == "none" else text if text == "align" else f"r{text}"]
    parts += [rule] if rule != "tome" else []
    parts += ["compensated"] if compensate else []
    if method is not None:
        parts += [quant] if method == "vitfold" else [quant, method]
    return "-".join(parts)
