"""`vitfold sweep`: many recipes, one row each, resumable."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitfold.artifacts.journal import ROWS, alone
from vitfold.bench.environment import environment
from vitfold.bench.reference import Reference, reference_outputs
from vitfold.bench.timing import PROTOCOLS, Protocol
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import CalibrationArgs, ModelArgs
from vitfold.cli.making import given_images, judged_images, require_optimize, say_busy
from vitfold.cli.terminal import note, out, print_json, working
from vitfold.errors import RecipeError, VitfoldError, nearest
from vitfold.recipe import RULES
from vitfold.report.tables import sweep_table
from vitfold.storage.ordinary import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from vitfold.images import ImageSet
    from vitfold.model import Model
    from vitfold.pipeline.sweep import Sweep
    from vitfold.pipeline.trials import EvalContext, Trial


_WORDS = {"no": False, "yes": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepArgs:
    """What is swept over, by options or in a file; an option wins."""

    merge: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="Schedules, comma-separated: 0,2,4,8:-1; lists in --plan.")
    ] = None
    rules: Annotated[
        str | None, typer.Option(help="Merging rules, comma-separated: tome,nearest,greedy,tofu,pitome,evit.")
    ] = None
    compensate: Annotated[
        str | None, typer.Option(help="Weights refitted to the merging, comma-separated: no,yes.")
    ] = None
    quant: Annotated[str | None, typer.Option(help="Bits, comma-separated: none,w8a8.")] = None
    methods: Annotated[str | None, typer.Option(help="Methods of quantization, comma-separated.")] = None
    plan: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="A sweep in a file; see recipes/sweeps/.")] = (
        None
    )
    target: Annotated[str | None, typer.Option(help="As for optimize; default: cpu.")] = None
    protocol: Annotated[
        Literal["quick", "report"] | None, typer.Option(help="How every recipe is timed beside the float model.")
    ] = None
    batch: Annotated[int | None, typer.Option(min=1, help="Images per call, if not the protocol's.")] = None
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Calls per repetition, if not the protocol's; as many to warm up at most.")
    ] = None

    def timing(self, protocol: str) -> Protocol:
        """Return how every recipe is timed by a protocol, with what was asked otherwise."""
        from vitfold.pipeline.trial import SHORT

        timing = SHORT if protocol == "quick" else PROTOCOLS[protocol]
        if self.batch is not None:
            timing = replace(timing, batch=self.batch)
        if self.iterations is not None:
            timing = replace(timing, iterations=self.iterations, warmup=min(timing.warmup, self.iterations))
        return timing

    def chosen(self) -> dict[str, Any]:
        """Return what is swept over: options, else the plan's, else one recipe of each.

        Raises:
            RecipeError: if the plan is not TOML or has unknown keys.
        """
        values: dict[str, Any] = {
            "merge": ["0"],
            "rules": ["tome"],
            "compensate": ["no"],
            "quant": ["none"],
            "methods": ["vitfold"],
            "target": "cpu",
            "protocol": "quick",
        }
        if self.plan is not None:
            values |= _read_plan(self.plan, values)
        for key, value in values.items():
            given = getattr(self, key)
            if given is not None:
                values[key] = [part.strip() for part in given.split(",")] if isinstance(value, list) else given
        unknown = [rule for rule in values["rules"] if rule not in RULES]
        if unknown:
            raise RecipeError(f"no merging rule is called {unknown[0]!r}; {nearest(unknown[0], RULES)}")
        unknown = [word for word in values["compensate"] if word not in _WORDS]
        if unknown:
            raise RecipeError(f"compensate is no, yes or both, no,yes, found {unknown[0]!r}")
        return values


@command(
    shown="output images merge quant methods target json",
    examples=("vitfold sweep demo --merge 0,2,4 --quant none,w8a8 --images VAL -o sweep",),
)
def sweep(
    *,
    source: options.Source,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Rows and bundles; gone on with.")],
    images: options.NeededImages,
    over: SweepArgs,
    calibration_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Images to calibrate on; default: drawn from --images.")
    ] = None,
    drawing: CalibrationArgs,
    limit: options.Limit = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try recipes again that failed.")] = False,
    json: options.Json = False,
    loading: ModelArgs,
) -> None:
    """Make, evaluate and time every combination; an interrupted sweep goes on where it was, by the same command."""
    chosen = over.chosen()
    require_optimize()
    from vitfold.pipeline.sweep import begin_sweep, run_sweep

    found = given_images(images)
    drawn = None if calibration_images is None else given_images(calibration_images)
    with ExitStack() as stack, working("sweep") as (say, _):
        model = loading.load(source, say)
        found = judged_images(found, model.spec, model.labels)
        attempts = sweep_of(chosen).attempts(model.spec)
        refitting = _refitting(drawn) if any(attempt.compensate for attempt in attempts) else None
        calibration, reported = divided(found, drawn, drawing.calibration_size, drawing.calibration_seed)
        reported = reported if limit is None else reported.first(limit)
        head = {
            "source": source,
            "weights": loading.weights,
            "model_digest": model.digest(),
            "images_digest": reported.digest(),
            "calibration_digest": calibration.digest(),
            **asdict(drawing),
            "target": chosen["target"],
            "protocol": chosen["protocol"],
            "batch": over.batch,
            "iterations": over.iterations,
        }
        beside = {"environment": environment()}
        begin_sweep(output, head, beside)
        stack.enter_context(alone(output / ROWS))
        rows = begin_sweep(output, head, beside)
        again = partial(_command, source, images, calibration_images, drawing, loading.words())
        trying = partial(_trying, model, calibration, refitting, reported, head, over.timing(chosen["protocol"]), say)
        for row in run_sweep(output, attempts, rows, trying, retry=retry, command=again, say=say):
            rows.append(row)
    latest = {row["recipe"]: row for row in rows}
    result = [latest[attempt.name] for attempt in attempts if attempt.name in latest]
    say_busy(beside["environment"])
    if json:
        print_json({**head, **beside, "rows": result})
        return
    out.print(sweep_table(result))
    for row in result:
        if row["error"] is not None:
            note(f"{row['recipe']}: {row['error']}")
    note(f"rows and bundles: {output}; a page of them: vitfold report {output} -o report.html")


def sweep_of(chosen: Mapping[str, Any]) -> Sweep:
    """Return what is tried of what was chosen."""
    from vitfold.pipeline.sweep import Sweep

    return Sweep(
        merges=tuple(chosen["merge"]),
        rules=tuple(chosen["rules"]),
        compensate=tuple(_WORDS[word] for word in chosen["compensate"]),
        quants=tuple(chosen["quant"]),
        methods=tuple(chosen["methods"]),
        target=chosen["target"],
    )


def divided(images: ImageSet, calibration: ImageSet | None, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return the images to calibrate on and those to report on, which none calibrates on.

    Raises:
        VitfoldError: if too few are left to report on.
    """
    if calibration is not None:
        return calibration, images
    chosen = images.sample(size, seed=seed)
    others = images.without(chosen)
    if others is None or len(others.paths) < len(chosen.paths):
        raise VitfoldError(
            f"{images.root} has {len(images.paths)} images: with {len(chosen.paths)} for calibration too few are left "
            "to report on; give more images, a smaller --calibration-size, or --calibration-images DIR"
        )
    return chosen, others


def _refitting(calibration: ImageSet | None) -> ImageSet:
    """Return the images that weights are refitted on.

    Raises:
        VitfoldError: if there are none, or too few.
    """
    from vitfold.compensation import LEAST_IMAGES
    from vitfold.pipeline.search import enough_for_refitting

    found = None if calibration is None else enough_for_refitting(calibration)
    if found is None:
        raise VitfoldError(
            f"refitting weights takes images that nothing is reported on: give at least {LEAST_IMAGES}, better 2000, "
            "by --calibration-images DIR, or leave --compensate yes out"
        )
    return found


def _trying(
    model: Model,
    calibration: ImageSet,
    refitting: ImageSet | None,
    images: ImageSet,
    head: Mapping[str, Any],
    protocol: Protocol,
    say: Any,
) -> EvalContext:
    from vitfold.pipeline.trials import EvalContext

    say("running the float model over the images, once")
    expected = reference_outputs(head["model_digest"], images, model.preprocess, lambda: Reference(model=model))
    return EvalContext(
        model=model,
        calibration=calibration,
        calibration_size=head["calibration_size"],
        calibration_seed=head["calibration_seed"],
        images=images,
        expected=expected,
        protocol=protocol,
        refitting=refitting,
    )


def _read_plan(path: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file says of the known keys, each a list or a text as it is there."""
    try:
        read = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the sweep {path}: {error}; see recipes/sweeps/ for examples") from None
    for key, value in read.items():
        if key not in known:
            raise RecipeError(f"{path}: unknown key {key}; {nearest(key, tuple(known))}")
        if isinstance(value, list) != isinstance(known[key], list):
            raise RecipeError(f"{path}: {key} must be {'a list' if isinstance(known[key], list) else 'text'}")
        read[key] = [str(part) for part in value] if isinstance(value, list) else value
    if read.get("protocol", "quick") not in ("quick", "report"):
        raise RecipeError(f"{path}: protocol is quick or report, found {read['protocol']!r}")
    return read


def _command(
    source: str,
    images: Path,
    calibration_images: Path | None,
    drawing: CalibrationArgs,
    given: list[str],
    attempt: Trial,
) -> str:
    """Return the command that makes one bundle of the sweep again."""
    words = ["vitfold", "optimize", source, "--merge", ",".join(map(str, attempt.r)), "--target", attempt.target]
    words += ["--merge-rule", attempt.rule] if attempt.rule != "tome" else []
    words += given
    if attempt.compensate:
        words += ["--compensate", "--images", str(images), "--calibration-images", str(calibration_images)]
    elif attempt.method is not None:
        words += ["--images", str(calibration_images or images)]
    if attempt.method is not None:
        words += ["--quant", attempt.quant, "--method", attempt.method]
        size, seed = str(drawing.calibration_size), str(drawing.calibration_seed)
        words += ["--calibration-size", size, "--calibration-seed", seed, "--keep-slower"]
    return shlex.join([*words, "-o", f"{attempt.name}.fold"])
