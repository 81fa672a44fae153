"""What quantization costs: quantized steps and the same steps in float, at seeds that calibration has not seen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vitfold.artifacts.steps import SamplingPlan, StepFidelity
from vitfold.bench.pictures import psnr_db
from vitfold.diffusion.compare import SamplingConfig, draw, peak_of, shown_by
from vitfold.diffusion.conditions import Conditions
from vitfold.diffusion.decoding import Decode, in_unit_range
from vitfold.diffusion.methods import ReuseMethod
from vitfold.diffusion.opening import open_graphs, write_parts
from vitfold.diffusion.parts import Part
from vitfold.diffusion.sampling import conditions_of
from vitfold.diffusion.search import HELD_OUT_SEED
from vitfold.engines import Session
from vitfold.model import Array, DenoiserModel, DiTModel

IMAGES = 4


def fidelity_of(
    model: DiTModel | DenoiserModel,
    plan: SamplingPlan,
    conditions: Conditions | None,
    method: ReuseMethod,
    session: Session,
    found: Mapping[str, Part],
    params: Mapping[str, Array],
    decode: Decode | None,
) -> StepFidelity:
    """Draw a few images by a session of quantized parts, and by the same parts in float, with `params`.

    Images are compared where something decodes latents, or where they are no latents.

    Raises:
        EngineError: if ONNX Runtime refuses a graph.
    """
    last = (conditions or conditions_of(model.spec)).count - 1
    asked = SamplingConfig(
        labels=tuple(np.linspace(0, last, IMAGES).round().astype(int).tolist()),
        seed=HELD_OUT_SEED,
        steps=plan.steps,
        sampler=plan.sampler,
        guidance=plan.guidance,
        batch=1,
        conditions=conditions,
    )
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        write_parts(found, params, Path(folder))
        with open_graphs(found, Path(folder), None) as plain:
            pair = [draw(model, executor, method, asked).samples for executor in (plain, session)]
    decode = decode or (None if model.latent else in_unit_range)
    exact, rounded = (shown_by(samples, decode) for samples in pair)
    return StepFidelity(
        of="latents" if decode is None else "images",
        images=IMAGES,
        seed=HELD_OUT_SEED,
        psnr_db=psnr_db(exact, rounded, peak=peak_of(exact)),
    )
