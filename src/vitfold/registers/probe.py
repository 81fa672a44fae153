"""How a model with a remedy fares under plain quantization, measured quickly on a few images.

Ranges are those observed, per tensor: the plainest quantizer, which outliers hurt most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vitfold.architectures.programs import forward
from vitfold.bench.classes import class_targets
from vitfold.bench.statistics import paired_drop
from vitfold.images import ImageSet, batches
from vitfold.model import Array, Model, block_layers
from vitfold.ops.record import Record
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.progress import Advance
from vitfold.quant.collect import ordinary_rows
from vitfold.quant.ranges import affine_uniform, rounded, symmetric_uniform
from vitfold.quant.sites import LinearSite, find_sites
from vitfold.quantizer import Quantizer
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.transforms.tokens import Tokens

Ranges = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What quantization does to a model: its outputs against the float model's, and the tokens that cause it.

    `max_norm` is the largest |x| of a token that shares the range of the sensitive layer, `block_norm` that of a token
    behind the sensitive block; `right` says which images are classified as labelled, None without labels.
    """

    max_norm: float
    block_norm: float
    cosine: float
    sqnr_db: float
    right: tuple[bool, ...] | None

    @property
    def top1(self) -> float | None:
        """Share of images classified as labelled."""
        return None if self.right is None else sum(self.right) / len(self.right)

    def lead_over(self, other: Effect) -> float:
        """By how much top-1 is higher on the same images; 0 where chance alone explains it, and without labels."""
        if self.right is None or other.right is None:
            return 0.0
        drop = paired_drop(np.array(other.right), np.array(self.right))
        return 0.0 if drop.is_noise else -drop.drop


@dataclass(slots=True, eq=False)
class _Pass:
    """Tokens in front of every block, batch by batch, and the outputs."""

    tokens: list[list[Tokens[Tensor]]]
    outputs: list[Tensor] = field(default_factory=list)


class Probe:
    """A float model on a few images, and all that measuring its plain quantization from some block on takes."""

    def __init__(
        self,
        model: Model,
        merge: MergeRecipe,
        quant: QuantRecipe,
        images: ImageSet,
        *,
        batch: int = 8,
        advance: Advance | None = None,
    ) -> None:
        self._model, self._merge, self._quant = model, merge, quant
        self._targets: Sequence[int] | None = None
        if images.classes is not None and model.spec.head == "single_label":
            self._targets = class_targets(images, model.labels, model.spec.output_width)
        self._pixels = [
            torch.from_numpy(group.pixel_values) for group in batches(images, model.preprocess, batch=batch)
        ]
        self._params, self._weights = self._rounded_weights()
        self._ranges: Ranges = {}
        self._norms: dict[str, float] = {}
        self._rarity: dict[str, float] = {}
        self._float = self._run(model, self._watching(model, self._ranges, self._norms, advance, self._rarity), 0, None)
        self._quantized: _Pass | None = None
        self._simulated = Simulate(self._params, self._quantizers(self._ranges))

    @property
    def expected(self) -> Tensor:
        """The float model's outputs."""
        return torch.cat(self._float.outputs)

    def alone(self, site: LinearSite) -> float:
        """Return the squared error of the outputs with this one layer quantized, as a share of their square."""
        block = self._model.spec.num_layers if site.block is None else site.block
        weight = f"{site.layer}.weight"
        params = {**self._model.params, weight: self._params[weight]}
        quantizers = {name: q for name, q in self._quantizers(self._ranges).items() if name in site.names}
        found = self._run(self._model, Simulate(params, quantizers), block, self._float, keep=False)
        return self._noise(torch.cat(found.outputs))

    def rarity(self, layer: str) -> float:
        """Return how many times the norm of an image's median token its largest is, at most, in a layer's input."""
        return self._rarity[f"{layer}.x"]

    def sites(self) -> list[LinearSite]:
        """Return the layers of the blocks that the plan quantizes."""
        linears = find_sites(self._model.spec)[0]
        return [s for s in linears if s.block is not None and f"{s.layer}.w" in self._weights]

    def effect(self, model: Model, site: str, *, first: int | None = None) -> Effect:
        """Quantize a model with a remedy and compare it with the float model without; `site` is the sensitive layer.

        Runs begin at block `first`, by default the first that the remedy changes, on the tokens kept in front of it.
        """
        if self._quantized is None:
            self._quantized = self._run(self._model, self._simulated, 0, None)
        first = _first_block(model) if first is None else first
        ranges, norms = dict(self._ranges), dict(self._norms)
        if model is not self._model:
            self._run(model, self._watching(model, ranges, norms), first, self._float, keep=False)
        changed = {name: array for name, array in model.params.items() if f"{name}" not in self._params}
        params = {**self._params, **changed, **_moved_tokens(model, self._model)}
        ops = Simulate(params, self._quantizers(ranges), like=self._simulated)
        found = torch.cat(self._run(model, ops, first, self._quantized, keep=False).outputs)
        expected = self.expected
        cosine = torch.nn.functional.cosine_similarity(found.flatten(1), expected.flatten(1), dim=1)
        right = None
        if self._targets is not None:
            right = tuple((found.argmax(-1) == torch.tensor(self._targets)).tolist())
        return Effect(
            max_norm=norms[f"{site}.x"],
            block_norm=norms[_behind(block_layers(model.spec)[site])],
            cosine=float(cosine.mean()),
            sqnr_db=-10.0 * float(np.log10(max(self._noise(found), 1e-12))),
            right=right,
        )

    def _noise(self, found: Tensor) -> float:
        expected = self.expected.double()
        return float((found.double() - expected).square().sum() / expected.square().sum())

    def _run(self, model: Model, ops: Run, first: int, before: _Pass | None, *, keep: bool = True) -> _Pass:
        """Run from block `first` on, from the tokens of an earlier pass; from the images, where that is None or 0."""
        made = _Pass([[] for _ in range(model.spec.num_layers + 1)])
        with torch.inference_mode():
            for number, pixels in enumerate(self._pixels):
                given = None if before is None or first == 0 else (first, before.tokens[first][number])

                def observe(boundary: int, seen: Tokens[Tensor]) -> None:
                    if keep:
                        made.tokens[boundary].append(seen)
                    if isinstance(ops, _Watch) and boundary:
                        ops.see_block(boundary - 1, seen.x)

                made.outputs.append(forward(ops, model.spec, self._merge, pixels, given=given, observe=observe))
        return made

    def _watching(
        self,
        model: Model,
        ranges: Ranges,
        norms: dict[str, float],
        advance: Advance | None = None,
        rarity: dict[str, float] | None = None,
    ) -> _Watch:
        leave_out = 0 if model.spec.sinks is None else model.spec.sinks.leave_out
        return _Watch(model.params, ranges, norms, leave_out, advance, rarity)

    def _rounded_weights(self) -> tuple[dict[str, Array], dict[str, Quantizer]]:
        params: dict[str, Array] = dict(self._model.params)
        quantizers: dict[str, Quantizer] = {}
        for site in find_sites(self._model.spec)[0]:
            bits = self._quant.bits(site.layer, weight=True)
            if bits is not None and self._quant.bits(site.layer, weight=False) is not None:
                weight = torch.from_numpy(params[f"{site.layer}.weight"])
                quantizer = symmetric_uniform(weight.abs().amax(1), bits, axis=0)
                quantizers[f"{site.layer}.w"] = quantizer
                params[f"{site.layer}.weight"] = rounded(weight, quantizer).numpy()
        return params, quantizers

    def _quantizers(self, ranges: Ranges) -> Mapping[str, Quantizer]:
        found = dict(self._weights)
        for site, (low, high) in ranges.items():
            layer = site.removesuffix(".x").removesuffix(".prefix")
            bits = self._quant.bits(layer, weight=False)
            if f"{layer}.w" in self._weights and bits is not None:
                found[site] = affine_uniform(low, high, bits)
        return found


class _Watch(Record):
    """Keeps the range of every layer's input and the largest token norm there; a layer met again starts anew."""

    def __init__(
        self,
        params: Mapping[str, Array],
        ranges: Ranges,
        norms: dict[str, float],
        leave_out: int,
        advance: Advance | None,
        rarity: dict[str, float] | None,
    ) -> None:
        super().__init__(params, self._look)
        self._rarity = rarity
        self._ranges, self._largest, self._leave_out, self._advance = ranges, norms, leave_out, advance
        self._fresh: set[str] = set()

    def _look(self, site: str, value: Tensor) -> None:
        if not site.endswith(".x") or site.endswith(".sinks.x"):
            return
        rows = value.reshape(-1, value.shape[-1])[ordinary_rows(value, self._leave_out)]
        low, high = rows.amin(), rows.amax()
        if site in self._fresh:
            low, high = torch.minimum(low, self._ranges[site][0]), torch.maximum(high, self._ranges[site][1])
        self._ranges[site] = (low, high)
        if self._rarity is not None and value.ndim == 3:
            norms = value.abs().amax(-1)
            ratio = float((norms.amax(1) / norms.median(1).values.clamp_min(1e-12)).max())
            self._rarity[site] = max(ratio, self._rarity.get(site, 0.0))
        self._note(site, value)

    def _note(self, name: str, value: Tensor) -> None:
        largest = float(value.abs().max())
        self._largest[name] = max(largest, self._largest[name]) if name in self._fresh else largest
        self._fresh.add(name)

    def see_block(self, block: int, x: Tensor) -> None:
        """Note the tokens behind a block."""
        self._note(_behind(block), x)
        if self._advance is not None and block == 0:
            self._advance(len(x))


def _behind(block: int) -> str:
    """The name under which the tokens behind a block are noted."""
    return f"tokens behind block {block}"


def _first_block(model: Model) -> int:
    """The first block that a remedy changes; 0, where it changes statistics or tokens everywhere."""
    sinks = model.spec.sinks
    if sinks is None or sinks.leave_out or sinks.neurons:
        return 0
    touched = [block_layers(model.spec)[layer] for layer in sinks.layers]
    touched += [sinks.start] if sinks.rows else []
    if sinks.deletions:
        site = sinks.deletion_site
        touched.append(sinks.block if site is None else block_layers(model.spec)[site])
    return min(touched, default=0)


def _moved_tokens(model: Model, original: Model) -> dict[str, Array]:
    """The parameters in front of the blocks, where a remedy appended a token."""
    names = ("reg_token", "pos_embed")
    return {name: model.params[name] for name in names if name in model.params and model.spec != original.spec}
