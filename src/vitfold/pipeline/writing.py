"""From a planned and calibrated model to a verified bundle: emit, verify, compare, write.

Owns the order of the steps, and how near an engine has to come to the reference interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors.numpy import save_file

from vitfold.bench.evaluation import run_over
from vitfold.bench.fidelity import Fidelity
from vitfold.bundle import MODEL, QUANTIZERS, WEIGHTS, Bundle, Manifest, has_trained_weights, write_bundle
from vitfold.engines import TENSORRT, Session, open_graph
from vitfold.engines.trtexec import DEFAULT_BATCH, trtexec_command
from vitfold.errors import EngineError, RecipeError
from vitfold.images import ImageSet, batches
from vitfold.model import Model
from vitfold.pipeline.plan import Folded
from vitfold.programs.vit import vit
from vitfold.reference import Reference, compare_outputs, reference_outputs
from vitfold.version import __version__

VERIFY_IMAGES = 4
VERIFY_RELATIVE_ERROR = 1e-4
VERIFY_HALF_ERROR = 5e-2
VERIFY_NOISE_FACTOR = 5.0
HALF_STEP = np.float32(2.0**-10)
FIDELITY_IMAGES = 200
Step = Callable[[str], None]


def save(
    folded: Folded,
    path: str | Path,
    *,
    images: ImageSet | None = None,
    overwrite: bool = False,
    step: Step | None = None,
) -> Bundle:
    """Emit, verify in the engine against the reference interpreter, compare on images, write the bundle.

    The bundle appears only when all of that succeeded.

    Raises:
        EngineError: if the engine's output is not that of the reference interpreter.
        BundleError: if the bundle cannot be written.
    """
    if folded.needs_calibration:
        raise RecipeError("the recipe quantizes and the model is not calibrated; call calibrate_folded before save")
    say = step or (lambda _: None)
    model = folded.model
    digest = model.digest()

    def write(onnx_path: Path) -> Manifest:
        macs = _write_files(folded, onnx_path, say)
        say("verifying in the engine")
        pixels = _verification_images(model, images)
        fidelity: Fidelity | None = None
        with _open(folded, onnx_path) as session:
            session.bind(pixels)
            session.run()
            verified = {**_verify(folded, pixels, session.fetch()), "engine": session.engine}
            if images is not None and has_trained_weights(model.origin.to_dict()):
                say("comparing with the unfolded model")
                subset = images.first(FIDELITY_IMAGES)
                fidelity = compare_outputs(
                    run_over(session, subset, model.preprocess),
                    subset,
                    labels=model.labels,
                    classifies=model.spec.output == "logits",
                    reference=reference_outputs(digest, subset, model.preprocess, lambda: Reference(model=model)),
                )
        return Manifest(
            vitfold=__version__,
            spec=folded.folded.spec if folded.simulated else model.spec,
            preprocess=model.preprocess,
            labels=model.labels,
            recipe=folded.recipe,
            target=_target(folded),
            tokens=folded.tokens,
            macs=macs,
            origin=model.origin.to_dict(),
            model_digest=digest,
            verified=verified,
            fidelity=None if fidelity is None else fidelity.to_dict(),
            calibration=folded.calibration,
        )

    return write_bundle(path, write, overwrite=overwrite)


def _target(folded: Folded) -> dict[str, Any]:
    """The target; for TensorRT with the line that builds the engine, and the batches where they were chosen."""
    target = folded.target.to_dict()
    if folded.target.engine != TENSORRT:
        return target
    chosen = {} if folded.batch is None else {"batch": list(folded.batch)}
    line = trtexec_command(MODEL, folded.batch or DEFAULT_BATCH, image_size=folded.model.spec.image_size)
    return target | chosen | {"trtexec": line}


def _write_files(folded: Folded, onnx_path: Path, say: Step) -> int:
    """Write the graph, or weights where there is none, and the quantizers; return MACs per image."""
    if folded.quantizers is not None:
        folded.quantizers.save(onnx_path.with_name(QUANTIZERS))
    if folded.simulated:
        params = {name: np.ascontiguousarray(array) for name, array in folded.folded.params.items()}
        save_file(params, onnx_path.with_name(WEIGHTS))
        return sum(cost.macs for cost in folded.costs())
    say("emitting ONNX")
    return write_graph(folded, onnx_path)


def write_graph(folded: Folded, path: Path) -> int:
    """Write the ONNX graph alone; return MACs per image."""
    from vitfold.ops.emit import emit_graph, write_onnx

    graph = emit_graph(
        lambda ops, image: vit(ops, folded.folded.spec, folded.recipe.merge, image),
        folded.folded,
        folded.target,
        folded.quantizers,
    )
    write_onnx(graph, path)
    return graph.macs


def _open(folded: Folded, onnx_path: Path) -> Session:
    """Open what was written; a graph for TensorRT is checked on ONNX Runtime, wherever it was made."""
    if folded.simulated:
        return simulation(folded)
    if folded.target.engine == TENSORRT:
        return open_graph(onnx_path, "onnxruntime", literal=True)
    return open_graph(onnx_path, folded.target.engine)


def simulation(folded: Folded) -> Session:
    """Return the simulation of a calibrated model as a session."""
    from vitfold.engines.simulation import SimulationSession

    return SimulationSession(
        folded.folded.spec,
        folded.folded.params,
        folded.quantizers or {},
        folded.recipe.merge,
        reordered=folded.target.quantized_product == "integer",
    )


def run_reference(folded: Folded, pixels: Float[np.ndarray, "B 3 H W"]) -> Float[np.ndarray, "B ..."]:
    """Run the recipe in the reference interpreter: the loaded model, or the simulation where it is quantized."""
    import torch

    from vitfold.ops.run import Run

    if folded.quantizers is not None:
        with simulation(folded) as session:
            session.bind(pixels)
            session.run()
            return session.fetch()
    with torch.inference_mode():
        output = vit(Run(folded.model.params), folded.model.spec, folded.recipe.merge, torch.from_numpy(pixels))
    result: Float[np.ndarray, "B ..."] = output.numpy()
    return result


def _verification_images(model: Model, images: ImageSet | None) -> Float[np.ndarray, "B 3 H W"]:
    if images is not None:
        first = images.first(VERIFY_IMAGES)
        return next(iter(batches(first, model.preprocess, batch=VERIFY_IMAGES))).pixel_values
    shape = (VERIFY_IMAGES, model.spec.channels, *model.spec.image_size)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _verify(folded: Folded, pixels: Float[np.ndarray, "B 3 H W"], found: Float[np.ndarray, "B ..."]) -> dict[str, Any]:
    """Compare image by image; one image may differ more, where rounding turned a tie in matching.

    A quantized graph is exact locally and chaotic globally: one code that rounds the other way spreads. So it
    may differ by a few times what the simulation differs from itself when its input moves by one part in a million,
    in half precision when every pixel moves by one unit in the last place.
    """
    if not np.isfinite(found).all():
        raise EngineError("the engine returns NaN or infinite values; the weights overflow float32 on ordinary images")
    expected = run_reference(folded, pixels)
    errors = _relative_errors(expected, found)
    bound, noise = VERIFY_RELATIVE_ERROR, None
    half = folded.target.float_type == "float16"
    if folded.quantizers is not None or half:
        step = HALF_STEP * _signs(pixels.shape) if half else np.float32(1e-6)
        moved = run_reference(folded, pixels * (1 + step))
        noise = float(np.median(_relative_errors(expected, moved)))
        bound = max(VERIFY_HALF_ERROR if half else bound, VERIFY_NOISE_FACTOR * noise)
    median = float(np.median(errors))
    if median > bound:
        raise EngineError(
            f"the engine's output differs from the reference by {median:.1e} relative (bound {bound:.0e}); this is a "
            f"bug in the runtime or in vitfold: upgrade {folded.target.engine}, or try --target portable"
        )
    verified: dict[str, Any] = {
        "images": len(errors),
        "median_relative_error": median,
        "max_relative_error": float(errors.max()),
    }
    return verified if noise is None else {**verified, "simulation_self_noise": noise}


def _signs(shape: tuple[int, ...]) -> Float[np.ndarray, "B 3 H W"]:
    """Plus and minus ones, drawn with a fixed seed."""
    return np.random.default_rng(0).choice(np.array([-1, 1], np.float32), shape)


def _relative_errors(
    expected: Float[np.ndarray, "B ..."], found: Float[np.ndarray, "B ..."]
) -> Float[np.ndarray, " B"]:
    rows = (len(expected), -1)
    errors: Float[np.ndarray, " B"] = np.abs(found.reshape(rows) - expected.reshape(rows)).max(axis=1)
    relative: Float[np.ndarray, " B"] = errors / np.abs(expected.reshape(rows)).max(axis=1)
    return relative
