"""`vitfold report`: one page of all measurements in a folder, to read offline and to show around."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.architectures.programs import spec_in, whole_in
from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.bench.environment import installed_version
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import require_optimize
from vitfold.cli.terminal import note, out, skipped, steps, write_text
from vitfold.errors import ImageError, ReportError, missing_extra
from vitfold.images import batches, find_images
from vitfold.model.spec import MAPS
from vitfold.pipeline import count_costs
from vitfold.sources.origin import load_origin

if TYPE_CHECKING:
    from vitfold.report.maps import Mapped
    from vitfold.report.mosaic import Traced


@command()
def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="JSON files of bench, evaluate, ladder, sensitivity, profile, sweep and diffusion."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page.")],
    title: Annotated[str | None, typer.Option(help="Its heading; default: the folder's name.")] = None,
    pictures: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE",
            help="Draw what this bundle merges, and its maps beside the original's, on photos of --images; may be "
            "repeated.",
        ),
    ] = None,
    images: options.Images = None,
    photos: Annotated[int, typer.Option(min=1, help="Photos drawn, spread evenly over --images.")] = 3,
    skip_bad: options.SkipBad = False,
) -> None:
    """Write one self-contained HTML page: accuracy against speed, where time goes, what merges, every figure."""
    for package in ("plotly", "jinja2"):
        if installed_version(package) is None:
            raise ReportError(missing_extra(package, "report", "the page"))
    if pictures and images is None:
        raise typer.BadParameter("pictures are drawn on photos: give --images DIR", param_hint="--pictures")
    if images is not None and not pictures:
        raise typer.BadParameter("--images are for --pictures BUNDLE; give both or none", param_hint="--images")
    if output.is_dir():
        raise ReportError(f"{output} is a folder; give -o the name of a file, such as {output / 'report.html'}")
    from vitfold.report.loading import load_folder
    from vitfold.report.page import render_page

    found = load_folder(folder)
    with steps("report") as say:
        traced: list[Traced | Mapped] = []
        for bundle in pictures or []:
            assert images is not None
            say(f"pictures of {bundle}")
            traced += _draw(bundle, images, photos, skip_bad=skip_bad)
        say("the page")
        line = shlex.join(["vitfold", *sys.argv[1:]])
        page = render_page(found, title=title or folder.absolute().name, command=line, traced=traced)
    write_text(output, page)
    for name in found.left_out:
        note(f"not shown: {name}")
    out.print(f"{output} ({len(page.encode('utf-8')) / 1e6:.1f} MB)", soft_wrap=True)


def _draw(path: Path, folder: Path, count: int, *, skip_bad: bool) -> list[Traced | Mapped]:
    """Run the model that a bundle was made from on some photos, and keep what merges and what maps come out."""
    require_optimize()
    import numpy as np

    from vitfold.report.mosaic import rgb_from_pixels

    bundle = open_bundle(path)
    manifest = bundle.manifest
    if not any(manifest.recipe.merge.r) and manifest.spec.head not in MAPS:
        raise ReportError(f"{path} merges nothing, so there is nothing to draw; give a bundle made with --merge")
    chosen = find_images(folder).first(count)
    if skip_bad:
        chosen = chosen.readable(skipped)
    found = list(batches(chosen, manifest.preprocess, batch=1))
    if not found:
        raise ImageError(f"no image in {folder} can be read; give another folder")
    pixels = np.concatenate([one.pixel_values for one in found])
    names = tuple(chosen.paths[one.index[0]].name for one in found)
    photos = rgb_from_pixels(pixels, manifest.preprocess.mean, manifest.preprocess.std)
    drawn: list[Traced | Mapped] = []
    if manifest.spec.head in MAPS:
        drawn.append(_map(bundle, names, photos, pixels))
    if any(manifest.recipe.merge.r):
        drawn.append(_trace(bundle, names, photos, pixels))
    return drawn


def _map(bundle: Bundle, names: tuple[str, ...], photos: Any, pixels: Any) -> Mapped:
    """Run a bundle and the model that it was made from."""
    import tempfile

    from vitfold.bench.reference import reference_from_origin
    from vitfold.engines import open_session
    from vitfold.report.maps import Mapped

    with tempfile.TemporaryDirectory(prefix="vitfold-") as scratch:
        with reference_from_origin(bundle).open(Path(scratch)) as session:
            expected = session(pixels)
        with open_session(bundle) as session:
            found = session(pixels)
    return Mapped(
        title=bundle.name, names=names, photos=photos, expected=expected, found=found, head=bundle.manifest.spec.head
    )


def _trace(bundle: Bundle, names: tuple[str, ...], photos: Any, pixels: Any) -> Traced:
    """Find which patches merge in a bundle."""
    from vitfold.pipeline.tracing import trace_groups
    from vitfold.report.mosaic import Traced

    manifest = bundle.manifest
    merge = manifest.recipe.merge
    model = load_origin(manifest.origin).model
    flops = [0] * manifest.spec.num_layers
    for cost in count_costs(spec_in(manifest), merge, whole=whole_in(manifest)):
        if cost.block is not None:
            flops[cost.block] += 2 * cost.macs
    return Traced(
        title=bundle.name,
        names=names,
        photos=photos,
        groups=trace_groups(model, merge, pixels),
        grid=manifest.spec.grid,
        tokens=manifest.tokens,
        flops=tuple(flops),
    )
