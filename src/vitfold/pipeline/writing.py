"""From a planned and calibrated model to a verified bundle: emit, verify, compare, write."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitfold.architectures.programs import deployed_program
from vitfold.artifacts.bundle import MODEL, QUANTIZERS, WEIGHTS, Bundle, Manifest, has_trained_weights, write_bundle
from vitfold.artifacts.vision import Vision
from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import run_over
from vitfold.bench.fidelity import Fidelity
from vitfold.bench.reference import Reference, compare_outputs, reference_outputs
from vitfold.engines import Session
from vitfold.engines.trtexec import DEFAULT_BATCH, trtexec_command
from vitfold.errors import RecipeError
from vitfold.images import ImageSet
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.verifying import open_written, simulation, verification_images, verify_written
from vitfold.program import replay
from vitfold.program.queries import projections_of
from vitfold.progress import Say
from vitfold.version import __version__

_log = logging.getLogger(__name__)
FIDELITY_IMAGES = 200


def save(
    folded: Plan,
    path: str | Path,
    *,
    images: ImageSet | None = None,
    overwrite: bool = False,
    step: Say | None = None,
) -> Bundle:
    """Emit, verify in the engine against the reference interpreter, compare on images, write the bundle.

    The bundle appears only when all of that succeeded.

    Raises:
        EngineError: if the engine's output is not that of the reference interpreter.
        ImageError: if class folders do not fit the model's classes, or an image cannot be read.
        BundleError: if the bundle cannot be written.
    """
    if folded.needs_calibration:
        raise RecipeError("the recipe quantizes and the model is not calibrated; call calibrate_plan before save")
    if folded.needs_compensation:
        raise RecipeError("the recipe refits weights and that was not done; call compensate_plan before save")
    say = step or (lambda _: None)
    model = folded.model
    if images is not None and images.classes is not None and model.spec.head == "single_label":
        class_targets(images, model.labels, model.spec.output_width)
    digest = model.digest()

    def write(folder: Path) -> Manifest:
        onnx_path = folder / MODEL
        macs = _write_files(folded, onnx_path, say)
        say("verifying in the engine")
        with open_written(folded, onnx_path) as session:
            verified = verify_written(folded, verification_images(model, images), session, onnx_path)
            if verified.remark is not None:
                _log.warning("%s", verified.remark)
            fidelity: Fidelity | None = None
            if images is not None and has_trained_weights(model.origin.to_dict()):
                say("comparing with the unfolded model")
                fidelity = _fidelity(folded, session, images.first(FIDELITY_IMAGES), digest)
        vision = Vision(
            spec=folded.folded.spec if folded.simulated else model.spec,
            preprocess=model.preprocess,
            recipe=folded.recipe,
            tokens=folded.tokens,
            macs=macs,
            fidelity=None if fidelity is None else fidelity.to_dict(),
            calibration=folded.calibration,
            compensation=folded.compensation,
        )
        return Manifest(
            vitfold=__version__,
            labels=model.labels,
            target=_target(folded),
            origin=model.origin.to_dict(),
            model_digest=digest,
            verified=verified.to_dict(),
            held=vision,
        )

    return write_bundle(path, write, overwrite=overwrite)


def _fidelity(folded: Plan, session: Session, images: ImageSet, digest: str) -> Fidelity:
    """Compare with the unfolded model; a graph in half precision by its simulation, which rounds as a GPU does.

    Raises:
        EngineError: if half precision cannot hold a value.
    """
    model = folded.model
    half = simulation(folded) if folded.target.float_type == "float16" else None
    with contextlib.nullcontext(session) if half is None else half as judged:
        try:
            outputs = run_over(judged, images, model.preprocess)
        finally:
            if half is not None:
                half.check_half()  # names the layer where half precision ends, also where outputs are not finite
    return compare_outputs(
        outputs,
        images,
        labels=model.labels,
        head=model.spec.head,
        reference=reference_outputs(digest, images, model.preprocess, lambda: Reference(model=model)),
    )


def _target(folded: Plan) -> dict[str, Any]:
    """The target; for TensorRT with the line that builds the engine, and the batches where they were chosen."""
    target = folded.target.to_dict()
    if not folded.target.runtime.builds_for_batches:
        return target
    chosen = {} if folded.batch is None else {"batch": list(folded.batch)}
    line = trtexec_command(MODEL, folded.batch or DEFAULT_BATCH, image_size=folded.model.spec.image_size)
    return target | chosen | {"trtexec": line}


def _write_files(folded: Plan, onnx_path: Path, say: Say) -> int:
    """Write the graph, or weights where there is none, and the quantizers; return MACs per image."""
    if folded.quantizers is not None:
        folded.quantizers.save(onnx_path.with_name(QUANTIZERS))
    if folded.simulated:
        params = {name: np.ascontiguousarray(array) for name, array in folded.folded.params.items()}
        save_file(params, onnx_path.with_name(WEIGHTS))
        return sum(cost.macs for cost in folded.costs())
    say("emitting ONNX")
    return write_graph(folded, onnx_path)


def write_graph(folded: Plan, path: Path) -> int:
    """Write the ONNX graph alone; return MACs per image."""
    from vitfold.ops.emit import emit_graph, write_onnx

    program = deployed_program(folded.folded.spec, folded.recipe.merge, folded.whole_attentions)
    graph = emit_graph(
        lambda ops, image: replay(program, ops, image),
        folded.folded,
        folded.target,
        folded.quantizers,
        projections=projections_of(program),
    )
    write_onnx(graph, path)
    return graph.macs
