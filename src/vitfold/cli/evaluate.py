"""`vitfold evaluate`: accuracy with labels, agreement and cosine with the unfolded model without."""

from __future__ import annotations

from typing import Annotated

import typer

from vitfold.cli import options
from vitfold.cli.terminal import command, counting, log, note, out, print_json
from vitfold.errors import GateError, VitfoldError

DENSE_IMAGES = 256


@command
def evaluate(
    bundle: options.BundlePath,
    images: options.Images = None,
    batch: options.Batch = 8,
    limit: options.Limit = None,
    skip_bad: options.SkipBad = False,
    reference: options.ReferenceBundle = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    min_top1: Annotated[float | None, typer.Option(min=0, max=1, help="Exit with 3 if top-1 is lower.")] = None,
    min_agreement: options.MinAgreement = None,
    min_cosine: Annotated[float | None, typer.Option(min=-1, max=1, help="Exit with 3 if cosine is lower.")] = None,
    json: options.Json = False,
) -> None:
    """Run a bundle over a folder and say how accurate and how faithful it is."""
    if images is None:
        raise typer.BadParameter("give --images DIR", param_hint="--images")
    from vitfold.bench.evaluation import Outputs, run_over
    from vitfold.bundle import open_bundle
    from vitfold.engines import open_session
    from vitfold.images import class_targets, find_images
    from vitfold.reference import compare_outputs, optional_reference, reference_outputs
    from vitfold.report.tables import percent

    opened = open_bundle(bundle)
    given = None if reference is None else open_bundle(reference)
    manifest = opened.manifest
    if not manifest.has_trained_weights:
        note("random weights: these figures say nothing about accuracy, since outputs hardly depend on the image")
    found = find_images(images)
    if manifest.spec.output == "last_hidden_state" and len(found.paths) > DENSE_IMAGES:
        # Every output is kept for the comparison, and one of these is as large as an image.
        limit = min(limit or DENSE_IMAGES, DENSE_IMAGES)
        note(f"outputs are one vector per token: using {limit} of {len(found.paths)} images, spread evenly")
    chosen = found if limit is None else found.first(limit)
    classifies = manifest.spec.output == "logits"
    if chosen.classes is not None and classifies:
        class_targets(chosen, manifest.labels, manifest.spec.output_width)
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
        if chosen.classes is None or given is not None or min_agreement is not None or min_cosine is not None:
            raise
        note(f"agreement and cosine are not measured: {error}")
    fidelity = compare_outputs(outputs, chosen, labels=manifest.labels, classifies=classifies, reference=expected)
    if outputs.skipped:
        log.print(f"skipped {len(outputs.skipped)} unreadable images:", *outputs.skipped[:10], sep="\n  ", markup=False)
    if json:
        print_json({**fidelity.to_dict(), "engine": ran_on, "skipped": list(outputs.skipped)})
    else:
        out.print(f"[bold]{opened.name}[/] on {fidelity.images} images of {found.root}", highlight=False)
        out.print(f"  {'engine':10} {ran_on}", highlight=False)
        for name, value in (("top-1", fidelity.top1), ("top-5", fidelity.top5), ("agreement", fidelity.agreement)):
            out.print(f"  {name:10} {percent(value)}", highlight=False)
        out.print(f"  {'cosine':10} {'-' if fidelity.cosine is None else f'{fidelity.cosine:.5f}'}", highlight=False)
    for name, value, least in (
        ("top-1", fidelity.top1, min_top1),
        ("agreement", fidelity.agreement, min_agreement),
        ("cosine", fidelity.cosine, min_cosine),
    ):
        if least is not None and (value is None or value < least):
            shown = "not measured" if value is None else f"{value:.4f}"
            raise GateError(f"{name} is {shown}, the bound is {least}")
