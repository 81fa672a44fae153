"""What is to be drawn, as options say it, and drawn images on the way out: decoded, described as JSON, written.

Shared by the commands that draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.digested import MANIFEST, read_header
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.terminal import note, write_json
from vitfold.errors import RecipeError, SourceError, VitfoldError, nearest
from vitfold.model.schedule import own_sampler
from vitfold.sources import load_source
from vitfold.sources.dit import REAL, judge_folder

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle
    from vitfold.artifacts.steps import DiffusionModelInfo, SamplingPlan
    from vitfold.diffusion import ReuseMethod
    from vitfold.diffusion.compare import SamplerRow, SamplingConfig
    from vitfold.diffusion.conditions import Conditions, Prompts
    from vitfold.diffusion.judge import Judge
    from vitfold.model import Array

STEPS, GUIDANCE = 50, 1.5  # the guidance by which the paper measures DiT-XL


Embeddings = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts for a bundle of a pipeline's steps, as diffusion embed writes them; --classes are their numbers.",
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingArgs:
    """What options ask for; None takes what a bundle was made with, or the default."""

    classes: Annotated[
        str, typer.Option(metavar="C,C,...", help="One image per class, by number or name; all for every class.")
    ] = "0"
    count: Annotated[
        int | None, typer.Option(min=1, help="So many images in all, the classes repeated; default: one each.")
    ] = None
    steps: options.StepCount = None
    sampler: options.Sampler = None
    guidance: options.Guidance = None
    seed: Annotated[int, typer.Option(help="Image i is drawn from seed + i.")] = 0
    batch: Annotated[int, typer.Option("--batch", help="Images drawn at once.")] = 8
    threads: options.Threads = None
    trials: Annotated[int, typer.Option(min=1, help="Times that every way of sampling is timed, in turn.")] = 3
    latents: Annotated[
        bool,
        typer.Option("--latents", help="Write latents (latents.npz) instead of images, for models without their VAE."),
    ] = False

    embeddings: Embeddings = None

    def asked(self, model: DiffusionModelInfo, plan: SamplingPlan | None = None) -> SamplingConfig:
        """Return it for a model, or for a bundle of its steps.

        Raises:
            SourceError: if a class has no such name.
            RecipeError: if a number is out of range, or a plan was chosen for another sampler.
        """
        from vitfold.diffusion.compare import SamplingConfig

        conditions = self._conditions(model)
        return SamplingConfig(
            labels=read_classes(self.classes, self.count, model, conditions),
            conditions=conditions,
            seed=self.seed,
            steps=self.steps if self.steps is not None else (STEPS if plan is None else plan.steps),
            sampler=self._sampler(model, plan),
            guidance=self.guidance if self.guidance is not None else (GUIDANCE if plan is None else plan.guidance),
            batch=self.batch,
        )

    def _conditions(self, model: DiffusionModelInfo) -> Prompts | None:
        from vitfold.diffusion.conditions import load_prompts
        from vitfold.model import DenoiserSpec

        if self.embeddings is None:
            return None
        if not isinstance(model.spec, DenoiserSpec):
            raise RecipeError(f"{model.origin.source} draws by classes; leave out --embeddings")
        return load_prompts(self.embeddings, model.spec)

    def _sampler(self, model: DiffusionModelInfo, plan: SamplingPlan | None) -> str:
        """The sampler asked for, else the bundle's, else the folder's own; say where that one is replaced."""
        from vitfold.diffusion import find_method

        if plan is not None:
            if self.sampler is not None and self.sampler != plan.sampler and not find_method(plan.reuse).reuses:
                return self.sampler
            if self.sampler not in (None, plan.sampler):
                raise RecipeError(
                    f"the plan of this bundle ({plan.reuse}) was chosen for the sampler {plan.sampler}, not for "
                    f"{self.sampler}; leave out --sampler, or make a bundle with: vitfold diffusion optimize "
                    f"{model.origin.source} --reuse {plan.reuse} --sampler {self.sampler} -o OUT.fold"
                )
            return plan.sampler
        if self.sampler is not None:
            return self.sampler
        own = own_sampler(model.schedule)
        if own.replaced is not None:
            note(f"the folder's {own.replaced} is replaced by {own.name}; choose another one with --sampler")
        return own.name

    def decoder(self, model: DiffusionModelInfo, bundle: Bundle | None = None) -> Callable[[Array], Array] | None:
        """Return what makes images in [0, 1] of samples, None where latents are wanted.

        A bundle decodes by its own graph where it has one.

        Raises:
            SourceError: if the model makes latents, and its VAE is not there.
            EngineError: if ONNX Runtime refuses the graph.
        """
        from vitfold.diffusion.decoding import in_unit_range, load_decoder, open_decoder

        if self.latents:
            return None
        if not model.latent:
            return in_unit_range
        if bundle is not None:
            return open_decoder(bundle, threads=self.threads)
        return load_decoder(model.decoder, model.origin.source)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """What was drawn, and the document about it."""

    model: DiffusionModelInfo
    asked: SamplingConfig
    rows: Sequence[SamplerRow]
    decode: Callable[[Array], Array] | None
    document: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the JSON, and the images with their sheet; latents where nothing decodes them.

        Raises:
            VitfoldError: if the folder cannot be written.
        """
        import numpy as np

        from vitfold.report.sheet import write_images

        write_json(folder / "diffuse.json", self.document)
        if self.decode is None:
            held: dict[str, Any] = {row.name: row.sampled.samples for row in self.rows}
            try:
                np.savez(folder / "latents.npz", **held)
            except OSError as error:
                raise VitfoldError(f"cannot write {folder}: {error}; choose another folder") from None
            return
        names = self.model.labels
        kind = "class" if self.asked.conditions is None else "prompt"
        words = [names[label] if names else f"{kind}-{label}" for label in self.asked.labels]
        write_images(folder, {row.name: self.decode(row.sampled.samples) for row in self.rows}, words)


def read_classes(
    words: str, count: int | None, model: DiffusionModelInfo, conditions: Conditions | None = None
) -> tuple[int, ...]:
    """Return one class or prompt per image: numbers or names separated by commas, or `all`; repeated up to `count`.

    Raises:
        SourceError: if a word is neither a number nor one of the model's labels.
    """
    from vitfold.diffusion.sampling import conditions_of

    labels, count_of = model.labels or (), (conditions or conditions_of(model.spec)).count
    found: list[int] = []
    for word in (word.strip() for word in words.split(",")):
        if word == "all":
            found += range(count_of)
        elif word.isdecimal():
            found.append(int(word))
        elif word in labels:
            found.append(labels.index(word))
        else:
            cure = nearest(word, labels) if labels else "this model has no names for its classes"
            raise SourceError(f"--classes are numbers, names or all, found {word!r}; {cure}")
    return tuple(found[i % len(found)] for i in range(count)) if count is not None else tuple(found)


def default_judge(source: str, features: str | None, real: Path | None) -> tuple[str | None, Path | None]:
    """Return whose features are taken and of which real images; what isn't given is the judge's beside the weights."""
    if (Path(source) / MANIFEST).is_file():
        source = str(read_header(Path(source)).values.get("origin", {}).get("source"))
    folder = judge_folder(source)
    if folder is None:
        return features, real
    return features or f"timm:local-dir:{folder}", real or folder / REAL


def open_features(source: str, real: Path, say: Callable[[str], None]) -> Judge:
    """Return what judges images by the features of a vision transformer.

    Raises:
        SourceError: if the model cannot be loaded.
        ImageError: if there are too few real images, or one cannot be read.
    """
    from vitfold.diffusion.judge import open_judge

    say(f"features of real images by {source}")
    return open_judge(load_source(source).model, real)


def draw_bundles(
    paths: Sequence[Path],
    asking: SamplingArgs,
    judge: Judge | None,
    features: str | None,
    say: Callable[[str], None],
    peers: Sequence[str] = (),
) -> Drawing:
    """Draw by bundles of steps, in turn.

    Raises:
        BundleError: if one cannot be opened, or they are not of one model.
    """
    from vitfold.diffusion.bench import bench_steps

    before = environment()
    bundles = [open_bundle(path, steps=True) for path in paths]
    first = bundles[0].manifest.steps
    decode, asked = asking.decoder(first, bundles[0]), asking.asked(first, first.plan)
    rows = bench_steps(
        bundles,
        asked,
        threads=asking.threads,
        trials=asking.trials,
        decode=decode,
        judge=judge,
        peers=peers,
        say=say,
    )
    plan = bundles[-1].manifest.steps.plan
    compression = {key: getattr(plan, key) for key in ("merge", "quant", "method")}
    found = document(first, asked, rows, compression, features=features, chosen=None, before=before)
    found["bundles"] = {
        bundle.name: {"digest": bundle.digest, **bundle.manifest.steps.plan.to_dict()} for bundle in bundles
    }
    return Drawing(model=first, asked=asked, rows=rows, decode=decode, document=found)


def document(
    model: DiffusionModelInfo,
    asked: SamplingConfig,
    rows: Sequence[SamplerRow],
    compression: Mapping[str, Any],
    *,
    features: str | None,
    chosen: ReuseMethod | None,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what was asked for and what was measured, as plain JSON values; `before` is the environment before it."""
    return {
        "source": model.origin.source,
        "classes": list(asked.labels),
        "seed": asked.seed,
        "steps": asked.steps,
        "sampler": asked.sampler,
        "guidance": asked.guidance,
        "batch": asked.batch,
        **compression,
        "features": _shown_features(model.origin.source, features),
        "engine": rows[0].measurement.engine,
        "chosen": None if chosen is None else chosen.text,
        "environment": dict(before),
        "rows": [row.to_dict() for row in rows],
        "measurements": [row.measurement.to_dict() for row in rows],
    }


def _shown_features(source: str, features: str | None) -> str | None:
    """Name the judge beside the weights by them: its folder is another one on every machine."""
    own, _ = default_judge(source, None, None)
    return f"{source}/judge" if features is not None and features == own else features
