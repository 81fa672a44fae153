"""Groups of options that several commands take, as frozen dataclasses: one field per option."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import typer

from vitfold.cli import options
from vitfold.cli.terminal import note, print_json, quiet_stdout, write_json
from vitfold.errors import RecipeError
from vitfold.progress import Say
from vitfold.sources import load_source

if TYPE_CHECKING:
    from vitfold.model import Model


def refuse(*mistakes: tuple[bool, str, str]) -> None:
    """Leave with a usage error at the first mistake: (whether it was made, what to do, the option)."""
    for made, message, hint in mistakes:
        if made:
            raise typer.BadParameter(message, param_hint=hint)


def listed(text: str | None) -> list[str]:
    """Return the words of a list separated by commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def numbers_of(text: str) -> list[int]:
    """Return the lengths of "176:196" or "176,184,192".

    Raises:
        RecipeError: if it is neither.
    """
    first, between, last = text.partition(":")
    try:
        if between:
            return list(range(int(first), int(last) + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--lengths takes A:B, as 176:196, or numbers, as 176,184,192; found {text!r}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """How a source is loaded, and how its images are read."""

    arch: options.Arch = None
    num_classes: options.NumClasses = None
    image_size: options.ImageSize = None
    problem: options.Problem = None
    preprocess: options.Preprocessing = None
    outputs: options.Outputs = None
    part: options.Part = None
    weights: options.Weights = "pretrained"
    seed: options.Seed = 0
    exif: options.Exif = None

    def load(self, source: str, say: Say) -> Model:
        """Load a model; what its zoo prints goes to stderr."""
        say(f"loading {source}")
        how = {name: value for name, value in asdict(self).items() if name != "exif"}
        with quiet_stdout():
            model = load_source(source, **how).model
        return model if self.exif is None else replace(model, preprocess=replace(model.preprocess, exif=self.exif))

    def words(self) -> list[str]:
        """Return the options that say the same on a command line."""
        usual = ModelArgs()
        given = {name: value for name, value in asdict(self).items() if value != getattr(usual, name)}
        return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationArgs:
    """How many images ranges are taken from, and the seed that draws them."""

    calibration_size: options.CalibrationSize = 128
    calibration_seed: options.CalibrationSeed = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArgs:
    """What runs a bundle."""

    engine: options.Engine = None
    threads: options.Threads = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonArgs:
    """Where the document of a command goes."""

    output: options.JsonFile = None
    json: options.Json = False

    def say(self, what: str) -> None:
        """Name the file that the document will be in, if there is one."""
        if self.output is not None:
            note(f"{what}: {self.output}")

    def write(self, document: Any) -> bool:
        """Write the document to its file, and print it where JSON is wanted; say whether it was printed."""
        if self.output is not None:
            write_json(self.output, document)
        if self.json:
            print_json(document)
        return self.json


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeArgs:
    """What is done to a model, for which engine."""

    merge: options.Merge = None
    merge_rule: options.MergeRule = "tome"
    compensate: options.Compensate = False
    prune: options.Prune = None
    prune_mlp: options.PruneMlp = None
    quant: options.Quant = None
    method: options.Method = None
    calibrate_merged: options.CalibrateMerged = False
    polish: options.Polish = 0.0
    registers: options.Registers = None
    keep_float: options.KeepFloat = 0
    target: options.Target = None
    recipe: options.RecipeFile = None
    repeat: options.Repeat = None
    keep_slower: options.KeepSlower = False
    batch: options.Batches = None
    gpu: options.Gpu = "A100"

    @property
    def chosen(self) -> bool:
        """Whether an option names a part of the recipe."""
        named = (self.merge, self.quant, self.method, self.registers, self.prune, self.prune_mlp)
        return any(one is not None for one in named)

    @property
    def base(self) -> str:
        """The target that a graph is written for before any race."""
        return "cpu" if self.target in (None, "fastest") else str(self.target)

    def batches(self) -> tuple[int, int, int] | None:
        """Read MIN,OPT,MAX, or one batch for all three."""
        text = self.batch
        if text is None:
            return None
        parts = text.split(",")
        if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
            raise typer.BadParameter(f"{text!r} is not MIN,OPT,MAX, as 1,8,64", param_hint="--batch")
        least, usual, most = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
        if not 1 <= least <= usual <= most:
            raise typer.BadParameter(f"{text!r} does not rise from MIN to MAX", param_hint="--batch")
        return least, usual, most


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchArgs:
    """The bound of a search, and its time."""

    max_drop: options.MaxDrop = None
    max_latency_ms: options.MaxLatency = None
    search_minutes: options.SearchMinutes = 20.0

    def __bool__(self) -> bool:
        """Whether there is a bound, and so a search."""
        return self.max_drop is not None or self.max_latency_ms is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArgs:
    """How a diffusion model steps; None takes what a bundle was made with, or the default."""

    steps: options.StepCount = None
    sampler: options.Sampler = None
    guidance: options.Guidance = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeArgs:
    """Real images, and whose features tell drawn images from them."""

    real: options.Real = None
    features: options.Features = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSearchArgs:
    """How the steps of a diffusion model are reused and compressed, or within what bounds that is searched."""

    reuse: options.Reuse = "auto"
    merge: options.StepMerge = None
    quant: options.StepQuant = None
    method: options.StepMethod = None
    min_psnr: options.MinPsnr = None
    max_psnr_drop: options.MaxPsnrDrop = None
    max_fid_rise: options.MaxFidRise = None
    samples: options.Samples = None
    search_minutes: options.SearchMinutes = 20.0
    heads: options.Heads = None
