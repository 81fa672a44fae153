"""What is to be done to a model: its recipe resolved for the model and the target."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitfold.architectures.programs import deployed_program, forward, spec_in, whole_attentions, whole_in
from vitfold.artifacts.bundle import QUANTIZERS, Bundle
from vitfold.audit.limits import INT8_ATTENTION_WIDTHS, check_attention
from vitfold.engines import quantized_target
from vitfold.errors import ArgumentError, RecipeError, TargetError
from vitfold.model import Architecture, Model, ViTSpec, param_shapes
from vitfold.model.folds import fold_layer_scale
from vitfold.model.spec import as_vit
from vitfold.ops.count import Count, SiteCost
from vitfold.ops.work import Work, work_of
from vitfold.program import replay
from vitfold.quantizer import Quantizer, QuantParams, load_quant_params
from vitfold.recipe import (
    FLOAT,
    RULES,
    MergeRecipe,
    Order,
    PruneRecipe,
    QuantRecipe,
    Recipe,
    RegistersRecipe,
    check_merge,
    check_prune,
    check_quant,
    check_registers,
    parse_recipe,
    quant_from_scheme,
    tokens_per_block,
)
from vitfold.schedule import resolve_r
from vitfold.storage.ordinary import read_text
from vitfold.target import Target, find_target

Merge = str | int | Sequence[int] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """A model with a resolved recipe and a target, ready to be saved.

    `model` is the one that was loaded; `folded` went through the exact folds. Where the recipe quantizes,
    `quantizers` and `calibration` (what it was done with, plain JSON values) are None until
    `calibration.calibrate_plan` has run; then the weights of `folded` lie on their grids. `batch` is the least, the
    usual and the largest batch that an engine is to be built for, where one is built. `remarks` say what the target
    made of the recipe. Where the recipe prunes or compensates merging, `compensated` (the folded model with refitted
    weights, narrower where units went) and `compensation` (what was measured, plain JSON values) are None until
    `compensating.compensate_plan` has run.
    """

    model: Model
    folded: Model
    recipe: Recipe
    target: Target
    quantizers: QuantParams | None = None
    calibration: Mapping[str, Any] | None = None
    batch: tuple[int, int, int] | None = None
    remarks: tuple[str, ...] = ()
    compensated: Model | None = None
    compensation: Mapping[str, Any] | None = None

    @property
    def float_model(self) -> Model:
        """What is deployed, before anything is rounded."""
        return self.compensated or self.model

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that enter each block, and those that leave the last."""
        return tokens_per_block(self.folded.spec, self.recipe.merge.r)

    @property
    def needs_calibration(self) -> bool:
        """True if the recipe quantizes and that has not been done yet."""
        return self.recipe.quant is not None and self.quantizers is None

    @property
    def needs_compensation(self) -> bool:
        """True if the recipe prunes or compensates merging, and weights have not been refitted yet."""
        mends = self.recipe.merge.compensate and any(self.recipe.merge.r)
        return (mends or self.recipe.prune is not None) and self.compensated is None

    @property
    def simulated(self) -> bool:
        """True if no engine executes it."""
        return self.target.simulated

    @property
    def whole_attentions(self) -> frozenset[str]:
        """Sites of the attentions that this target computes for all queries, also where only some are read."""
        return whole_attentions(self.folded.spec, self.recipe.quant, wanted=self.target.whole_attention)

    def costs(self) -> tuple[SiteCost, ...]:
        """Work per site for one image."""
        return count_costs(self.folded.spec, self.recipe.merge, whole=self.whole_attentions)

    def executed(self) -> tuple[SiteCost, ...]:
        """Work per site for one image as this target does it: which products take integers, and how they get them."""
        return count_costs(
            self.folded.spec,
            self.recipe.merge,
            self.quantizers,
            dequantize_first=self.target.quantized_product == "qdq",
            whole=self.whole_attentions,
        )

    def work(self) -> Work:
        """What one image takes on this target: how much of it is integer, bytes, energy."""
        return work_of(self.executed(), quantized=self.quantizers is not None)


def optimize(
    model: Model,
    *,
    merge: Merge = None,
    quant: str | QuantRecipe | None = None,
    rule: str = "tome",
    compensate: bool = False,
    prune: float | PruneRecipe | None = None,
    registers: str | RegistersRecipe | None = None,
    recipe: Recipe | None = None,
    target: str = "cpu",
    batch: tuple[int, int, int] | None = None,
) -> Plan:
    """Resolve the recipe for this model and apply the exact folds.

    Target "cpu" becomes the one for this processor's instruction set where the recipe quantizes, and
    "simulation" where no engine executes what it asks for.

    Args:
        merge: r per block as `schedule.resolve_r` takes it; not together with `recipe`.
        rule: which tokens go and what becomes of them; not together with `recipe`.
        compensate: whether weights are refitted to what merging changes, on images (`pipeline.compensate_plan`); not
            together with `recipe`.
        prune: the share of the hidden units of every MLP that goes, chosen on images (`pipeline.compensate_plan`); not
            together with `recipe`.
        quant: "w8a8" and its like, "fp8", "none", or the whole section; not together with `recipe`.
        registers: "none", "auto", the name of a remedy, or the whole section; not together with `recipe`.
        batch: least, usual and largest batch, for targets whose engines are built for them.

    Raises:
        RecipeError: if the schedule does not fit the model, or the method or a glob is unknown.
        TargetError: if the target is unknown or cannot execute the recipe.
    """
    if not isinstance(model, Model):
        raise ArgumentError(f"optimize takes a Model, as load and adapt return it, found {type(model).__name__}")
    if recipe is not None and not (merge is None and quant is None and registers is None and prune is None):
        raise RecipeError("give either a recipe or a merge schedule, pruning, a quantization and registers, not both")
    if recipe is None:
        merged = MergeRecipe(r=resolve_r(merge, model.spec), rule=rule, compensate=compensate)
        narrower = prune if isinstance(prune, PruneRecipe) or prune is None else PruneRecipe(mlp=prune)
        recipe = Recipe(
            merge=merged, quant=_quant_recipe(quant), registers=registers_from_name(registers), prune=narrower
        )
    if recipe.quant is None and quant is None:
        recipe = replace(recipe, quant=quant_from_scheme(find_target(target).implied_quant))
    _check_fits(recipe, model.spec)
    chosen = _fusing(resolve_target(target, recipe.quant), recipe.quant)
    if batch is not None and not chosen.runtime.builds_for_batches:
        raise TargetError(f"target {target} runs any batch; leave the batch out, or choose a target of TensorRT")
    recipe, remarks = _settled(recipe, chosen, model.spec)
    folded = fold_layer_scale(model)
    return Plan(model=model, folded=folded, recipe=recipe, target=chosen, batch=batch, remarks=remarks)


def _fusing(target: Target, quant: QuantRecipe | None) -> Target:
    """Return the target as a method leaves it: where the softmax has two ranges, no attention is one kernel."""
    from vitfold.quant import find_method

    if quant is None or not target.whole_attention or "uniform" in find_method(quant.method).softmax:
        return target
    return replace(target, whole_attention=False)


def _check_fits(recipe: Recipe, spec: Architecture) -> None:
    """Check that a model has what a recipe asks of it: tokens enough, named parts for registers, a class token."""
    tokens_per_block(spec, recipe.merge.r)
    if recipe.registers is not None:
        heads = _heads_left(recipe.prune, as_vit(spec, "registers need"))
        if len(set(zip(heads, head_dims_left(recipe.prune, spec), strict=True))) > 1:
            raise RecipeError(
                "registers are keys and values of one shape for all blocks, and here heads differ from block to block; "
                "take hidden units only (--prune-mlp), or leave registers out"
            )
    if RULES[recipe.merge.rule].class_token and not spec.class_token:
        raise RecipeError(
            f"merge.rule {recipe.merge.rule} asks the class token, which this model does not have; use tome or pitome"
        )


def _settled(recipe: Recipe, target: Target, spec: Architecture) -> tuple[Recipe, tuple[str, ...]]:
    """Return the recipe with what the target decides: quantized sites and the order of tokens; and remarks on it."""
    remarks: tuple[str, ...] = ()
    if recipe.quant is not None:
        recipe = replace(recipe, quant=resolve_quant(recipe.quant, target, spec))
        recipe, remarks = keep_fusible(recipe, target, spec)
    if recipe.merge.order is None:
        order: Order = "index" if target.keeps_order else "score"
        recipe = replace(recipe, merge=replace(recipe.merge, order=order))
    return recipe, remarks


def _heads_left(prune: PruneRecipe | None, spec: ViTSpec) -> tuple[int, ...]:
    """Return how many heads of every block stay where those of a model are pruned."""
    whole = [spec.heads_of(block) for block in range(spec.num_layers)]
    return tuple(heads if prune is None else prune.heads_of(block, heads) for block, heads in enumerate(whole))


def head_dims_left(prune: PruneRecipe | None, spec: Architecture) -> tuple[int, ...]:
    """Return how wide the heads of every block are where those of a model are pruned."""
    whole = [spec.head_dim_of(block) for block in range(spec.num_layers)]
    return tuple(dim if prune is None else prune.head_dim_of(block, dim) for block, dim in enumerate(whole))


def fusible_widths(target: Target, quant: QuantRecipe | None) -> Collection[int] | None:
    """Return how wide heads may be for attention to be one kernel, None where any width may: TensorRT's in INT8."""
    if quant is None or not target.runtime.strongly_typed or quant.attention is False or quant.format != "integer":
        return None
    return INT8_ATTENTION_WIDTHS


def keep_fusible(recipe: Recipe, target: Target, spec: Architecture) -> tuple[Recipe, tuple[str, ...]]:
    """Keep the attention of those blocks float which TensorRT could not run as one kernel in INT8; also say so."""
    quant = recipe.quant
    if quant is None or not target.runtime.strongly_typed or not quant.attention or quant.format != "integer":
        return recipe, ()
    tokens = tokens_per_block(spec, recipe.merge.r)[:-1]
    cached = [
        0 if spec.sinks is None else spec.sinks.copies * spec.sinks.cached(block) for block in range(spec.num_layers)
    ]
    rows = [count + extra for count, extra in zip(tokens, cached, strict=True)]
    found = check_attention(head_dims_left(recipe.prune, spec), rows)
    if found is None:
        return recipe, ()
    if not found.where:
        return replace(recipe, quant=replace(quant, attention=False)), (f"attention stays FP16: {found.cause}",)
    sites = {**quant.sites, **dict.fromkeys(found.where, FLOAT)}
    shown = ", ".join(found.where)
    remark = f"{shown} stay FP16: {found.cause}; {found.cure}"
    return replace(recipe, quant=replace(quant, sites=sites)), (remark,)


def registers_from_name(registers: str | RegistersRecipe | None) -> RegistersRecipe | None:
    """Return what `--registers` names: a remedy, "auto", or "none".

    Raises:
        RecipeError: offering the nearest names.
    """
    if isinstance(registers, RegistersRecipe) or registers is None or registers == "none":
        return registers if isinstance(registers, RegistersRecipe) else None
    return RegistersRecipe(remedy=registers)  # type: ignore[arg-type]


def _quant_recipe(quant: str | QuantRecipe | None) -> QuantRecipe | None:
    return quant_from_scheme(quant) if isinstance(quant, str) else quant


def resolve_target(name: str, quant: QuantRecipe | None) -> Target:
    """Return the target; for a quantized "cpu" or "openvino" the one of this processor, or the simulation.

    Raises:
        TargetError: if a target that executes was asked for what no engine executes.
    """
    target = find_target(name)
    _check_format(target, quant)
    if quant is None:
        if target.simulated or target.quantized_product == "integer":
            raise TargetError(f"target {name} is for quantized models; add --quant w8a8, or choose --target cpu")
        return target
    if target.simulated:
        return target
    if not quant.executable:
        if name == "cpu":
            return find_target("simulation")
        raise TargetError(
            f"no engine of target {name} executes activations of fewer than 8 bits ({quant.scheme}); "
            "use --quant w8a8 or w4a8, or --target simulation"
        )
    if quant.wide and not target.takes_wide:
        raise TargetError(
            f"target {name} has no kernels for activations of 16 bits ({quant.scheme}); use --target cpu, which takes "
            "two products of 8 bits for one in ONNX Runtime, or keep these layers float"
        )
    if target.name == "cpu":
        return quantized_target(target.engine)
    if target.name == "openvino" and importlib.util.find_spec("openvino") is not None:
        return quantized_target(target.engine)
    return target


def _check_format(target: Target, quant: QuantRecipe | None) -> None:
    """Check that a target which stands for one precision is asked for that one."""
    implied = target.implied_quant
    if quant is None:
        if implied != "none":
            raise TargetError(f"target {target.name} quantizes; leave --quant out, or choose --target tensorrt-fp16")
        return
    if target.runtime.strongly_typed and implied == "none":
        raise TargetError(f"target {target.name} does not quantize; choose --target tensorrt-int8 or tensorrt-fp8")
    if quant.format == "float8" and target.activation_type != "float8e4m3fn" and not target.simulated:
        raise TargetError(f"target {target.name} runs no 8-bit floats; choose --target tensorrt-fp8, or simulation")
    if quant.format == "integer" and target.activation_type == "float8e4m3fn":
        raise TargetError(f"target {target.name} runs 8-bit floats ({quant.scheme} are integers); give --quant fp8")


def resolve_quant(quant: QuantRecipe, target: Target, spec: Architecture) -> QuantRecipe:
    """Settle what the target decides: whether attention products are quantized.

    Raises:
        RecipeError: if the method or a glob is unknown.
        TargetError: if attention products are asked for that the target cannot execute by this method.
    """
    from vitfold.quant import check_globs, find_method

    method = find_method(quant.method)
    check_globs(quant, spec)
    runs = target.simulated or method.runs_softmax
    if quant.attention and not runs:
        raise TargetError(
            f"method {method.name} rounds the softmax to logarithms, which no engine executes; set quant.attention = "
            "false, choose another method, or --target simulation"
        )
    if quant.attention is None:
        quant = replace(quant, attention=target.quantize_attention and runs)
    if quant.outputs and not target.takes_outputs:
        raise TargetError(f"target {target.name} rounds no outputs; leave quant.outputs out")
    if quant.outputs is None:
        quant = replace(quant, outputs=target.quantize_outputs and not quant.polish_minutes)
    if quant.outputs and quant.polish_minutes and target.hands_on:
        raise RecipeError(
            f"polishing learns scales one by one, and target {target.name} hands codes on between sites that share "
            "theirs; leave --polish out, or set quant.outputs = false"
        )
    return quant


def read_recipe(path: str | Path, spec: Architecture) -> Recipe:
    """Read a recipe file and resolve it for an architecture: `merge.r` may be any form of --merge.

    Raises:
        RecipeError: if the file is missing, not TOML, has unknown keys, or does not fit.
    """
    try:
        text = read_text(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}; see recipes/ for examples") from None
    values = parse_recipe(text, name=str(path))
    merge, quant = values.get("merge", {}), values.get("quant")
    merged = check_merge({**merge, "r": resolve_r(merge.get("r"), spec)}, name=str(path))
    return Recipe(
        merge=merged,
        quant=None if quant is None else check_quant(quant, name=str(path)),
        registers=check_registers(values.get("registers"), name=str(path)),
        prune=check_prune(values.get("prune"), name=str(path)),
    )


def count_costs(
    spec: Architecture,
    recipe: MergeRecipe,
    quantizers: Mapping[str, Quantizer] | None = None,
    *,
    dequantize_first: bool = False,
    every_row: bool = False,
    whole: frozenset[str] = frozenset(),
) -> tuple[SiteCost, ...]:
    """Return the work per site for one image, without any weights; `quantizers` say what of it is integer.

    `every_row` counts rows that nothing reads too, as the original model computes them; `whole` are the sites of
    attentions that keep all their queries (`architectures.programs.whole_attentions`).
    """
    required, optional = param_shapes(spec)
    count = Count(required | optional, quantizers, dequantize_first=dequantize_first)
    shape = (1, *spec.input_shape)
    if every_row:
        forward(count, spec, recipe, shape)
    else:
        replay(deployed_program(spec, recipe, whole), count, shape)
    return tuple(count.costs)


def bundle_work(bundle: Bundle) -> Work | None:
    """Return what one image takes in a bundle of a Vision Transformer, as `Plan.work` had it when it was written.

    None where its manifest does not say: what pruning left of a graph, and which rows registers add.

    Raises:
        BundleError: if its quantizers cannot be read.
    """
    manifest = bundle.manifest
    quantizers = None if manifest.recipe.quant is None else load_quant_params(bundle.path / QUANTIZERS)
    costs = count_costs(
        spec_in(manifest),
        manifest.recipe.merge,
        quantizers,
        dequantize_first=manifest.target.get("quantized_product") == "qdq",
        whole=whole_in(manifest),
    )
    work = work_of(costs, quantized=quantizers is not None)
    return work if work.macs == manifest.macs else None
