"""From a Diffusion Transformer and a plan to a verified bundle of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import Bundle, Manifest, write_bundle
from vitfold.artifacts.steps import DecodeGraph, SamplingPlan, StepFidelity, Steps
from vitfold.bench.environment import environment
from vitfold.bench.pictures import psnr_db
from vitfold.diffusion import ReuseMethod
from vitfold.diffusion.compare import SamplingConfig, draw, settled
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.conditions import Conditions
from vitfold.diffusion.decoding import Decoder, decoded_by, write_decoder
from vitfold.diffusion.eager import eager
from vitfold.diffusion.fidelity import fidelity_of
from vitfold.diffusion.opening import open_graphs, parts_of, prepare_tokens, step_params, step_target, write_parts
from vitfold.diffusion.sampling import conditions_of
from vitfold.engines import Session
from vitfold.errors import EngineError
from vitfold.model import Array, DenoiserModel, DiTModel
from vitfold.ops.half import Half
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.target import Target
from vitfold.version import __version__

LEAST_DB = 60.0
LEAST_INTEGER_DB = 30.0
"""Sums of integers are rounded elsewhere than in the reference, and steps add up what that makes of an image."""
_STEPS = 8


def save_steps(
    model: DiTModel | DenoiserModel,
    plan: SamplingPlan,
    method: ReuseMethod,
    compression: Compression,
    path: Path,
    *,
    search: Mapping[str, Any] | None = None,
    conditions: Conditions | None = None,
    decoder: Decoder | None = None,
    target: Target | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write the graphs of a plan and its method, and keep them if they draw what the reference interpreter draws.

    With a `decoder` a graph is written that makes images of latents. Graphs for the `target` of a GPU are checked on
    ONNX Runtime; None: they are for this processor.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
        EngineError: if the graphs draw something else, or half precision cannot hold a value.
        TargetError: if the target cannot execute what they hold.
        ParityError: if the decoder's graph decodes something else.
    """
    tokens = prepare_tokens(model, method, plan.steps, say) if isinstance(model, DiTModel) else None
    counts = () if tokens is None else tokens.counts
    found = parts_of(model, method, counts, compression.r)
    params = step_params(model, compression, tokens)
    target = target or step_target(quantized=compression.quantizers is not None)
    numbers = reference_of(params, compression, target)
    literal = target.runtime.gpu

    def write(folder: Path) -> Manifest:
        say("writing graphs")
        write_parts(found, params, folder, compression.quantizers, target)
        say("verifying")
        reference = eager(found, numbers)
        with open_graphs(found, folder, None, literal=literal) as session:
            able = reference if literal else session
            chosen = settled(model, able, method, _asked(model, plan, plan.steps, conditions))
            verified = {
                **_verify(model, plan, conditions, chosen, reference, session, rounds=_rounds(compression, target)),
                **_largest(numbers),
            }
            decode = None if decoder is None else write_decoder(decoder, folder, "portable" if literal else "cpu")
            fidelity = None
            if _rounds(compression, target) and search is None:
                say("drawing by float steps at held-out seeds")
                exact = step_params(model, replace(compression, params=None), tokens)
                fidelity = fidelity_of(model, plan, conditions, chosen, able, found, exact, decoded_by(decode, folder))
        made: dict[str, Any] = {"counts": counts, "decode": decode, "fidelity": fidelity, "search": search}
        return _manifest(model, plan, target, chosen, parts=tuple(found), verified=verified, **made)

    return write_bundle(path, write, overwrite=overwrite)


def _manifest(
    model: DiTModel | DenoiserModel,
    plan: SamplingPlan,
    target: Target,
    chosen: ReuseMethod,
    *,
    parts: tuple[str, ...],
    verified: Mapping[str, Any],
    counts: tuple[int, ...],
    decode: DecodeGraph | None,
    fidelity: StepFidelity | None,
    search: Mapping[str, Any] | None,
) -> Manifest:
    steps = Steps(
        spec=model.spec,
        schedule=model.schedule,
        labels=model.labels,
        origin=model.origin,
        latent=model.latent,
        decoder=model.decoder,
        plan=plan,
        parts=parts,
        counts=counts,
        mask=chosen.mask or (),
        weights=chosen.rows or None,
        rescale=chosen.rescale or None,
        decode=decode,
        fidelity=fidelity,
        search=None if search is None else {**search, "environment": environment()},
    )
    return Manifest(
        vitfold=__version__,
        labels=model.labels,
        target={"name": target.name, "engine": target.engine},
        origin=model.origin.to_dict(),
        model_digest=model.digest(),
        verified=verified,
        held=steps,
    )


def reference_of(params: Mapping[str, Array], compression: Compression, target: Target) -> Run:
    """Return the interpreter that rounds as the graphs of a target do."""
    if target.float_type == "float16":
        return Half(params, compression.quantizers or {})
    return Simulate(params, compression.quantizers) if compression.quantizers else Run(params)


def _rounds(compression: Compression, target: Target) -> bool:
    return compression.quantizers is not None or target.float_type == "float16"


def _largest(numbers: Run) -> dict[str, Any]:
    """The largest value that half precision had to hold, and where; nothing in single precision."""
    if not isinstance(numbers, Half):
        return {}
    value, site = numbers.check()
    return {"largest_value": value, "largest_site": site}


def _asked(
    model: DiTModel | DenoiserModel, plan: SamplingPlan, steps: int, conditions: Conditions | None
) -> SamplingConfig:
    return SamplingConfig(
        labels=(0, (conditions or conditions_of(model.spec)).count - 1),
        seed=0,
        steps=steps,
        sampler=plan.sampler,
        guidance=plan.guidance,
        batch=2,
        conditions=conditions,
    )


def _verify(
    model: DiTModel | DenoiserModel,
    plan: SamplingPlan,
    conditions: Conditions | None,
    method: ReuseMethod,
    reference: Session,
    session: Session,
    *,
    rounds: bool,
) -> dict[str, Any]:
    """Draw an image of the first and one of the last condition by both, in so few steps that each kind comes up."""
    steps = plan.steps if method.planner is not None else min(plan.steps, _STEPS)
    asked = _asked(model, plan, steps, conditions)
    drawn, expected = (draw(model, executor, method, asked).samples for executor in (session, reference))
    found_db = psnr_db(expected, drawn, peak=float(np.ptp(expected)))
    least = LEAST_INTEGER_DB if rounds else LEAST_DB
    if not np.isfinite(drawn).all() or (found_db is not None and not found_db >= least):
        raise EngineError(
            f"the graphs draw other images than the reference ({found_db} dB, at least {least:g} needed); "
            "this is a bug in the runtime or in vitfold: upgrade onnxruntime"
        )
    return {"engine": session.engine, "images": len(asked.labels), "steps": steps, "psnr_db": found_db}
