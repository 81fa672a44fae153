"""`vitfold inspect`: what is in a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.architectures.programs import deployed_program, plain_program, spec_in, whole_in
from vitfold.artifacts.bundle import holds_steps, open_bundle
from vitfold.artifacts.steps import DECODE, Steps
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.graph_facts import graph_document, graph_lines, load_graph
from vitfold.cli.terminal import heading, out, print_json
from vitfold.engines.exactness import exact_execution
from vitfold.errors import EngineError, VitfoldError
from vitfold.model import DiTSpec, Preprocess, ViTSpec
from vitfold.ops.energy import SOURCE
from vitfold.report.tables import describe_integer, describe_registers, describe_steps_fidelity, fidelity_lines
from vitfold.schedule import describe_r
from vitfold.target import PLAIN

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle, Manifest
    from vitfold.ops.work import Work
    from vitfold.program import Program
    from vitfold.recipe import QuantRecipe


@command()
def inspect(
    bundle: options.BundlePath,
    program: Annotated[bool, typer.Option("--program", help="Print what the graph computes, node by node.")] = False,
    json: options.Json = False,
) -> None:
    """Print a bundle's recipe, target, tokens per block, work, size and origin; or what an ONNX file is made of."""
    if bundle.suffix == ".onnx":
        _inspect_graph(bundle, program=program, json=json)
        return
    if holds_steps(bundle):
        if program:
            raise VitfoldError(f"{bundle} holds one graph per step; --program shows the graph of a Vision Transformer")
        _inspect_steps(bundle, json=json)
        return
    opened = open_bundle(bundle)
    if program:
        _print_program(opened.manifest, json=json)
    else:
        from vitfold.pipeline import bundle_work

        work = bundle_work(opened)
        if json:
            print_json(_document(opened, work))
        else:
            _print_lines(opened.path, _lines(opened, work))


def _inspect_graph(path: Path, *, program: bool, json: bool) -> None:
    model = load_graph(path)
    if program:
        _print_whole(plain_program(model.spec), json=json)
    elif json:
        print_json(graph_document(model))
    else:
        _print_lines(path, graph_lines(graph_document(model)))


def _document(opened: Bundle, work: Work | None) -> dict[str, Any]:
    manifest = opened.manifest
    return {
        **({} if work is None else work.to_dict()),
        "recipe": manifest.recipe.to_dict(),
        "target": dict(manifest.target),
        "products": [product.name for product in manifest.products],
        "tokens": list(manifest.tokens),
        "macs": manifest.macs,
        "size_bytes": opened.size_bytes,
        "origin": dict(manifest.origin),
        "digest": opened.digest,
        "model_digest": manifest.model_digest,
        "output": manifest.spec.output,
        "head": manifest.spec.head,
        "labels": None if manifest.labels is None else list(manifest.labels),
        "preprocess": manifest.preprocess.to_dict(),
        "verified": dict(manifest.verified),
        "fidelity": manifest.fidelity,
        "calibration": manifest.calibration,
        "compensation": manifest.compensation,
        "vitfold": manifest.vitfold,
    }


def _lines(opened: Bundle, work: Work | None) -> list[tuple[str, str]]:
    manifest = opened.manifest
    spec, pre, registers, fidelity = manifest.spec, manifest.preprocess, manifest.recipe.registers, manifest.fidelity
    patch, pool = (f"patch {spec.patch_size[0]}, ", f"pool {spec.pool}, ") if isinstance(spec, ViTSpec) else ("", "")
    model = (
        f"{spec.num_layers} blocks, width {spec.embed_dim}, {spec.num_heads} heads, {patch}"
        f"input {' x '.join(map(str, spec.input_shape if pre.arrays else spec.image_size))}, "
        f"{pool}{', '.join(spec.output_names)} of {spec.output_width}, {spec.head.replace('_', ' ')}"
    )
    verified = manifest.verified
    figures = "not measured; see vitfold evaluate"
    if fidelity is not None:
        figures = "; ".join(f"{name} {figure}" for name, figure in fidelity_lines(fidelity, head=spec.head))
        figures += f"; on {fidelity['images']} images"
    return [
        ("origin", f"{manifest.origin['source']} ({manifest.origin['loader']})"),
        ("model", model),
        ("preprocess", _preprocess(pre)),
        ("target", f"{manifest.target['name']} ({manifest.target['engine']})"),
        *([("needs", _needs(manifest))] if manifest.products else []),
        ("merge", describe_r(manifest.recipe.merge.r)),
        *([("refitted", _compensated(manifest.compensation))] if manifest.compensation is not None else []),
        ("quant", _quant(manifest.recipe.quant, simulated=manifest.simulated)),
        *([("registers", describe_registers(registers.to_dict()))] if registers is not None else []),
        ("tokens", " ".join(map(str, manifest.tokens))),
        *_work(manifest, work),
        ("size", f"{opened.size_bytes / 1e6:.1f} MB"),
        ("verified", f"{verified['engine']}, median relative error {verified['median_relative_error']:.1e}"),
        ("fidelity", figures),
        ("digest", opened.digest),
        *([("trtexec", str(manifest.target["trtexec"]))] if "trtexec" in manifest.target else []),
    ]


def _work(manifest: Manifest, work: Work | None) -> list[tuple[str, str]]:
    macs = f"{manifest.macs / 1e9:.3g} GMACs"
    if work is None:
        return [("work", f"{macs} per image")]
    found = [("work", f"{macs}, {work.bytes / 1e6:.3g} MB moved per image")]
    if work.integer is not None:
        found.insert(0, ("integer", describe_integer(work.to_dict()["integer"])))
    return [*found, ("energy", f"{work.energy.total_uj / 1e3:.3g} mJ per image ({SOURCE})")]


def _preprocess(pre: Preprocess) -> str:
    if pre.arrays:
        return "none: arrays as they are"
    turning = "applied" if pre.exif == "apply" else "ignored"
    return f"{pre.resize} {pre.resize_size}, crop {pre.crop_size}, {pre.interpolation}, EXIF orientation {turning}"


def _print_lines(path: Path, lines: list[tuple[str, str]]) -> None:
    heading(str(path))
    for name, value in lines:
        out.print(f"  {name:11}{value}", soft_wrap=True)


def _print_program(manifest: Manifest, *, json: bool) -> None:
    _print_whole(deployed_program(spec_in(manifest), manifest.recipe.merge, whole_in(manifest)), json=json)


def _print_whole(found: Program, *, json: bool) -> None:
    if json:
        print_json(found.to_dict())
    else:
        for line in str(found).splitlines():
            out.print(line, soft_wrap=True)


def _needs(manifest: Manifest) -> str:
    """What the graph asks of a processor, and whether this one computes it exactly."""
    engine = str(manifest.target.get("engine"))
    shown = " and ".join(f"exact products of {product}" for product in manifest.products)
    try:
        execution = exact_execution(engine, manifest.products)
    except EngineError as error:
        return f"{shown}; not checked here: {error}"
    if execution is None:
        return f"{shown}; this processor computes them wrongly, opening it will say so"
    return f"{shown}; {'so it does here' if execution == PLAIN else 'here in another way, slower'}"


def _compensated(record: Mapping[str, Any]) -> str:
    """What refitted layers gained on held-out images."""
    refitted = sum(layer["ridge"] is not None for layer in record["layers"])
    left = []
    for key, name in (("heads", "heads left"), ("head_dim", "values a head"), ("units", "hidden units left")):
        counts = sorted({layer[key] for layer in record["layers"] if key in layer})
        few = len(counts) < 3
        shown = (" or " if few else " to ").join(map(str, counts if few else (counts[0], counts[-1])))
        left += [f"{shown} {name}"] if counts else []
    if left:
        return (
            f"{refitted} layers on {record['images']} images, {', '.join(left)}; error of the output "
            f"{record['error_after']:.3g} on {record['held_out']} held-out ones"
        )
    return (
        f"{refitted} layers on {record['images']} images; error of the output {record['error_before']:.3g} before, "
        f"{record['error_after']:.3g} after, on {record['held_out']} held-out ones"
    )


def _quant(quant: QuantRecipe | None, *, simulated: bool) -> str:
    if quant is None:
        return "none"
    shown = f"{quant.scheme} by {quant.method}, {quant.calibration_size} calibration images, seed {quant.seed}"
    shown += ", outputs rounded" if quant.outputs else ""
    kept = [glob for glob, scheme in quant.sites.items() if scheme == "float"]
    shown += f", float: {', '.join(kept)}" if kept else ""
    return f"{shown} (simulated)" if simulated else shown


def _model_facts(steps: Steps) -> str:
    """What a bundle draws, and by what."""
    spec, kind = steps.spec, "latents" if steps.latent else "images"
    if not isinstance(spec, DiTSpec) and spec.packed:
        tokens, channels = spec.image_shape
        given = ", ".join(one.name for one in spec.conditions)
        return f"{spec.module}, {kind} of {tokens} tokens of {channels}, by {given}"
    *_, height, width = spec.image_shape
    if isinstance(spec, DiTSpec):
        own = f"{spec.num_heads} heads, patch {spec.patch_size}"
        return f"{own}, {kind} of {height} x {width}, {spec.classes} classes"
    return f"{spec.module}, {kind} of {height} x {width}, by {', '.join(one.name for one in spec.conditions)}"


def _decoding(opened: Bundle) -> str:
    """What makes images of a bundle's latents, and the bytes that this takes in it."""
    steps = opened.manifest.steps
    if steps.decode is None:
        return "left as latents" if steps.decoder is None else f"by the VAE in {steps.decoder}"
    _, height, width = steps.decode.image_shape
    return f"{height} x {width}, by the graph {DECODE} ({opened.decode_bytes / 1e6:.1f} MB of the size)"


def _inspect_steps(path: Path, *, json: bool) -> None:
    opened = open_bundle(path, steps=True)
    manifest, steps = opened.manifest, opened.manifest.steps
    if json:
        sizes = {"size_bytes": opened.size_bytes, "decode_bytes": opened.decode_bytes}
        print_json({**manifest.to_dict(), **sizes, "digest": opened.digest})
        return
    spec, plan, db = steps.spec, steps.plan, manifest.verified["psnr_db"]
    lines = [
        ("origin", f"{steps.origin.source} ({steps.origin.loader})"),
        ("model", f"{spec.num_layers} blocks, width {spec.embed_dim}, {_model_facts(steps)}"),
        ("target", f"{manifest.target['name']} ({manifest.target['engine']})"),
        ("reuse", plan.reuse),
        ("sampler", f"{plan.steps} steps of {plan.sampler}, guidance {plan.guidance:g}"),
        ("merge", f"{plan.merge} tokens per block"),
        ("quant", plan.quant if plan.method is None else f"{plan.quant} by {plan.method}"),
        *([("fidelity", describe_steps_fidelity(steps.fidelity.to_dict()))] if steps.fidelity is not None else []),
        ("parts", " ".join(manifest.parts)),
        *([("images", _decoding(opened))] if steps.latent else []),
        ("size", f"{opened.size_bytes / 1e6:.1f} MB"),
        ("verified", f"{manifest.verified['engine']}, {'equal' if db is None else f'{db:.0f} dB'} to the reference"),
        ("digest", opened.digest),
    ]
    _print_lines(opened.path, lines)
