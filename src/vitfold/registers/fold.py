"""A resolved recipe and images in, a model that does something about its sinks out.

The rewriting of spec and parameters: data only, so that every interpreter, calibration and target that takes a
model takes this one.
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from vitfold.errors import RecipeError, nearest
from vitfold.images import ImageSet
from vitfold.model import Architecture, Array, Model, Sinks
from vitfold.model.spec import as_vit
from vitfold.progress import Advance
from vitfold.quant.sites import apart_layers, find_sites
from vitfold.recipe import RegistersRecipe
from vitfold.registers.curate import Candidates, curate
from vitfold.registers.neurons import find_neurons


def fold_registers(
    model: Model,
    recipe: RegistersRecipe,
    images: ImageSet,
    *,
    candidates: Candidates | None = None,
    advance: Advance | None = None,
) -> Model:
    """Return the model with what the recipe says, its arrays computed on the images.

    Args:
        candidates: what `curate` gives for the images and the recipe's site, for who has it.

    Raises:
        RecipeError: if the recipe does not fit the model, naming the key.
    """
    if recipe.site is None:
        raise ValueError("a recipe is resolved before it is folded")
    spec = as_vit(model.spec, "registers need")
    for name in ("start", "block"):
        if getattr(recipe, name) >= spec.num_layers:
            raise RecipeError(f"registers.{name} = {getattr(recipe, name)}; the model has {spec.num_layers} blocks")
    if recipe.deletions >= spec.patches:
        raise RecipeError(f"registers.deletions = {recipe.deletions}, the model has {spec.patches} patch tokens")
    if recipe.remedy in ("prefix", "regcache"):
        found = curate(model, images, recipe.site, advance=advance) if candidates is None else candidates
        return _cached(model, recipe, found)
    if recipe.remedy == "neurons":
        return _with_register(model, find_neurons(model, images, recipe.site, recipe.neurons, advance=advance))
    return replace(model, spec=replace(spec, sinks=_sinks(spec, recipe)))


def _sinks(spec: Architecture, recipe: RegistersRecipe) -> Sinks:
    """What needs no arrays."""
    if recipe.remedy == "delete":
        return Sinks(**_deletion(spec, recipe))
    if recipe.remedy == "leave-out":
        return Sinks(leave_out=recipe.sinks)
    layers = match_layers(spec, recipe.layers)
    if recipe.remedy == "float-sinks":
        return Sinks(layers=layers, apart=recipe.sinks)
    if not spec.prefix:
        raise RecipeError("split-scales parts prefix tokens from patches, this model has none; try --registers auto")
    return Sinks(layers=layers, split_prefix=True)


def _deletion(spec: Architecture, recipe: RegistersRecipe) -> dict[str, Any]:
    """Where tokens go, as fields of `Sinks`.

    Raises:
        RecipeError: if no tokens can go at the layer.
    """
    site = recipe.deletion_site
    if site is None:
        return {"block": recipe.block, "deletions": recipe.deletions}
    found = next((one for one in find_sites(spec)[0] if one.layer == site and site in apart_layers(spec)), None)
    if found is None or found.block is None:
        raise RecipeError(f"registers.deletion_site: no tokens go at {site!r}; {nearest(site, apart_layers(spec))}")
    block = found.block + (found.role == "mlp")
    return {"block": block, "deletions": recipe.deletions, "deletion_site": site}


def match_layers(spec: Architecture, globs: tuple[str, ...]) -> tuple[str, ...]:
    """Return the layers that some glob matches, in execution order.

    Raises:
        RecipeError: if a glob matches none, naming the nearest.
    """
    names = apart_layers(spec)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RecipeError(f"registers.layers: no layer matches {glob!r}; {nearest(glob, names)}")
    return tuple(name for name in names if any(fnmatchcase(name, glob) for glob in globs))


def _cached(model: Model, recipe: RegistersRecipe, candidates: Candidates) -> Model:
    k, v = candidates.register(recipe.token, recipe.average)
    sinks = Sinks(start=recipe.start, rows=1, tau=recipe.tau, **_deletion(as_vit(model.spec, "registers need"), recipe))
    params: dict[str, Array] = dict(model.params)
    for attention in find_sites(model.spec)[1]:
        block = attention.block
        if block is None or block < recipe.start:
            continue
        for name, rows in (("cached_k", k), ("cached_v", v)):
            params[f"{attention.site}.{name}"] = np.ascontiguousarray(rows[block][None, :, None])
    return model.with_params(replace(as_vit(model.spec, "registers need"), sinks=sinks), params)


def _with_register(model: Model, neurons: tuple[tuple[int, int], ...]) -> Model:
    """Append a register of zeros behind the prefix tokens, to which the neurons move.

    Raises:
        RecipeError: if the model pools its prefix tokens too, so that another one would change the mean.
    """
    spec, params = as_vit(model.spec, "registers need"), dict(model.params)
    if spec.pool == "avg" and spec.pool_prefix:
        raise RecipeError("neurons add a token, and this model averages all tokens; choose another remedy")
    register = np.zeros((1, 1, spec.embed_dim), np.float32)
    params["reg_token"] = np.concatenate((params["reg_token"], register), 1) if spec.registers else register
    if spec.pos_embed == "all":
        front, back = params["pos_embed"][:, : spec.prefix], params["pos_embed"][:, spec.prefix :]
        params["pos_embed"] = np.concatenate((front, register, back), 1)
    changed = replace(spec, registers=spec.registers + 1, sinks=Sinks(neurons=neurons))
    return model.with_params(changed, params)
