"""`vitfold evaluate`: accuracy with labels, agreement and cosine with the unfolded model without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import run_over
from vitfold.bench.reference import compare_outputs, optional_reference, reference_outputs
from vitfold.bench.zero_shot import SUFFIXES, check_embeds, read_embeds, zero_shot
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import given_images, judged_images, turned
from vitfold.cli.terminal import counting, heading, note, out, print_json
from vitfold.engines import open_session
from vitfold.errors import GateError, VitfoldError
from vitfold.report.tables import fidelity_lines
from vitfold.storage.ordinary import read_text

if TYPE_CHECKING:
    from vitfold.bench.evaluation import Outputs
    from vitfold.bench.fidelity import Fidelity
    from vitfold.images import ImageSet

DENSE_IMAGES = 256


@command(
    shown="images engine min_top1 min_agreement texts json",
    examples=("vitfold evaluate vit.fold --images VAL --min-top1 0.8",),
)
def evaluate(
    bundle: options.BundlePath,
    images: options.Images = None,
    batch: options.Batch = 8,
    limit: options.Limit = None,
    skip_bad: options.SkipBad = False,
    reference: options.ReferenceBundle = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    texts: Annotated[
        str | None,
        typer.Option(
            "--zero-shot",
            metavar="TEXTS",
            help="Classify embeddings by the nearest text: open_clip:ARCH/TAG or hf:REPO_OR_FOLDER, whose text tower "
            "embeds the class names once, or a .npy or .safetensors file (classes, width).",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One name a line, in the order of class folders; default: their names."),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A prompt with {} for the name; several are averaged.")
    ] = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=1, help="Exit with 3 if top-1 is lower.")] = None,
    min_agreement: options.MinAgreement = None,
    min_cosine: Annotated[float | None, typer.Option(min=-1, max=1, help="Exit with 3 if cosine is lower.")] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Exit with 3 if the SQNR of outputs is lower, in decibels.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Exit with 3 if the mean difference of probabilities (several labels), or the relative error of a "
            "regression, is higher.",
        ),
    ] = None,
    exif: options.Exif = None,
    json: options.Json = False,
) -> None:
    """Run a bundle over a folder and say how accurate and how faithful it is."""
    if images is None:
        raise typer.BadParameter("give --images DIR", param_hint="--images")

    if texts is None and (class_names is not None or template):
        raise typer.BadParameter("--class-names and --template need --zero-shot TEXTS", param_hint="--zero-shot")
    opened = turned(open_bundle(bundle), exif)
    given = None if reference is None else open_bundle(reference)
    manifest = opened.manifest
    if not manifest.has_trained_weights:
        note("random weights: these figures say nothing about accuracy, since outputs hardly depend on the image")
    found = given_images(images)
    if manifest.spec.dense and len(found.paths) > DENSE_IMAGES:
        # Every output is kept for the comparison, and one of these is as large as an image.
        limit = min(limit or DENSE_IMAGES, DENSE_IMAGES)
        note(f"outputs are one vector per token: using {limit} of {len(found.paths)} images, spread evenly")
    chosen = found if limit is None else found.first(limit)
    if chosen.classes is not None and manifest.spec.head == "single_label":
        class_targets(chosen, manifest.labels, manifest.spec.output_width)
    chosen = judged_images(chosen, manifest.spec, manifest.labels)
    embeds = None if texts is None else _text_embeds(texts, chosen, manifest.spec, class_names, template)
    with (
        open_session(opened, engine=engine, threads=threads) as session,
        counting("evaluate", len(chosen.paths)) as advance,
    ):
        outputs = run_over(session, chosen, manifest.preprocess, batch=batch, skip_bad=skip_bad, advance=advance)
        ran_on = session.engine
    expected: Outputs | None = None
    try:
        with counting("unfolded model, once", len(chosen.paths)) as advance:
            expected = reference_outputs(
                manifest.model_digest,
                chosen,
                manifest.preprocess,
                optional_reference(opened, given),
                skip_bad=skip_bad,
                advance=advance,
            )
    except VitfoldError as error:
        if _needs_reference(chosen, given, min_agreement, min_cosine, min_sqnr, max_error):
            raise
        note(f"agreement and cosine are not measured: {error}")
    fidelity = compare_outputs(outputs, chosen, labels=manifest.labels, head=manifest.spec.head, reference=expected)
    unfolded: float | None = None
    if embeds is not None:
        fidelity, unfolded = _classified(fidelity, outputs, expected, chosen, embeds)
    if outputs.skipped:
        note(f"skipped {len(outputs.skipped)} unreadable images:")
        for one in outputs.skipped[:10]:
            note(f"  {one}")
    if json:
        zero_shot = {} if texts is None else {"zero_shot": {"texts": texts, "unfolded_top1": unfolded}}
        print_json({**fidelity.to_dict(), **zero_shot, "engine": ran_on, "skipped": list(outputs.skipped)})
    else:
        heading(opened.name, f" on {fidelity.images} images of {found.root}")
        out.print(f"  {'engine':10} {ran_on}")
        for name, shown in fidelity_lines(fidelity.to_dict(), head=manifest.spec.head, unfolded=unfolded):
            out.print(f"  {name:10} {shown}")
    _check_gates(
        fidelity,
        least={"top1": min_top1, "agreement": min_agreement, "cosine": min_cosine, "sqnr_db": min_sqnr},
        most=max_error,
    )


def _needs_reference(images: ImageSet, *bounds: object) -> bool:
    """Whether nothing can be said without the unfolded model, or what was asked for cannot."""
    return images.classes is None or any(bound is not None for bound in bounds)


_WORDS = {"top1": "top-1", "agreement": "agreement", "cosine": "cosine", "sqnr_db": "SQNR (dB)"}


def _check_gates(fidelity: Fidelity, *, least: dict[str, float | None], most: float | None) -> None:
    """Check figures against their bounds.

    Raises:
        GateError: at the first that misses its bound, or was not measured.
    """
    for name, bound in least.items():
        value = getattr(fidelity, name)
        if bound is None or (value is not None and value >= bound):
            continue
        if name == "sqnr_db" and value is None and fidelity.reference is not None:
            continue  # outputs are equal
        shown = "not measured" if value is None else f"{value:.4f}"
        raise GateError(f"{_WORDS[name]} is {shown}, the bound is {bound}")
    if most is None:
        return
    error = fidelity.relative_error if fidelity.probability_error is None else fidelity.probability_error
    if error is None:
        raise GateError(
            "--max-error bounds the difference of probabilities or of a regression's numbers, and this model gives "
            "neither; bound --min-agreement or --min-cosine"
        )
    if error > most:
        raise GateError(f"the error is {error:.4f}, the bound is {most}")


def _text_embeds(texts: str, images: ImageSet, spec: Any, class_names: Path | None, templates: list[str] | None) -> Any:
    """Return one text embedding per class folder.

    Raises:
        VitfoldError: if images, names, texts and model do not fit each other.
    """
    if images.classes is None:
        raise VitfoldError("--zero-shot needs one sub-folder of --images per class")
    if spec.output != "image_embeds":
        raise VitfoldError(f"--zero-shot classifies image embeddings, and this model's output is {spec.output}")
    if Path(texts).suffix in SUFFIXES:
        if class_names is not None or templates:
            raise VitfoldError(f"{texts} holds embeddings already; leave --class-names and --template out")
        embeds = read_embeds(Path(texts))
    else:
        from vitfold.sources.text_towers import TEMPLATE, text_embeds

        names = _class_names(class_names, images.classes)
        note(f"embedding {len(names)} class names by {texts}, once")
        embeds = text_embeds(texts, names, templates or (TEMPLATE,))
    check_embeds(embeds, classes=len(images.classes), width=spec.output_width, name=texts)
    return embeds


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
