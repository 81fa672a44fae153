"""From a model to a verified bundle: fold, emit, verify against the reference, compare, write.

Owns the order of the steps. Each step's work is done by the layer below that owns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.bench.evaluation import run_over
from vitfold.bench.fidelity import Fidelity
from vitfold.bundle import Bundle, Manifest, has_trained_weights, write_bundle
from vitfold.errors import EngineError, RecipeError
from vitfold.images import ImageSet, batches
from vitfold.model import Model, ViTSpec, param_shapes
from vitfold.model.folds import fold_layer_scale
from vitfold.ops.count import Count, SiteCost
from vitfold.programs.vit import vit
from vitfold.recipe import MergeRecipe, Recipe, parse_recipe, tokens_per_block
from vitfold.reference import Reference, compare_outputs, reference_outputs
from vitfold.schedule import resolve_r
from vitfold.target import Target, find_target
from vitfold.version import __version__

VERIFY_IMAGES = 4
VERIFY_RELATIVE_ERROR = 1e-4
FIDELITY_IMAGES = 200
Merge = str | int | Sequence[int] | None
Step = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folded:
    """A model with a resolved recipe and a target, ready to be saved.

    `model` is the one that was loaded; `params` and spec of `folded` went through the exact folds.
    """

    model: Model
    folded: Model
    recipe: Recipe
    target: Target

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that enter each block, and those that leave the last."""
        return tokens_per_block(self.model.spec, self.recipe.merge.r)

    def costs(self) -> tuple[SiteCost, ...]:
        """Work per site for one image."""
        return count_costs(self.folded.spec, self.recipe.merge)


def optimize(model: Model, *, merge: Merge = None, recipe: Recipe | None = None, target: str = "cpu") -> Folded:
    """Resolve the recipe for this model and apply the exact folds.

    Args:
        merge: r per block as `schedule.resolve_r` takes it; not together with `recipe`.

    Raises:
        RecipeError: if the schedule does not fit the model.
        TargetError: if the target is unknown.
    """
    if recipe is not None and merge is not None:
        raise RecipeError("give either a recipe or a merge schedule, not both")
    if recipe is None:
        recipe = Recipe(merge=MergeRecipe(r=resolve_r(merge, model.spec)))
    tokens_per_block(model.spec, recipe.merge.r)
    return Folded(model=model, folded=fold_layer_scale(model), recipe=recipe, target=find_target(target))


def read_recipe(path: str | Path, spec: ViTSpec) -> Recipe:
    """Read a recipe file and resolve it for an architecture: `merge.r` may be any form of --merge.

    Raises:
        RecipeError: if the file is missing, not TOML, has unknown keys, or does not fit.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}; see recipes/ for examples") from None
    merge = parse_recipe(text, name=str(path)).get("merge", {})
    prop_attn = merge.get("prop_attn", True)
    if not isinstance(prop_attn, bool):
        raise RecipeError(f"{path}: merge.prop_attn must be true or false, found {prop_attn!r}")
    return Recipe(merge=MergeRecipe(r=resolve_r(merge.get("r"), spec), prop_attn=prop_attn))


def count_costs(spec: ViTSpec, recipe: MergeRecipe) -> tuple[SiteCost, ...]:
    """Return the work per site for one image, without any weights."""
    required, optional = param_shapes(spec)
    count = Count(required | optional)
    vit(count, spec, recipe, (1, spec.channels, *spec.image_size))
    return tuple(count.costs)


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
    from vitfold.engines.onnxruntime import OnnxRuntimeSession
    from vitfold.ops.emit import emit_graph, write_onnx

    say = step or (lambda _: None)
    model = folded.model
    digest = model.digest()

    def write(onnx_path: Path) -> Manifest:
        say("emitting ONNX")
        graph = emit_graph(
            lambda ops, image: vit(ops, folded.folded.spec, folded.recipe.merge, image), folded.folded, folded.target
        )
        write_onnx(graph, onnx_path)
        say("verifying in the engine")
        pixels = _verification_images(model, images)
        expected = run_reference(folded, pixels)
        fidelity: Fidelity | None = None
        with OnnxRuntimeSession(onnx_path) as session:
            session.bind(pixels)
            session.run()
            verified = _verify(expected, session.fetch())
            verified["engine"] = session.engine
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
            spec=model.spec,
            preprocess=model.preprocess,
            labels=model.labels,
            recipe=folded.recipe,
            target=folded.target.to_dict(),
            tokens=folded.tokens,
            macs=graph.macs,
            origin=model.origin.to_dict(),
            model_digest=digest,
            verified=verified,
            fidelity=None if fidelity is None else fidelity.to_dict(),
        )

    return write_bundle(path, write, overwrite=overwrite)


def run_reference(folded: Folded, pixels: Float[np.ndarray, "B 3 H W"]) -> Float[np.ndarray, "B ..."]:
    """Run the loaded model with the recipe in the reference interpreter."""
    import torch

    from vitfold.ops.run import Run

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


def _verify(expected: Float[np.ndarray, "B ..."], found: Float[np.ndarray, "B ..."]) -> dict[str, Any]:
    """Compare image by image; one image may differ more, where rounding turned a tie in matching."""
    rows = (len(expected), -1)
    if not np.isfinite(found).all():
        raise EngineError("the engine returns NaN or infinite values; the weights overflow float32 on ordinary images")
    scale = np.abs(expected.reshape(rows)).max(axis=1)
    errors = np.abs(found.reshape(rows) - expected.reshape(rows)).max(axis=1) / scale
    median = float(np.median(errors))
    if median > VERIFY_RELATIVE_ERROR:
        raise EngineError(
            f"the engine's output differs from the reference by {median:.1e} relative (bound "
            f"{VERIFY_RELATIVE_ERROR:.0e}); this is a bug in the runtime or in vitfold: upgrade onnxruntime, "
            "or try --target portable"
        )
    return {"images": len(errors), "median_relative_error": median, "max_relative_error": float(errors.max())}
