"""`vitfold diffusion optimize`: a Diffusion Transformer in, a verified bundle of steps out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitfold.artifacts.bundle import publish_bundle
from vitfold.artifacts.cache import entry_folder, key_of
from vitfold.artifacts.digested import reserve_bundle
from vitfold.artifacts.journal import ROWS, alone
from vitfold.artifacts.steps import SamplingPlan
from vitfold.bench.environment import environment
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.diffusion.drawing import SamplingArgs, default_judge, document, open_features
from vitfold.cli.diffusion.prompts import Prompts, Vae, save_pipeline
from vitfold.cli.groups import JudgeArgs, StepArgs, StepSearchArgs, refuse
from vitfold.cli.making import require_optimize, say_busy
from vitfold.cli.terminal import heading, note, out, print_json, quiet_stdout, steps
from vitfold.errors import CacheError
from vitfold.processor import processor
from vitfold.report.tables import describe_steps_fidelity, diffusion_table, number
from vitfold.sources.dit import load_dit
from vitfold.version import __version__

if TYPE_CHECKING:
    from vitfold.artifacts.bundle import Bundle
    from vitfold.diffusion.compare import SamplingConfig
    from vitfold.diffusion.compression import Compression
    from vitfold.diffusion.decoding import Decoder
    from vitfold.diffusion.search import Bounds, StepSearchResult
    from vitfold.model import DiTModel
    from vitfold.target import Target

AUTO = "auto"
MIN_PSNR_DB = 30.0
SAMPLES, FID_SAMPLES = 32, 256


@command(
    brief={
        "reuse": "As fitted:18, or auto: the fastest.",
        "merge": "Tokens merged per block.",
        "quant": "w8a8 or none.",
        "min_psnr": "Least PSNR to unaccelerated images.",
        "max_fid_rise": "How much larger a FID.",
        "steps": "Denoising steps; default: 50.",
    },
    shown="output reuse merge quant steps min_psnr max_fid_rise overwrite json",
    examples=(
        "vitfold diffusion optimize demo-dit --min-psnr 30 -o fast.fold",
        "vitfold diffusion optimize hf:FOLDER --reuse fitted:18 --quant w8a8 -o fast.fold",
    ),
)
def optimize(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="demo-dit, hf:REPO_OR_FOLDER of diffusers, or a state dict of DiT's own."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.fold", help="The bundle to write.")],
    way: StepSearchArgs,
    stepping: StepArgs,
    judging: JudgeArgs,
    prompts: Prompts = None,
    vae: Vae = True,
    target: options.StepTarget = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
) -> None:
    """Write the steps of a Diffusion Transformer as a bundle, by a named method or the fastest within bounds."""
    require_optimize()
    if way.max_fid_rise is not None:
        features, real = default_judge(source, judging.features, judging.real)
        judging = JudgeArgs(real=real, features=features)
    _check(way, judging)
    lowering = None if target is None else _target(target, way)
    if prompts is not None:
        with reserve_bundle(output, overwrite=overwrite) as place, steps("optimize") as say, quiet_stdout():
            draft = save_pipeline(source, prompts, way, stepping, place.draft(), say, vae=vae, target=target)
            bundle = publish_bundle(place, draft)
        _show(_summary(bundle), None, json=json)
        note(f"next: vitfold diffusion embed {source} --prompts {prompts} -o E.safetensors, then sample {output}")
        return
    from vitfold.diffusion import find_method
    from vitfold.diffusion.compare import check_asked
    from vitfold.diffusion.compression import compress
    from vitfold.diffusion.writing import save_steps

    method = None if way.reuse == AUTO else find_method(way.reuse)
    with reserve_bundle(output, overwrite=overwrite) as place, steps("optimize") as say, quiet_stdout():
        say(f"loading {source}")
        model = load_dit(source, heads=way.heads)
        few = SamplingArgs(classes="all", count=8, **asdict(stepping)).asked(model)
        check_asked(model, few)
        say("compressing")
        able = _compressions(model, way, few, lowering)
        found, searched = None, None
        chosen, count = able[0], few.steps
        if method is None:
            found, searched = _search(model, few, able, way, judging, say)
            winner = found.winner
            if winner is None:
                method, chosen = find_method("none"), compress(model)
            else:
                method, chosen, count = winner.row.method, winner.compression, winner.row.steps
        plan = SamplingPlan(
            reuse=method.text, steps=count, sampler=few.sampler, guidance=few.guidance, **chosen.to_dict()
        )
        decoder = _decoder(model, say) if vae else None
        draft = save_steps(
            model, plan, method, chosen, place.draft(), search=searched, decoder=decoder, target=lowering, say=say
        )
        bundle = publish_bundle(place, draft)
    values = {**(searched or {}), **_summary(bundle)}
    _show(values, found, json=json)
    if searched is not None:
        say_busy(searched["environment"])
    note(f"next: vitfold diffusion sample {output} --classes 0,1,2 -o images, or vitfold diffusion bench {output}")


def _decoder(model: DiTModel, say: Callable[[str], None]) -> Decoder | None:
    """What decodes a model's latents, as a program; None where it makes images, or its VAE is not there."""
    from vitfold.diffusion.decoding import lift_folder

    if not model.latent or model.decoder is None:
        return None
    say("reading the VAE's decoder as a program")
    return lift_folder(model.decoder, model.spec.image_shape)


def _check(way: StepSearchArgs, judging: JudgeArgs) -> None:
    quantizes = way.reuse == AUTO if way.quant is None else way.quant != "none"
    bounded = any(bound is not None for bound in (way.min_psnr, way.max_psnr_drop, way.max_fid_rise))
    lacking = "a Frechet distance needs real images and features: give --real DIR and --features SOURCE"
    refuse(
        (bounded and way.reuse != AUTO, "a bound goes with --reuse auto", "--reuse"),
        ((judging.real is None) != (judging.features is None), "give both --real DIR and --features SOURCE", "--real"),
        (way.max_fid_rise is not None and judging.features is None, lacking, "--max-fid-rise"),
        (way.method is not None and not quantizes, "a method says how --quant rounds; give --quant w8a8", "--method"),
        (way.merge is not None and not way.merge.isdecimal(), "give the tokens merged per block", "--merge"),
    )


def _target(name: str, way: StepSearchArgs) -> Target:
    """The target that is asked for; a search measures on this machine."""
    from vitfold.diffusion.opening import find_step_target

    refuse(
        (way.reuse == AUTO, "a search measures here; name a method beside --target, as --reuse fitted:18", "--reuse")
    )
    return find_step_target(name)


def _compressions(
    model: DiTModel, way: StepSearchArgs, few: SamplingConfig, target: Target | None
) -> list[Compression]:
    """What steps may be compressed with: as named, else not at all, and where that is searched in 8 bits too."""
    from vitfold.diffusion.compression import compress

    schemes = ["none", "w8a8"] if way.reuse == AUTO else ["none"]
    if way.quant is not None or target is not None:
        schemes = [(way.quant or ("none" if target is None else target.implied_quant)).lower()]
    along = partial(
        compress, model, target=target, r=int(way.merge or 0), method=way.method, steps=few.steps, guidance=few.guidance
    )
    return [along(quant=scheme) for scheme in schemes]


def _bounds(way: StepSearchArgs) -> Bounds:
    """Return the bounds of the search: 30 dB where none is named."""
    from vitfold.diffusion.search import Bounds

    none = way.min_psnr is None and way.max_psnr_drop is None and way.max_fid_rise is None
    return Bounds(
        min_psnr_db=MIN_PSNR_DB if none else way.min_psnr,
        max_psnr_drop_db=way.max_psnr_drop,
        max_fid_rise=way.max_fid_rise,
    )


def _search(
    model: DiTModel,
    few: SamplingConfig,
    able: list[Compression],
    way: StepSearchArgs,
    judging: JudgeArgs,
    say: Any,
) -> tuple[StepSearchResult, dict[str, Any]]:
    from vitfold.diffusion.search import Setup, search_steps

    before, bounds = environment(), _bounds(way)
    decode = SamplingArgs(latents=model.latent and model.decoder is None).decoder(model)
    judge = None
    if judging.features is not None and judging.real is not None:
        judge = open_features(judging.features, judging.real, say)
    samples = way.samples or (SAMPLES if way.max_fid_rise is None else FID_SAMPLES)
    folder = _search_folder(model, few, able, bounds)
    setup = Setup(decode=decode, judge=judge, folder=folder, say=say)
    with nullcontext() if folder is None else alone(folder / ROWS):
        found = search_steps(model, few, bounds, able, setup, samples=samples, minutes=way.search_minutes)
    rows = [found.plain, *(one.row for one in found.tried)]
    values = document(
        model,
        few,
        rows,
        able[-1].to_dict(),
        features=judging.features,
        chosen=None if found.winner is None else found.winner.row.method,
        before=before,
    )
    values["rows"] = [found.plain.to_dict(), *(one.to_dict() for one in found.tried)]
    return found, {
        **values,
        "bounds": bounds.to_dict(),
        "winner": None if found.winner is None else found.winner.row.name,
        "held_out": {
            "images": samples,
            "winner": None if found.winner is None else found.winner.to_dict(),
            "refused": [one.to_dict() for one in found.refused],
        },
        "reason": found.reason,
    }


def _search_folder(model: DiTModel, few: SamplingConfig, able: list[Compression], bounds: Bounds) -> Path | None:
    """Where the rows of this search lie, for the same command to go on with, if they can lie anywhere."""
    # How far images are from the converged ones is measured only where a bound asks for it.
    converged, decoded = bounds.max_psnr_drop_db is not None, model.decoder is not None
    compressions = [one.to_dict() for one in able]
    settings = [__version__, model.digest(), asdict(few), compressions, processor(), converged, decoded]
    try:
        return entry_folder("step-searches", key_of(*settings))
    except CacheError as error:
        note(f"an interruption will start this search anew: {error}")
        return None


def _summary(bundle: Bundle) -> dict[str, Any]:
    fidelity = bundle.manifest.steps.fidelity
    return {
        "bundle": str(bundle.path),
        "plan": bundle.manifest.steps.plan.to_dict(),
        "parts": list(bundle.manifest.parts),
        "size_bytes": bundle.size_bytes,
        "decode_bytes": bundle.decode_bytes,
        "digest": bundle.digest,
        "verified": dict(bundle.manifest.verified),
        "fidelity": None if fidelity is None else fidelity.to_dict(),
    }


def _show(values: dict[str, Any], found: StepSearchResult | None, *, json: bool) -> None:
    if json:
        print_json(values)
    else:
        _print(values, found)


def _print(values: dict[str, Any], found: StepSearchResult | None) -> None:
    from vitfold.diffusion.search import describe_bounds

    if found is not None:
        out.print(diffusion_table(values))
        note(f"{describe_bounds(values['bounds'])}: {values['reason']}")
    plan = values["plan"]
    heading(plan["reuse"], f", {plan['steps']} steps of {plan['sampler']}")
    if found is not None and found.winner is not None:
        row = found.winner.row
        shown = f"{row.speedup['median']:.2f}x, {number(row.psnr_db, '.1f')} dB"
        out.print(f"  held out  {shown} on {values['held_out']['images']} seeds")
    by = f" by {plan['method']}" if plan["method"] else ""
    out.print(f"  quant     {plan['quant']}{by}, {plan['merge']} tokens merged per block")
    db = values["verified"]["psnr_db"]
    exact = "the same images as" if db is None else f"within {db:.0f} dB of"
    out.print(f"  verified  {values['verified']['engine']} draws {exact} the reference")
    if values["fidelity"] is not None:
        out.print(f"  fidelity  {describe_steps_fidelity(values['fidelity'])}")
    decoding = f", {values['decode_bytes'] / 1e6:.1f} MB of it the VAE's decoder" if values["decode_bytes"] else ""
    out.print(f"  bundle    {values['bundle']} ({values['size_bytes'] / 1e6:.1f} MB{decoding})", soft_wrap=True)
