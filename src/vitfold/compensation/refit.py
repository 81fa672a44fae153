"""Refitting the layers that write to the residual stream, block by block, behind the first change.

Merged tokens should come to the size-weighted means of the tokens that the unmerged model has in their places. The
last linear layers of attention and MLP are refitted, in order, so that they do, each on what the layers before it
now make; where hidden units or heads go, the layer that reads them is fitted on those that stay. Only weights change:
it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfold.architectures.programs import UNMERGED, plain_program, program_of
from vitfold.compensation.factoring import Scores, lower_scores, no_moments
from vitfold.compensation.narrowing import Narrowing, narrowed, narrowings, thinned
from vitfold.compensation.pruning import NarrowFit, ThinFit, basis_of, fit_narrow, fit_thin
from vitfold.compensation.ridge import PREFIX_WEIGHT, Fit, RidgeSums, as_params, fit_change, no_sums, with_bias
from vitfold.compensation.showing import BATCH, divided, mean_error, named, run, showing
from vitfold.compensation.streams import LIMIT_BYTES, Columns, Streams
from vitfold.errors import CalibrationError, RecipeError
from vitfold.model import Array, Model
from vitfold.ops.run import Run
from vitfold.program import Program, replay
from vitfold.program.queries import closing_linears, output_linear
from vitfold.progress import Advance, Say
from vitfold.quant.network import Examples
from vitfold.recipe import MergeRecipe, PruneRecipe
from vitfold.transforms.merging import COLUMNS, stream_name

LEAST_IMAGES = 256
"""Fewer do not tell a layer's hidden units apart."""
MOST_IMAGES = 2048
PATCH_ROWS = 64
"""Rows of patches that are looked at per image: more of them are worth as much as more images, and cost less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refit:
    """What became of one layer: its ridge, None where nothing helped, and the share of the error left held out.

    Where `units` or `heads` that it reads stayed, that is the share of the squared output that it misses; heads may be
    `head_dim` wide now.
    """

    layer: str
    ridge: float | None
    left: float
    units: int | None = None
    heads: int | None = None
    head_dim: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {"layer": self.layer, "ridge": self.ridge, "left_ratio": self.left}
        kept = {"units": self.units, "heads": self.heads, "head_dim": self.head_dim}
        return {**values, **{name: count for name, count in kept.items() if count is not None}}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compensated:
    """A model with refitted weights, and what was measured on held-out images.

    `error_before` (merging alone) and `error_after` are relative squared errors of the output against the model's that
    merges nothing and has all its units.
    """

    model: Model
    refits: tuple[Refit, ...]
    images: int
    held_out: int
    error_before: float
    error_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "images": self.images,
            "held_out": self.held_out,
            "error_before": self.error_before,
            "error_after": self.error_after,
            "layers": [one.to_dict() for one in self.refits],
        }


def check_enough(count: int) -> None:
    """Check that so many images are enough to refit layers.

    Raises:
        CalibrationError: if not.
    """
    if count < LEAST_IMAGES:
        raise CalibrationError(
            f"{count} images are too few to refit weights; give at least {LEAST_IMAGES}, better 2000, or leave "
            "--compensate and --prune-mlp out"
        )


def compensate(
    model: Model,
    merge: MergeRecipe,
    examples: Examples,
    *,
    prune: PruneRecipe | None = None,
    limit_bytes: int = LIMIT_BYTES,
    step: Say = lambda _: None,
    advance: Advance = lambda _: None,
) -> Compensated:
    """Return the model with weights under which merged tokens come nearest to the means of unmerged ones.

    Every eighth image is held out: ridges are chosen there, layer by layer, with no change among the
    choices, and so is whether all of it helps the output. With `prune` it also has fewer hidden units and heads, and
    weights that make the best of them. Without either the model is returned as it is.

    Args:
        limit_bytes: memory for the tokens of all images; the rest goes to temporary files.

    Raises:
        CalibrationError: on too few images.
        RecipeError: if no layer writes straight to the residual stream, or what shall go cannot.
    """
    if prune is None and not any(merge.r):
        return Compensated(model=model, refits=(), images=0, held_out=0, error_before=0.0, error_after=0.0)
    check_enough(examples.count)
    if model.spec.sinks is not None:
        raise RecipeError("weights are refitted before anything is done about sink tokens; fold them afterwards")
    with torch.inference_mode(), Streams(limit_bytes // 2) as exact, Streams(limit_bytes // 2) as merged:
        walk = _Walk(model, merge, prune, exact, merged, step)
        for number, group in enumerate(examples.batches(BATCH)):
            walk.enter(number, group.inputs)
            advance(group.size)
        return walk.run(examples.count)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Averages:
    """What enters the projection of a block's attention, kept from when it was fitted: as it was, or what of it stays.

    Narrower heads average narrower values: columns of the old averages, or directions in them.
    """

    layer: str
    columns: Int[Tensor, " C"] | None = None
    basis: Float[Tensor, "J W"] | None = None

    def known(self, columns: Columns) -> dict[str, Tensor]:
        """Return what need not be computed anew."""
        value = columns[f"{self.layer}.x"]
        if self.columns is not None:
            value = value[..., self.columns]
        elif self.basis is not None:
            value = value @ self.basis
        return {f"{self.layer}.x": value}


class _Walk:
    """The model as it is and the merged or narrower one side by side, from block to block."""

    def __init__(
        self,
        model: Model,
        merge: MergeRecipe,
        prune: PruneRecipe | None,
        exact: Streams,
        merged: Streams,
        step: Say,
    ) -> None:
        self._model, self._step, self._end, self._merge = model, step, model.spec.num_layers, merge
        plain = plain_program(model.spec)
        self._closing, self._last = closing_linears(plain), output_linear(plain)
        self._narrow = {} if prune is None else narrowings(model.spec, plain, prune)
        self._first = 0 if prune is not None else next(block for block, r in enumerate(merge.r) if r)
        closing = (*self._closing[self._first :], (self._last,))
        layers = {layer for block in closing for layer in block if layer}
        thinner = {rows.layer for one in self._narrow.values() if one.thinner for rows in one.rows}
        self._shown = layers | thinner
        entry = self._closing[self._first][0]
        self._layers = len(layers) - (entry is not None and entry not in self._narrow)
        if not layers - {self._last}:
            raise RecipeError(
                "no layer of this model writes straight to the residual stream, so merging cannot be compensated; "
                "leave merge.compensate out"
            )
        self._whole = showing(program_of(model.spec, UNMERGED), self._shown)
        self._shorter = showing(program_of(model.spec, merge, sources=True), self._shown)
        self._exact, self._merged = exact, merged
        self._mended = model
        self._refits: list[Refit] = []
        self._scores: dict[str, Scores] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._averages: _Averages | None = None

    def enter(self, number: int, inputs: tuple[Tensor, ...]) -> None:
        """Take a group of images: its tokens in front of the first change."""
        entry, output = stream_name(self._first, "x"), self._model.spec.output
        (x,) = replay(self._whole, Run(self._model.params), *inputs, only=(entry,))
        self._exact[number] = self._merged[number] = {"x": x}
        _, held = divided(len(x))
        if len(held):
            given = {entry: x[held]}
            exact, merged = (run(one, self._model.params, given, output) for one in (self._whole, self._shorter))
            self._before[number] = (exact[output], merged[output])

    def run(self, images: int) -> Compensated:
        """Refit every layer, and keep that if it helps the output."""
        for block in range(self._first, self._end):
            attention, mlp = self._closing[block]
            self._averages = None
            self._advance_exact(block, attention)
            one = self._narrow.get(attention or "")
            if one is not None and one.thinner:
                self._lower_rank(block, one, one.thinner)
            if attention is not None and (block > self._first or attention in self._narrow):
                self._refit(block, attention, behind_merge=False)
            if mlp is not None:
                self._refit(block, mlp, behind_merge=True)
            for number in range(len(self._merged)):
                self._merged[number] = self._next(self._shorter, self._mended.params, block, self._merged[number])
        return self._judged(images)

    def _advance_exact(self, block: int, attention: str | None) -> None:
        """Run a block of the unmerged model: its tokens behind attention, `attended`, and behind the MLP, `x`."""
        for number in range(len(self._exact)):
            x = self._exact[number]["x"]
            shown = () if attention is None else (f"{attention}.y",)
            found = self._next(self._whole, self._model.params, block, {"x": x}, *shown)
            if attention is not None:
                found["attended"] = x + found.pop(f"{attention}.y")
            self._exact[number] = found

    def _refit(self, block: int, layer: str, *, behind_merge: bool) -> None:
        """Fit a layer on what reaches it now, and change its parameters where that helps on held-out images."""
        self._tell(layer)
        sums, held_out = self._sums(layer)
        draw = torch.Generator().manual_seed(block)
        for number in range(len(self._merged)):
            entering, exact = self._merged[number], self._exact[number]
            if behind_merge:
                found = self._next(self._shorter, self._mended.params, block, entering, f"{layer}.x")
                source, now, wanted = found.get("source"), found["x"], exact["x"]
            else:
                given = named(self._shorter, block, entering)
                found = run(self._shorter, self._mended.params, given, f"{layer}.x", f"{layer}.y")
                now, wanted = entering["x"] + found[f"{layer}.y"], exact["attended"]
                source = entering.get("source")
            size = torch.ones(*now.shape[:2], 1) if source is None else source.sum(2, keepdim=True)
            missing = (wanted if source is None else (source @ wanted) / size) - now
            chosen = self._chosen(size.shape[1], draw)
            if not behind_merge:
                self._merged[number] = {**entering, f"{layer}.x": found[f"{layer}.x"]}
            rows = (found[f"{layer}.x"], missing, self._weights(size, len(chosen)))
            for into, images in zip((sums, held_out), divided(len(now)), strict=True):
                into.add(*(value[images][:, chosen].flatten(0, 1) for value in rows))
        if not behind_merge:
            self._averages = _Averages(layer=layer)
        if layer in self._narrow:
            self._take_narrow(block, layer, sums, held_out)
        else:
            self._take(layer, fit_change(sums, held_out))

    def _tell(self, layer: str) -> None:
        done = len(self._refits) + 1
        self._step(f"compensating: {layer} {done}/{self._layers}")

    def _sums(self, layer: str) -> tuple[RidgeSums, RidgeSums]:
        outputs, inputs = self._mended.params[f"{layer}.weight"].shape
        return no_sums(inputs, outputs), no_sums(inputs, outputs)

    def _chosen(self, tokens: int, draw: torch.Generator) -> Int[Tensor, " S"]:
        """The rows that are looked at: all of the prefix, some of the patches."""
        prefix = self._model.spec.prefix
        patches = torch.randperm(tokens - prefix, generator=draw)[:PATCH_ROWS]
        return torch.cat((torch.arange(prefix), prefix + patches))

    def _weights(self, size: Float[Tensor, "B N 1"], chosen: int) -> Float[Tensor, "B N 1"]:
        """How many original tokens each row counts as, those of patches also for rows that are not looked at."""
        prefix = self._model.spec.prefix
        weights = size * ((size.shape[1] - prefix) / max(chosen - prefix, 1))
        weights[:, :prefix] = PREFIX_WEIGHT
        return weights

    def _take(self, layer: str, fit: Fit) -> None:
        """Change a layer as a fit says."""
        self._refits.append(Refit(layer=layer, ridge=fit.ridge, left=fit.left))
        if fit.change is None:
            return
        self._replace(layer, self._weight(layer) + fit.change)

    def _lower_rank(self, block: int, one: Narrowing, width: int) -> None:
        """Let the scores of an attention be of a lower rank; the projection behind it is then fitted to such scores."""
        (rows,) = one.rows
        moments = no_moments(self._mended.params[f"{rows.layer}.weight"].shape[1])
        for number in range(len(self._merged)):
            entering = self._merged[number]
            given = named(self._shorter, block, entering)
            x, source = run(self._shorter, self._mended.params, given, f"{rows.layer}.x"), entering.get("source")
            inputs = x[f"{rows.layer}.x"]
            size = torch.ones(*inputs.shape[:2], 1) if source is None else source.sum(2, keepdim=True)
            fitted, _ = divided(len(inputs))
            moments.add(inputs[fitted], self._weights(size, size.shape[1])[fitted])
        self._scores[one.layer] = lower_scores(self._weight(rows.layer), moments, one.there, width)
        self._replace(rows.layer, self._scores[one.layer].whole)

    def _take_narrow(self, block: int, layer: str, sums: RidgeSums, held_out: RidgeSums) -> None:
        """Leave out the units or heads that a layer's output needs least; what follows sees the narrower model."""
        one = self._narrow[layer]
        if one.whole:
            self._take(layer, fit_change(sums, held_out))
            return
        weight = self._weight(layer)
        fit = fit_narrow(sums, held_out, weight, one.stay, one.width)
        if one.thinner:
            self._take_thin(block, one, fit, fit_thin(sums, held_out, weight, fit, one.there, one.thinner))
        else:
            kept = {"units" if one.width == 1 else "heads": one.stay}
            self._refits.append(Refit(layer=layer, ridge=fit.ridge, left=fit.left, **kept))
            self._replace(layer, fit.weight)
            self._mended = narrowed(self._mended, one, fit.kept)
            if self._averages is not None and self._averages.layer == layer:
                self._averages = replace(self._averages, columns=one.values(fit.kept))
        self._shorter = showing(program_of(self._mended.spec, self._merge, sources=True), self._shown)

    def _take_thin(self, block: int, one: Narrowing, fit: NarrowFit, thin: ThinFit) -> None:
        """Let the heads that stay be narrower: the layer that makes them, and the one that reads them."""
        width = thin.directions.shape[2]
        self._refits.append(Refit(layer=one.layer, ridge=thin.ridge, left=thin.left, heads=one.stay, head_dim=width))
        made = self._scores[one.layer].narrow(fit.kept, thin.directions)
        params = {**as_params(one.rows[0].layer, made), **as_params(one.layer, thin.weight)}
        self._mended = thinned(narrowed(self._mended, one, fit.kept), block, params, width)
        columns = one.values(fit.kept)
        basis = basis_of(thin.directions, columns, self._model.params[f"{one.layer}.weight"].shape[1] + 1)
        self._averages = _Averages(layer=one.layer, basis=basis[:-1, :-1].float())

    def _weight(self, layer: str) -> Float[Tensor, "O J"]:
        return with_bias(self._mended.params, layer)

    def _replace(self, layer: str, weight: Float[Tensor, "O J"]) -> None:
        params = {**self._mended.params, **as_params(layer, weight)}
        self._mended = self._mended.with_params(self._mended.spec, params)

    def _next(
        self, program: Program, params: Mapping[str, Array], block: int, columns: Columns, *shown: str
    ) -> dict[str, Tensor]:
        """Run one block: the columns of the tokens that leave it, and what else is to be shown."""
        behind = {stream_name(block + 1, column): column for column in COLUMNS}
        names = [name for name in behind if name in program.outputs]
        known = {} if self._averages is None else self._averages.known(columns)
        found = run(program, params, {**named(program, block, columns), **known}, *names, *shown)
        return {behind.get(name, name): value for name, value in found.items()}

    def _judged(self, images: int) -> Compensated:
        """Refit the layer that makes the output; keep what helps the output of held-out images most."""
        candidates: list[tuple[Model, tuple[Refit, ...]]] = [(self._model, ()), (self._mended, tuple(self._refits))]
        if self._last is not None:
            self._refit_output(self._last)
            candidates.append((self._mended, tuple(self._refits)))
        errors = [mean_error(self._before.values())]
        for model, _ in candidates[1:]:
            outputs = (self._held_output(model.params, number) for number in self._before)
            errors.append(mean_error(zip((exact for exact, _ in self._before.values()), outputs, strict=True)))
        least = 1 if self._narrow else 0
        best = least + int(np.argmin(errors[least:]))
        model, refits = candidates[best]
        return Compensated(
            model=model,
            refits=refits,
            images=images,
            held_out=sum(len(exact) for exact, _ in self._before.values()),
            error_before=errors[0],
            error_after=errors[best],
        )

    def _refit_output(self, layer: str) -> None:
        """Fit the layer that makes the output, on the unmerged model's output."""
        self._tell(layer)
        sums, held_out = self._sums(layer)
        for number in range(len(self._merged)):
            exact = self._output(self._whole, self._model.params, self._exact[number])
            given = named(self._shorter, self._end, self._merged[number])
            found = run(self._shorter, self._mended.params, given, f"{layer}.x", f"{layer}.y")
            for into, images in zip((sums, held_out), divided(len(exact)), strict=True):
                x, y, wanted = (v[images].flatten(0, -2) for v in (found[f"{layer}.x"], found[f"{layer}.y"], exact))
                into.add(x, wanted - y, torch.ones(len(x), 1))
        self._take(layer, fit_change(sums, held_out))

    def _held_output(self, params: Mapping[str, Array], number: int) -> Tensor:
        """The merged model's output on the held-out images of a group."""
        columns = self._merged[number]
        _, held = divided(len(columns["x"]))
        return self._output(self._shorter, params, {name: value[held] for name, value in columns.items()})

    def _output(self, program: Program, params: Mapping[str, Array], columns: Columns) -> Tensor:
        output = self._model.spec.output
        return run(program, params, named(program, self._end, columns), output)[output]
