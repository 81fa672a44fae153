"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from vitfold.engines import EngineName

SOURCE = "How the source is loaded"
RECIPE = "What is done to it"
CALIBRATION = "Calibration"
SEARCH = "Search"
DIFFUSION = "Diffusion sampling"
_source, _recipe, _calibration, _search, _diffusion = (
    partial(typer.Option, rich_help_panel=panel) for panel in (SOURCE, RECIPE, CALIBRATION, SEARCH, DIFFUSION)
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="demo, timm:NAME, hf:REPO_OR_FOLDER, torchvision:NAME, open_clip:NAME, FILE.onnx, FILE.pt2, "
        "FILE.py:FUNCTION, or FILE.safetensors with --arch.",
    ),
]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle made by `vitfold optimize`.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        "--inputs",
        metavar="DIR",
        help="A folder of images, or of one sub-folder per class; of .npy arrays for models that take no images.",
    ),
]
NeededImages = Annotated[
    Path,
    typer.Option(
        "--images", "--inputs", metavar="DIR", help="A folder of images or .npy arrays, or of one sub-folder per class."
    ),
]
Arch = Annotated[str | None, _source(metavar="TIMM_NAME", help="Architecture of a .safetensors file.")]
NumClasses = Annotated[int | None, _source(min=0, help="Classes of the head; 0 for features.")]
ImageSize = Annotated[
    str | None, _source(metavar="SIDE|HxW", help="Input pixels per side, or 384x512; positions are resampled.")
]
Part = Annotated[
    str | None, _source(metavar="PATH", help="The part of a model that is taken, such as vision_model or encoder.")
]
Outputs = Annotated[
    str | None,
    _source(
        metavar="LIST",
        help="What the model gives, the first being compared: logits, embedding, tokens, layers:3,6, or names of "
        "outputs of a graph.",
    ),
]
Problem = Annotated[
    Literal["single_label", "multi_label", "regression", "map", "segmentation"] | None,
    _source(
        help="What a classifier's outputs stand for: one class, a yes or no each, or numbers; default: what the source "
        "says, else one class."
    ),
]
Preprocessing = Annotated[
    str | None,
    _source(
        metavar="FILE|FAMILY",
        help="How images are prepared for an ONNX file: a preprocessor_config.json, or as for vit, deit, dinov2, clip "
        "or siglip; default: what lies beside the file.",
    ),
]
Weights = Annotated[
    Literal["pretrained", "random"], _source(help="random: seeded random weights, for timing without a download.")
]
Seed = Annotated[int, _source(help="Seed of random weights.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of tables.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images per call.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; default: all usable cores.")]
Engine = Annotated[
    EngineName | None,
    typer.Option("--engine", metavar="ENGINE", help="Runs the bundle."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave unreadable images out instead of stopping.")]
ReferenceBundle = Annotated[
    Path | None,
    typer.Option(
        "--reference",
        metavar="BUNDLE",
        help="A bundle made with --merge none, to compare with where the source is gone.",
    ),
]
Merge = Annotated[
    str | None,
    _recipe(
        metavar="R",
        help="Tokens merged per block: 8, a list 8,8,4, R:INFLECTION as 8:-1, or none; align: few, to a multiple of 16 "
        "tokens. Or auto[:R], the fastest schedule on this machine (TensorRT: on --gpu) that distorts no more than a "
        "constant R (8).",
    ),
]
MergeRule = Annotated[
    Literal["tome", "nearest", "greedy", "tofu", "pitome", "evit"],
    _recipe(help="Which tokens go: tome merges the most similar pairs; see docs/sweeps.md for the others."),
]
Compensate = Annotated[
    bool,
    _recipe(
        "--compensate/--no-compensate",
        help="Refit weights in closed form to what merging changes, on --images (2000 are good, labels are not used); "
        "costs nothing at run time.",
    ),
]
Prune = Annotated[
    float | None,
    typer.Option(
        "--prune",
        metavar="SHARE",
        help="Take this share of the blocks' work away (0.3): heads, their widths and hidden units that the output "
        "needs least, found on --images and refitted on them (2000 are good, labels are not used).",
        rich_help_panel=RECIPE,
    ),
]
PruneMlp = Annotated[
    float | None,
    _recipe(
        "--prune-mlp",
        metavar="SHARE",
        help="Take this share of the hidden units of every MLP away (0.25) and refit the others in closed form, on "
        "--images (2000 are good, labels are not used).",
    ),
]
Quant = Annotated[
    str | None,
    _recipe(metavar="WxAy", help="Bits of weights and activations: w8a8, w6a6, w4a8, w4a4, ..., fp8, or none."),
]
Method = Annotated[
    str | None, _recipe(help="vitfold (default), ptq4vit, repq, noisy, smooth, mse, percentile or minmax.")
]
CalibrateMerged = Annotated[
    bool,
    _calibration(
        "--calibrate-merged/--calibrate-unmerged",
        help="Whether ranges and rounding are found on the model that merges, or on the one that does not.",
    ),
]
Polish = Annotated[
    float,
    _recipe(
        "--polish",
        min=0,
        metavar="MINUTES",
        help="Train weights, scales, biases and norms for so long behind calibration, to give what the float model "
        "gives, on the calibration images (labels are not used); kept only if held-out ones gain.",
    ),
]
Registers = Annotated[
    str | None,
    _recipe(
        metavar="REMEDY",
        help="What to do about sink tokens: auto (whichever measures best on --images, or nothing), prefix, delete, "
        "regcache, leave-out, float-sinks, split-scales, neurons, or none (default). See vitfold outliers.",
    ),
]
KeepFloat = Annotated[
    int, _recipe(min=0, metavar="N", help="Leave the N most sensitive layers float; see vitfold sensitivity.")
]
Target = Annotated[
    str | None,
    _recipe(
        help="What the graph is written for: cpu (quantized: this processor's instruction set), portable, "
        "cpu-avx2, cpu-vnni, cpu-amx, cpu-arm, openvino, openvino-bf16 (floats in bfloat16), tensorrt-fp16, "
        "tensorrt-int8, tensorrt-fp8, integer or simulation; fastest: cpu or openvino, whichever runs faster here. "
        "Default: cpu; a search tries cpu and openvino."
    ),
]
StepTarget = Annotated[
    str | None,
    typer.Option(
        help="What graphs are written for: this processor (default), cpu-avx2, cpu-vnni, portable, tensorrt-fp16, "
        "tensorrt-int8, ... Those of TensorRT are for vitfold audit and trtexec."
    ),
]
RecipeFile = Annotated[Path | None, _recipe(metavar="FILE.toml", help="Every choice in a file.")]
Repeat = Annotated[
    Path | None, _recipe("--from", metavar="BUNDLE", help="Make this bundle again, from the same images.")
]
KeepSlower = Annotated[
    bool, _recipe("--keep-slower", help="Keep a quantized bundle that is not faster than the float one.")
]
Batches = Annotated[
    str | None, _recipe(metavar="MIN,OPT,MAX", help="Batches that TensorRT builds its engine for, as 1,8,64.")
]
Gpu = Annotated[str, _recipe(help="The GPU that --merge auto models: H100, A100, L4, T4, ...")]
MaxDrop = Annotated[
    float | None,
    _search(
        min=0,
        metavar="POINTS",
        help="Search the fastest recipe that loses at most so many points of top-1, or, "
        "without class folders, of agreement.",
    ),
]
MaxLatency = Annotated[
    float | None, _search(min=0, metavar="MS", help="Search the most accurate recipe that takes at most this.")
]
SearchMinutes = Annotated[float, _search(min=0.1, help="When a search stops trying; the same command goes on.")]
CalibrationImages = Annotated[
    Path | None,
    _calibration(metavar="DIR", help="Images from which quantization, also of peers, takes ranges; measure on others."),
]
CalibrationSize = Annotated[
    int, _calibration(min=1, help="Images for calibration, of --calibration-images where that is given, else --images.")
]
CalibrationSeed = Annotated[int, _calibration(help="Seed that draws them.")]
QuantTarget = Annotated[str, typer.Option(help="As in optimize: decides what is quantized and how.")]
Trials = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Recorded seconds per subject and scope.")]
TimedImages = Annotated[int, typer.Option("--limit", min=1, help="Images used, spread evenly over --images.")]
Exif = Annotated[
    Literal["apply", "ignore"] | None,
    _source(
        "--exif", help="Whether images are turned by their EXIF orientation; default: as the source's own pipeline."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many images, spread evenly.")]
JsonFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE.json", help="Write the same document as --json to this file."),
]
SamplesFile = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="FILE.json", help="Write the JSON with every raw sample to this file."),
]
MinAgreement = Annotated[
    float | None, typer.Option(min=0, max=1, help="Exit with 3 if top-1 agreement on --images is lower.")
]

StepCount = Annotated[int | None, _diffusion("--steps", help="Denoising steps; default: 50, or the bundle's.")]
Sampler = Annotated[str | None, _diffusion(help="ddim, dpm++ or ddpm; default: the folder's own, or the bundle's.")]
Guidance = Annotated[
    float | None, _diffusion(help="Scale of classifier-free guidance, 1 for none; default: 1.5, or the bundle's.")
]
Real = Annotated[
    Path | None,
    _diffusion(
        "--real",
        metavar="DIR|FILE",
        help="Real images, or their features in real.safetensors, for a Frechet distance to them.",
    ),
]
Features = Annotated[
    str | None,
    _diffusion(
        metavar="SOURCE", help="The vision transformer whose features that distance takes; a judge beside SOURCE."
    ),
]
Heads = Annotated[int | None, _diffusion(min=1, help="Attention heads of a state dict.")]
Reuse = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="How steps are reused, as for diffusion sample; auto: the fastest way to draw that keeps --min-psnr "
        "(30 dB if no bound is named), --max-psnr-drop and --max-fid-rise.",
    ),
]
StepMerge = Annotated[
    str | None, typer.Option(metavar="R", help="Tokens merged before every attention and given back behind it.")
]
StepQuant = Annotated[
    str | None, typer.Option(metavar="w8a8", help="8-bit linear layers in the blocks, or none; auto tries both.")
]
StepMethod = Annotated[
    str | None,
    typer.Option(
        help="How --quant rounds: gptq (default; clips nothing), vitfold, ptq4vit, repq, noisy, smooth, mse, "
        "percentile or minmax."
    ),
]
MinPsnr = Annotated[float | None, _search(metavar="DB", help="Least PSNR to the unaccelerated images at equal seeds.")]
MaxPsnrDrop = Annotated[
    float | None,
    _search(
        min=0, metavar="DB", help="How much further from the images of four times the steps than the plain sampler."
    ),
]
MaxFidRise = Annotated[float | None, _search(min=0, help="How much larger a Frechet distance to --real by --features.")]
Samples = Annotated[
    int | None, _search(min=2, help="Held-out images that confirm the winner; default: 32, or 256 for a FID.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")]
