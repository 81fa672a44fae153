"""From a float model and calibration images to a model on its grid and the quantizers of its sites.

The order of the steps of a method: collect, fold, search, round. Each step is a module beside this one; a method
says which of them it uses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import torch

from vitfold.errors import CalibrationError, RecipeError, nearest
from vitfold.images import ImageSet
from vitfold.model import Architecture, Array, Model
from vitfold.progress import Advance, Say
from vitfold.quant.attention import search_attention
from vitfold.quant.calibration_cache import search_once
from vitfold.quant.collect import Samples, collect
from vitfold.quant.float8 import search_attention_float8, search_linear_float8
from vitfold.quant.folding import center_norms, fold_channels
from vitfold.quant.handing import hand_on
from vitfold.quant.linear import LinearProblem, search_apart, search_linear
from vitfold.quant.methods import find_method
from vitfold.quant.moments import collect_moments, round_weights
from vitfold.quant.network import Examples, ImageExamples, Network, network_of
from vitfold.quant.outputs import search_outputs
from vitfold.quant.ranges import rounded
from vitfold.quant.rotation import rotate_streams, turn_heads
from vitfold.quant.sites import AttentionSite, LinearSite, find_sites
from vitfold.quantizer import NARROW_BITS, Quantizer, QuantParams, Uniform, in_half
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.target import Target
from vitfold.transforms.sinks import PREFIX_ROWS

LEAST_IMAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConstraints:
    """What a target can execute.

    `symmetric` weights and attention operands have the zero point 0, and zero points of other activations fold into
    biases; `weight_bits` caps 8-bit weights; `uniform_only` leaves
    out quantizers that cost a second product or exist in the simulation only, where the method has a choice;
    `half_scales` rounds every scale to FP16, in which the graph will hold it; `hands_on` rounds outputs to what reads
    them, not to a grid before scale and bias.
    """

    symmetric: bool = False
    weight_bits: int = 8
    uniform_only: bool = True
    half_scales: bool = False
    hands_on: bool = False

    @classmethod
    def of(cls, target: Target) -> QuantConstraints:
        """Return what calibration has to respect on a target."""
        return cls(
            symmetric=target.symmetric,
            weight_bits=target.weight_bits,
            uniform_only=not target.simulated,
            half_scales=target.float_type == "float16",
            hands_on=target.hands_on,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibrated:
    """A model whose weights lie on their grids, and its quantizers. `folded` is the float model, folds applied."""

    model: Model
    folded: Model
    quantizers: QuantParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where progress goes: `step(text)` names a step, `advance(n)` counts images."""

    step: Say = lambda _: None
    advance: Advance = lambda _: None


def check_enough(count: int) -> None:
    """Check that so many images give ranges.

    Raises:
        CalibrationError: if not.
    """
    if count < LEAST_IMAGES:
        raise CalibrationError(
            f"{count} calibration images are too few for ranges; give at least {LEAST_IMAGES}, better 128"
        )


def calibrate(
    model: Model,
    merge: MergeRecipe,
    quant: QuantRecipe,
    images: ImageSet,
    *,
    scheme: QuantConstraints | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Quantize a Vision Transformer by a method; the images are all used, in batches.

    Raises:
        CalibrationError: on too few images, or activations that are constant, NaN or infinite, naming the site.
        RecipeError: if the method is unknown or a glob of `quant.sites` matches nothing.
    """
    examples = ImageExamples(images=images, preprocess=model.preprocess)
    done = calibrate_network(network_of(model, merge), quant, examples, scheme=scheme, progress=progress)
    rounded, folded = (model.with_params(model.spec, params) for params in (done.params, done.folded))
    return Calibrated(model=rounded, folded=folded, quantizers=done.quantizers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounded:
    """Parameters whose weights lie on their grids, and the quantizers. `folded` are the float ones, folds applied."""

    params: Mapping[str, Array]
    folded: Mapping[str, Array]
    quantizers: QuantParams


def calibrate_network(
    network: Network,
    quant: QuantRecipe,
    examples: Examples,
    *,
    scheme: QuantConstraints | None = None,
    progress: Progress | None = None,
) -> Rounded:
    """Quantize any network by a method; the examples are all used, in batches.

    Raises:
        CalibrationError: on too few examples, or activations that are constant, NaN or infinite, naming the site.
        RecipeError: if the method is unknown or a glob of `quant.sites` matches nothing.
    """
    scheme, progress = scheme or QuantConstraints(), progress or Progress()
    method = find_method(quant.method)
    _check_globs(quant, network.linears, network.attentions)
    check_enough(examples.count)
    if method.rotate and quant.format != "float8":
        network = turn_heads(rotate_streams(network))
    progress.step("collecting activations")
    samples = collect(network, examples, gradients=method.gradients, seed=quant.seed, advance=progress.advance)
    check_samples(samples, quant)
    if quant.format == "float8":
        return _calibrate_float8(network, samples, quant, scheme, progress)
    progress.step(f"folding channels ({method.name})")
    folded, samples, presets = fold_channels(network, samples, method, quant)
    problems = _problems(folded, samples, quant, scheme)
    quantizers = _search(folded, problems, samples, presets, quant, scheme, progress)
    before = quantizers
    if scheme.symmetric:
        folded, quantizers = center_norms(folded, quantizers)
    quantizers = {**quantizers, **search_apart(problems.values(), samples, method, before, quantizers)}
    if quant.outputs and scheme.hands_on:
        progress.step("finding the grids of what is handed on")
        quantizers |= hand_on(folded, problems, quantizers, examples)
    elif quant.outputs:
        quantizers |= search_outputs(problems.values(), before, quantizers)
    if scheme.half_scales:
        quantizers = {site: in_half(quantizer) for site, quantizer in quantizers.items()}
    params: dict[str, Array] = dict(folded.params)
    if method.rounding != "nearest" or method.correct:
        progress.step("collecting second moments")
        moments = collect_moments(folded, examples, quantizers, advance=progress.advance)
        params |= round_weights(params, quantizers, moments, method, step=progress.step)
    else:
        params |= _nearest(params, quantizers)
    return Rounded(params=params, folded=folded.params, quantizers=QuantParams(quantizers))


def _search(
    network: Network,
    problems: Mapping[str, LinearProblem],
    samples: Samples,
    presets: Mapping[str, Uniform],
    quant: QuantRecipe,
    scheme: QuantConstraints,
    progress: Progress,
) -> dict[str, Quantizer]:
    """The ranges of all linear layers, and of attention products where they are rounded."""
    method = find_method(quant.method)
    quantizers: dict[str, Quantizer] = {}
    for number, (site, problem) in enumerate(problems.items(), start=1):
        preset = presets.get(f"{site}.x")
        say = functools.partial(progress.step, f"searching ranges: {site} {number}/{len(problems)}")
        quantizers |= search_once(
            (problem, method, preset), functools.partial(search_linear, problem, method, preset=preset), say
        )
    for number, attention in enumerate(network.attentions if quant.attention else (), start=1):
        bits = quant.bits(attention.site, weight=False)
        if bits is None:
            continue
        bits = min(bits, NARROW_BITS)
        say = functools.partial(progress.step, f"searching ranges: {attention.site} {number}/{len(network.attentions)}")
        found = samples.attentions[attention.site]
        how = {"symmetric": scheme.symmetric, "uniform_only": scheme.uniform_only}
        quantizers |= search_once(
            (attention, found, bits, method, scheme),
            functools.partial(search_attention, attention.site, found, bits, method, **how),
            say,
        )
    if scheme.half_scales:
        return {site: in_half(quantizer) for site, quantizer in quantizers.items()}
    return quantizers


def _nearest(params: Mapping[str, Array], quantizers: Mapping[str, Quantizer]) -> dict[str, Array]:
    """Every quantized weight, rounded to its grid."""
    weights = {f"{site[:-2]}.weight": q for site, q in quantizers.items() if site.endswith(".w")}
    return {name: rounded(torch.from_numpy(params[name]), q).numpy() for name, q in weights.items()}


def _calibrate_float8(
    network: Network, samples: Samples, quant: QuantRecipe, scheme: QuantConstraints, progress: Progress
) -> Rounded:
    """Scales for 8-bit floats; the relative precision of the format leaves nothing for folds and rounding to win."""
    quantizers: dict[str, Quantizer] = {}
    problems = _problems(network, samples, quant, scheme)
    for number, (site, problem) in enumerate(problems.items(), start=1):
        progress.step(f"searching scales: {site} {number}/{len(problems)}")
        quantizers |= search_linear_float8(problem)
        if problem.site.apart is not None:
            found = search_linear_float8(replace(problem, samples=samples.linears[problem.site.apart]))
            quantizers[f"{problem.site.apart}.x"] = found[f"{problem.site.layer}.x"]
    for number, attention in enumerate(network.attentions if quant.attention else (), start=1):
        if quant.bits(attention.site, weight=False) is not None:
            progress.step(f"searching scales: {attention.site} {number}/{len(network.attentions)}")
            quantizers |= search_attention_float8(attention.site, samples.attentions[attention.site])
    if quant.outputs:
        quantizers |= search_outputs(problems.values(), quantizers, quantizers)
    if scheme.half_scales:
        quantizers = {site: in_half(quantizer) for site, quantizer in quantizers.items()}
    params: dict[str, Array] = {**network.params, **_nearest(network.params, quantizers)}
    return Rounded(params=params, folded=network.params, quantizers=QuantParams(quantizers))


def _problems(
    network: Network, samples: Samples, quant: QuantRecipe, scheme: QuantConstraints
) -> Mapping[str, LinearProblem]:
    problems = {}
    for site in network.linears:
        weight_bits = quant.bits(site.layer, weight=True)
        bits = quant.bits(site.layer, weight=False)
        if weight_bits is None or bits is None:
            continue
        problems[site.layer] = LinearProblem(
            site=site,
            samples=samples.linears[site.layer],
            weight=torch.from_numpy(network.params[f"{site.layer}.weight"]),
            weight_bits=min(weight_bits, scheme.weight_bits),
            bits=bits,
            symmetric=scheme.symmetric,
            uniform_only=scheme.uniform_only,
            symmetric_inputs=scheme.symmetric and bool(quant.attention) and site.values is not None,
        )
    return problems


def check_globs(quant: QuantRecipe, spec: Architecture) -> None:
    """Check that every glob of the plan matches a site.

    Raises:
        RecipeError: naming the nearest sites.
    """
    _check_globs(quant, *find_sites(spec))


def _check_globs(quant: QuantRecipe, linears: Sequence[LinearSite], attentions: Sequence[AttentionSite]) -> None:
    names = [site.layer for site in linears] + [site.site for site in attentions]
    for glob in quant.sites:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RecipeError(f"no site matches {glob!r}; {nearest(glob, names)}; list them with: vitfold sensitivity")


def check_samples(samples: Samples, quant: QuantRecipe) -> None:
    """Check that every quantized site varies.

    Raises:
        CalibrationError: naming the site.
    """
    for layer, one in samples.linears.items():
        if quant.bits(layer, weight=False) is None or layer.endswith(f".{PREFIX_ROWS}"):
            continue
        if float((one.high - one.low).max()) == 0.0:
            raise CalibrationError(
                f"the input of {layer} is constant over {samples.images} images, so it has no range; give other "
                f'images, or keep it float with a recipe: [quant.sites] "{layer}" = "float"'
            )
        if not np.isfinite(one.x.sum().item()):
            raise CalibrationError(f"the input of {layer} is NaN or infinite; check the weights and the images")
