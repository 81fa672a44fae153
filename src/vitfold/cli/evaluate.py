"""`vitfold evaluate`: accuracy with labels, agreement and cosine with the unfolded model without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from vitfold.artifacts.bundle import open_bundle
from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import run_over
from vitfold.bench.per_class import ChangedRow, ClassRow, changed, per_class
from vitfold.bench.reference import compare_outputs, optional_reference, reference_outputs
from vitfold.bench.zero_shot import SUFFIXES, check_embeds, read_embeds, zero_shot
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import RunArgs, refuse
from vitfold.cli.making import given_images, judged_images, turned
from vitfold.cli.retrieving import RetrievalArgs, print_retrieval
from vitfold.cli.terminal import counting, heading, note, out, print_json
from vitfold.engines import open_session
from vitfold.errors import GateError, VitfoldError
from vitfold.report.tables import fidelity_lines
from vitfold.storage.ordinary import read_text

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle, Manifest
    from vitfold.bench.evaluation import Outputs
    from vitfold.bench.fidelity import Fidelity
    from vitfold.images import ImageSet
    from vitfold.model import Architecture, Array

DENSE_IMAGES = 256
SHOWN_CHANGES = 20
_WORDS = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine", "sqnr_db": "SQNR (dB)"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextArgs:
    """Texts that name the classes of embeddings."""

    texts: Annotated[
        str | None,
        typer.Option(
            "--zero-shot",
            metavar="TEXTS",
            help="Classify embeddings by the nearest text: open_clip:ARCH/TAG or hf:REPO_OR_FOLDER, whose text tower "
            "embeds the class names once, or a .npy or .safetensors file (classes, width).",
        ),
    ] = None
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One name a line, in the order of class folders; default: their names."),
    ] = None
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt with {} for the name; several are averaged.")
    ] = None

    def __post_init__(self) -> None:
        alone = self.texts is None and (self.class_names is not None or bool(self.template))
        refuse((alone, "--class-names and --template need --zero-shot TEXTS", "--zero-shot"))

    def embeds(self, images: ImageSet, spec: Architecture) -> Array | None:
        """Return one text embedding per class folder, (C, D), where texts are given.

        Raises:
            VitfoldError: if images, names, texts and model do not fit each other.
        """
        if self.texts is None:
            return None
        if images.classes is None:
            raise VitfoldError("--zero-shot needs one sub-folder of --images per class")
        if spec.output != "image_embeds":
            raise VitfoldError(f"--zero-shot classifies image embeddings, and this model's output is {spec.output}")
        if Path(self.texts).suffix in SUFFIXES:
            if self.class_names is not None or self.template:
                raise VitfoldError(f"{self.texts} holds embeddings already; leave --class-names and --template out")
            embeds = read_embeds(Path(self.texts))
        else:
            from vitfold.sources.text_towers import TEMPLATE, text_embeds

            names = _class_names(self.class_names, images.classes)
            note(f"embedding {len(names)} class names by {self.texts}, once")
            embeds = text_embeds(self.texts, names, self.template or (TEMPLATE,))
        check_embeds(embeds, classes=len(images.classes), width=spec.output_width, name=self.texts)
        return embeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Bounds on what is measured."""

    min_top1: Annotated[float | None, typer.Option(min=0, max=1, help="Exit with 3 if top-1 is lower.")] = None
    min_agreement: options.MinAgreement = None
    min_cosine: Annotated[float | None, typer.Option(min=-1, max=1, help="Exit with 3 if cosine is lower.")] = None
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Exit with 3 if the SQNR of outputs is lower, in decibels.")
    ] = None
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with 3 if the mean difference of probabilities (several labels), or the relative error of a "
            "regression, is higher.",
        ),
    ] = None

    @property
    def needs_reference(self) -> bool:
        """Whether a bound is on something that is measured beside the unfolded model."""
        bounds = (self.min_agreement, self.min_cosine, self.min_sqnr, self.max_error)
        return any(bound is not None for bound in bounds)

    def check(self, fidelity: Fidelity) -> None:
        """Check figures against their bounds.

        Raises:
            GateError: at the first that misses its bound, or was not measured.
        """
        least = {
            "top1": self.min_top1,
            "agreement": self.min_agreement,
            "cosine": self.min_cosine,
            "sqnr_db": self.min_sqnr,
        }
        for name, bound in least.items():
            value = getattr(fidelity, name)
            if bound is None or (value is not None and value >= bound):
                continue
            if name == "sqnr_db" and value is None and fidelity.reference is not None:
                continue  # outputs are equal
            shown = "not measured" if value is None else f"{value:.4f}"
            raise GateError(f"{_WORDS[name]} is {shown}, the bound is {bound}")
        if self.max_error is None:
            return
        error = fidelity.relative_error if fidelity.probability_error is None else fidelity.probability_error
        if error is None:
            raise GateError(
                "--max-error bounds the difference of probabilities or of a regression's numbers, and this model gives "
                "neither; bound --min-agreement or --min-cosine"
            )
        if error > self.max_error:
            raise GateError(f"the error is {error:.4f}, the bound is {self.max_error}")


@command(
    shown="images engine min_top1 min_agreement texts json",
    examples=("vitfold evaluate vit.fold --images VAL --min-top1 0.8",),
)
def evaluate(
    *,
    bundle: options.BundlePath,
    images: options.NeededImages,
    batch: options.Batch = 8,
    limit: options.Limit = None,
    skip_bad: options.SkipBad = False,
    reference: options.ReferenceBundle = None,
    run: RunArgs,
    naming: TextArgs,
    retrieving: RetrievalArgs,
    gates: Gates,
    by_class: Annotated[bool, typer.Option("--per-class", help="Also say it of each class folder by itself.")] = False,
    only_changed: Annotated[
        bool, typer.Option("--changed", help="Also list the images whose label is not that of the unfolded model.")
    ] = False,
    exif: options.Exif = None,
    json: options.Json = False,
) -> None:
    """Run a bundle over a folder and say how accurate and how faithful it is."""
    opened = turned(open_bundle(bundle), exif)
    given = None if reference is None else open_bundle(reference)
    manifest = opened.manifest
    head = manifest.spec.head
    if not manifest.has_trained_weights:
        note("random weights: these figures say nothing about accuracy, since outputs hardly depend on the image")
    chosen = _chosen(given_images(images), limit, manifest)
    if by_class and (chosen.classes is None or head != "single_label"):
        raise VitfoldError("--per-class needs a classifier, and one sub-folder of --images per class")
    if only_changed and head != "single_label":
        raise VitfoldError("--changed needs a classifier of one label per image")
    embeds = naming.embeds(chosen, manifest.spec)
    chosen, asked = retrieving.asked(chosen, manifest.spec, whole=limit is None and not skip_bad)
    with (
        open_session(opened, engine=run.engine, threads=run.threads) as session,
        counting("evaluate", len(chosen.paths)) as advance,
    ):
        outputs = run_over(session, chosen, manifest.preprocess, batch=batch, skip_bad=skip_bad, advance=advance)
        ran_on = session.engine
    try:
        expected = _expected(opened, given, chosen, skip_bad=skip_bad)
    except VitfoldError as error:
        labelled = chosen.classes is not None or asked is not None
        if not labelled or given is not None or gates.needs_reference or only_changed:
            raise
        note(f"agreement and cosine are not measured: {error}")
        expected = None
    fidelity = compare_outputs(outputs, chosen, labels=manifest.labels, head=head, reference=expected)
    unfolded: float | None = None
    if embeds is not None:
        fidelity, unfolded = _classified(fidelity, outputs, expected, chosen, embeds)
    rows = per_class(outputs, chosen, labels=manifest.labels, reference=expected) if by_class else []
    moved: list[ChangedRow] = []
    if only_changed and expected is not None:
        moved = changed(outputs, chosen, labels=manifest.labels, reference=expected)
    _note_skipped(outputs)
    retrieved = {} if asked is None else {"retrieval": asked.measure(outputs, expected)}
    if json:
        zero_shot = {} if embeds is None else {"zero_shot": {"texts": naming.texts, "unfolded_top1": unfolded}}
        classes = {"classes": [asdict(row) for row in rows]} if by_class else {}
        changes = {"changed": [asdict(row) for row in moved]} if only_changed else {}
        said = {**fidelity.to_dict(), **zero_shot, **classes, **changes, **retrieved}
        print_json({**said, "engine": ran_on, "skipped": list(outputs.skipped)})
    else:
        heading(opened.name, f" on {fidelity.images} images of {chosen.root}")
        for name, shown in [("engine", ran_on), *fidelity_lines(fidelity.to_dict(), head=head, unfolded=unfolded)]:
            out.print(f"  {name:10} {shown}")
        if asked is not None:
            print_retrieval(retrieved["retrieval"])
        if rows:
            _print_classes(rows)
        if only_changed:
            _print_changes(moved)
    gates.check(fidelity)


def _note_skipped(outputs: Outputs) -> None:
    """Say which images could not be read."""
    if outputs.skipped:
        note(f"skipped {len(outputs.skipped)} unreadable images:")
        for one in outputs.skipped[:10]:
            note(f"  {one}")


def _print_classes(rows: Sequence[ClassRow]) -> None:
    """Print a line for each class, the one that lost most first."""
    table = Table(pad_edge=False)
    for name in ("class", "images", "top-1", "unfolded", "agreement"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in sorted(rows, key=lambda one: (one.top1 - (one.reference_top1 or 0), one.name)):
        shares = (row.top1, row.reference_top1, row.agreement)
        table.add_row(row.name, str(row.images), *("-" if one is None else f"{one:.2%}" for one in shares))
    out.print(table)


def _print_changes(rows: Sequence[ChangedRow]) -> None:
    """Print the images whose label changed, the first of many; all are in --json."""
    out.print(f"  {len(rows)} labels changed")
    if not rows:
        return
    table = Table(pad_edge=False)
    for name in ("image", "folder", "original", "now"):
        table.add_column(name)
    for row in rows[:SHOWN_CHANGES]:
        both = (f"{row.original} {row.original_probability:.0%}", f"{row.now} {row.now_probability:.0%}")
        table.add_row(row.image, row.truth or "-", *both)
    out.print(table)
    if len(rows) > SHOWN_CHANGES:
        out.print(f"  and {len(rows) - SHOWN_CHANGES} more in --json")


def _chosen(found: ImageSet, limit: int | None, manifest: Manifest) -> ImageSet:
    """Return the images that are evaluated, read as the model's classes where they name classes."""
    if manifest.spec.dense and len(found.paths) > DENSE_IMAGES:
        # Every output is kept for the comparison, and one of these is as large as an image.
        limit = min(limit or DENSE_IMAGES, DENSE_IMAGES)
        note(f"outputs are one vector per token: using {limit} of {len(found.paths)} images, spread evenly")
    chosen = found if limit is None else found.first(limit)
    if chosen.classes is not None and manifest.spec.head == "single_label":
        class_targets(chosen, manifest.labels, manifest.spec.output_width)
    return judged_images(chosen, manifest.spec, manifest.labels)


def _expected(opened: Bundle, given: Bundle | None, images: ImageSet, *, skip_bad: bool) -> Outputs:
    """Return what the unfolded model says of the images, computed once."""
    manifest, reference = opened.manifest, optional_reference(opened, given)
    digest, preprocess = manifest.model_digest, manifest.preprocess
    with counting("unfolded model, once", len(images.paths)) as advance:
        return reference_outputs(digest, images, preprocess, reference, skip_bad=skip_bad, advance=advance)


def _class_names(path: Path | None, folders: tuple[str, ...]) -> list[str]:
    if path is None:
        return [folder.replace("_", " ") for folder in folders]
    try:
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise VitfoldError(f"cannot read {path}: {error}; give a text file with one class name a line") from None
    if len(names) != len(folders):
        raise VitfoldError(f"{path} has {len(names)} names for {len(folders)} class folders; give one a line, sorted")
    return names


def _classified(
    fidelity: Fidelity, outputs: Outputs, expected: Outputs | None, images: ImageSet, embeds: Any
) -> tuple[Fidelity, float | None]:
    """Return the fidelity with the accuracy of the nearest text, and the top-1 of the unfolded model."""
    reference = None if expected is None else zero_shot(expected, embeds)
    found = compare_outputs(
        zero_shot(outputs, embeds), images, labels=images.classes, head="single_label", reference=reference
    )
    unfolded = None
    if reference is not None:
        unfolded = compare_outputs(reference, images, labels=images.classes, head="single_label", reference=None).top1
    return replace(fidelity, top1=found.top1, top5=found.top5, agreement=found.agreement), unfolded
