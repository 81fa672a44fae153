"""`vitfold audit`: what NVIDIA's compiler makes of a bundle or an ONNX file, on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.groups import JsonArgs
from vitfold.cli.terminal import heading, note, out, steps, write_text
from vitfold.errors import BundleError, EngineError
from vitfold.report.audits import block_table, overview_table, prediction_table, summary_table, tiles_table
from vitfold.report.pictures import block_picture
from vitfold.storage.checked import parse_json, section
from vitfold.storage.ordinary import read_text

if TYPE_CHECKING:
    from vitfold.audit.audit import Audit

_SIDE_BY_SIDE = 2


@command()
def audit(
    *,
    subjects: Annotated[
        list[Path],
        typer.Argument(
            metavar="BUNDLE_OR_ONNX...",
            help="Bundles or any ONNX files, shown side by side; JSON of earlier audits, to price their kernels again.",
        ),
    ],
    gpu: Annotated[
        str, typer.Option(help="Compute capability to compile for: sm75, sm80, sm86, sm89, sm120.")
    ] = "sm86",
    batch: options.Batch = 8,
    tiles: Annotated[
        str | None, typer.Option(metavar="GPU", help="Show the tiles of every product on this GPU, as H100 or A10.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Draw the kernels of the middle block there.")
    ] = None,
    answer: JsonArgs,
) -> None:
    """Compile ahead of time without a GPU; count, explain and price every kernel. Times are a model, not measured."""
    from vitfold.audit.compiler import check_gpu
    from vitfold.audit.gpus import find_gpu
    from vitfold.audit.pricing import usual_gpu

    check_gpu(gpu)
    if tiles is not None:
        find_gpu(tiles)
    documents: list[dict[str, Any]] = []
    with steps("audit") as say:
        for path in subjects:
            if path.suffix == ".json":
                documents += _repriced(path, tiles, alone=len(subjects) == 1)
                continue
            say(f"compiling {path}")
            usual = usual_gpu(gpu) if len(subjects) == 1 else None
            documents.append(_audit(path, gpu, batch).to_dict(tiles or usual))
    document: Any = documents[0] if len(documents) == 1 else {"audits": documents}
    printed = answer.write(document)
    if picture is not None:
        write_text(picture, block_picture(documents))
    if printed:
        return

    if len(documents) > _SIDE_BY_SIDE:
        out.print(overview_table(documents))
    else:
        out.print(summary_table(documents))
        for shown in documents:
            out.print(block_table(shown))
        out.print(prediction_table(documents))
    for shown in documents:
        if "tiles" in shown:
            out.print(tiles_table(shown["tiles"], shown["model"], shown["name"]))
    for shown in documents:
        _print_findings(shown)


def _repriced(path: Path, tiles: str | None, *, alone: bool) -> list[dict[str, Any]]:
    """Return the audits of a JSON file, priced by the model as it is now; of one alone with its tiles."""
    from vitfold.audit.pricing import reprice, usual_gpu

    try:
        found = section(parse_json(read_text(path)), str(path))
        audits = [section(one, "audits") for one in found.get("audits", [found])]
    except (OSError, ValueError, TypeError) as error:
        raise EngineError(f"cannot read {path} ({error}); give what `vitfold audit --output` wrote") from None
    if tiles is None and alone and len(audits) == 1 and "costs" in audits[0]:
        tiles = usual_gpu(str(audits[0].get("gpu")))
    return [reprice(one, tiles) for one in audits]


def _audit(path: Path, gpu: str, batch: int) -> Audit:
    from vitfold.audit.audit import audit_graph

    if path.is_file():
        return audit_graph(path, gpu=gpu, batch=batch)
    bundle = open_bundle(path)
    if bundle.manifest.simulated:
        raise BundleError(f"{path} is simulated and has no graph; make one with --target tensorrt-int8")
    return audit_graph(bundle.onnx_path, gpu=gpu, batch=batch, name=bundle.name)


def _print_findings(audit: dict[str, Any]) -> None:
    for finding in audit["findings"]:
        sites = finding["where"]
        where = f": {', '.join(sites[:4])}" if sites else ""
        more = f" and {len(sites) - 4} more" if len(sites) > 4 else ""
        heading(finding["kind"], f" in {audit['name']}{where}{more}", style="bold yellow")
        out.print(f"  {finding['cause']}", soft_wrap=True)
        out.print(f"  cure: {finding['cure']}", soft_wrap=True)
    if not audit["findings"]:
        heading("nothing to mend", f" in {audit['name']}", style="green")
    if audit["not_understood"]:
        note(f"not understood in {audit['name']}: {'; '.join(audit['not_understood'][:5])}")
