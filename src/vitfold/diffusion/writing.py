"""From a Diffusion Transformer and a plan to a verified bundle of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import Bundle, Manifest, write_bundle
from vitfold.artifacts.steps import SamplingPlan, Steps
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
from vitfold.model import DenoiserModel, DiTModel
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
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
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Bundle:
    """Write the graphs of a plan and its method, and keep them if they draw what the reference interpreter draws.

    With a `decoder` a graph is written that makes images of latents.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
        EngineError: if the graphs draw something else.
        ParityError: if the decoder's graph decodes something else.
    """
    tokens = prepare_tokens(model, method, plan.steps, say) if isinstance(model, DiTModel) else None
    counts = () if tokens is None else tokens.counts
    found = parts_of(model, method, counts, compression.r)
    params = step_params(model, compression, tokens)

    def write(folder: Path) -> Manifest:
        say("writing graphs")
        write_parts(found, params, folder, compression.quantizers)
        say("verifying")
        simulate = Simulate(params, compression.quantizers) if compression.quantizers else Run(params)
        with open_graphs(found, folder, None) as session:
            chosen = settled(model, session, method, _asked(model, plan, plan.steps, conditions))
            verified = _verify(model, plan, conditions, chosen, eager(found, simulate), session)
            decode = None if decoder is None else write_decoder(decoder, folder)
            fidelity = None
            if compression.quantizers is not None and search is None:
                say("drawing by float steps at held-out seeds")
                exact = step_params(model, replace(compression, params=None), tokens)
                fidelity = fidelity_of(
                    model, plan, conditions, chosen, session, found, exact, decoded_by(decode, folder)
                )
        target = step_target(quantized=compression.quantizers is not None)
        steps = Steps(
            spec=model.spec,
            schedule=model.schedule,
            labels=model.labels,
            origin=model.origin,
            latent=model.latent,
            decoder=model.decoder,
            plan=plan,
            parts=tuple(found),
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

    return write_bundle(path, write, overwrite=overwrite)


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
) -> dict[str, Any]:
    """Draw an image of the first and one of the last condition by both, in so few steps that each kind comes up."""
    steps = plan.steps if method.planner is not None else min(plan.steps, _STEPS)
    asked = _asked(model, plan, steps, conditions)
    drawn, expected = (draw(model, executor, method, asked).samples for executor in (session, reference))
    found_db = psnr_db(expected, drawn, peak=float(np.ptp(expected)))
    least = LEAST_DB if plan.quant == "none" else LEAST_INTEGER_DB
    if not np.isfinite(drawn).all() or (found_db is not None and not found_db >= least):
        raise EngineError(
            f"the graphs draw other images than the reference ({found_db} dB, at least {least:g} needed); "
            "this is a bug in the runtime or in vitfold: upgrade onnxruntime"
        )
    return {"engine": session.engine, "images": len(asked.labels), "steps": steps, "psnr_db": found_db}
