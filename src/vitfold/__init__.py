"""vitfold: pretrained Vision Transformers made fast without retraining, with an honest account of the cost.

The public interface, one page: `load` or `adapt` a model, `optimize` it, `save` a bundle, `open` it and call it on
images. Making bundles needs `pip install 'vitfold[optimize]'`; opening them does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.errors import (
    BundleError,
    EngineError,
    GateError,
    ImageError,
    ParityError,
    RecipeError,
    SourceError,
    TargetError,
    VitfoldError,
)
from vitfold.images import ImageSet, find_images
from vitfold.model import Model, Preprocess, ViTSpec
from vitfold.pipeline import Plan, optimize, read_recipe, save
from vitfold.recipe import MergeRecipe, Recipe
from vitfold.serve.predictor import Prediction, Predictor
from vitfold.serve.predictor import open_predictor as open
from vitfold.version import __version__

if TYPE_CHECKING:
    import torch

    from vitfold.diffusion.conditions import Prompts
    from vitfold.diffusion.pipelines import StepPlan
    from vitfold.engines.network import Network

__all__ = [
    "Bundle",
    "BundleError",
    "EngineError",
    "GateError",
    "ImageError",
    "ImageSet",
    "MergeRecipe",
    "Model",
    "ParityError",
    "Plan",
    "Prediction",
    "Predictor",
    "Preprocess",
    "Recipe",
    "RecipeError",
    "SourceError",
    "TargetError",
    "ViTSpec",
    "VitfoldError",
    "__version__",
    "accelerate",
    "adapt",
    "embed_prompts",
    "export_steps",
    "find_images",
    "load",
    "load_plan",
    "open",
    "open_bundle",
    "optimize",
    "plan_steps",
    "read_recipe",
    "restore",
    "save",
    "torch_module",
]


def load(source: str, **options: Any) -> Model:
    """Load a pretrained model: "timm:vit_base_patch16_224", "hf:FOLDER", "FILE.safetensors" with arch=..., ...

    Options are those of `vitfold.sources.load_source`: arch, num_classes, image_size, weights, seed,
    problem.

    Raises:
        SourceError: if it cannot be loaded, or has a feature that vitfold does not run.
        ParityError: if the loaded model would not compute what the original computes.
    """
    from vitfold.sources import load_source

    return load_source(source, **options).model


def adapt(module: torch.nn.Module, **options: Any) -> Model:
    """Take over a torch module of a supported class; options: preprocess, labels, problem.

    Raises:
        SourceError: if its class or one of its features is not supported.
        ParityError: if the result would not compute what the module computes.
    """
    from vitfold.sources import adapt as adapt_module

    return adapt_module(module, **options)


def torch_module(bundle: Bundle, part: str = "main") -> Network:
    """Return a bundle as a torch module, images (B, 3, H, W) to its output, for any device and float type.

    `torch.compile(vitfold.torch_module(bundle).to("cuda", torch.float16), fullgraph=True)` takes it whole.

    Raises:
        EngineError: if its graph holds what torch has no rule for.
    """
    from vitfold.engines.network import torch_module as module_of

    return module_of(bundle, part)


def plan_steps(pipe: Any, prompts: Any, **options: Any) -> StepPlan:
    """Return which steps of a pipeline of diffusers to compute in full, confirmed on prompts and seeds held out.

    Options are those of `vitfold.diffusion.pipelines.plan_steps`: steps, full, min_psnr, max_seconds, held_out, seeds,
    and arguments of the pipeline such as guidance_scale.

    Raises:
        VitfoldError: as its kinds say there.
    """
    from vitfold.diffusion import pipelines

    return pipelines.plan_steps(pipe, prompts, **options)


def accelerate(pipe: Any, plan: Any) -> Any:
    """Let a pipeline of diffusers follow a plan, or the file of one; it is then called as before.

    Raises:
        RecipeError: if the plan is of another model, scheduler, number of steps or guidance.
    """
    from vitfold.diffusion import pipelines

    return pipelines.accelerate(pipe, plan)


def export_steps(pipe: Any, plan: Any, prompts: Any, path: Any, **options: Any) -> Bundle:
    """Write the steps of a pipeline of diffusers by a plan, or by a method such as "fitted:14", as a bundle of graphs.

    Options are those of `vitfold.diffusion.exporting.export_steps`: steps, quant, quant_method, vae, target, overwrite,
    and arguments of the pipeline.

    Raises:
        VitfoldError: as its kinds say there.
    """
    from vitfold.diffusion import exporting

    return exporting.export_steps(pipe, plan, prompts, path, **options)


def embed_prompts(pipe: Any, prompts: Any, **call: Any) -> Prompts:
    """Return prompts as a pipeline of diffusers hands them to its transformer; `.save(FILE)` is for `--embeddings`.

    Raises:
        UnsupportedError: if the pipeline calls its transformer in another way than once a step.
        RecipeError: if prompts come to different shapes.
    """
    from vitfold.diffusion import lifting

    return lifting.embed_prompts(pipe, prompts, **call)


def restore(pipe: Any) -> Any:
    """Take a plan off a pipeline, and return the pipeline."""
    from vitfold.diffusion import pipelines

    return pipelines.restore(pipe)


def load_plan(path: Any) -> StepPlan:
    """Read a plan of steps that `StepPlan.save` wrote.

    Raises:
        RecipeError: if there is none, or it is damaged.
    """
    from vitfold.diffusion import pipelines

    return pipelines.load_plan(path)
