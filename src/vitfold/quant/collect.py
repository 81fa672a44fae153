"""Calibration data: a bounded sample of what every site sees, collected in one pass.

What is kept: rows of each linear layer's input, exact ranges per channel, where asked for the gradient of a probe of
the model's outputs at the same rows of the layer's output, and a few images' attention operands. Memory does not grow
with the number of images.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.errors import CalibrationError
from vitfold.model.spec import Head
from vitfold.ops.record import Record
from vitfold.progress import Advance
from vitfold.quant.methods import Curvature
from vitfold.quant.network import Examples, Network

ROWS = 1024
ATTENTION_IMAGES = 8
_FORMAT = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearSamples:
    """Rows of a linear layer's input, its exact range per channel over all rows, gradients at the outputs.

    Half of the rows are those of largest magnitude in their batch (sink tokens, which decide ranges and are
    too rare for a random sample), the others random; `share` is how many rows of the whole stream each
    stands for. `grad` is the gradient of `probe` at the same rows of the output, None if not asked for.
    """

    x: Float[Tensor, "R I"]
    share: Float[Tensor, "R 1"]
    low: Float[Tensor, " I"]
    high: Float[Tensor, " I"]
    grad: Float[Tensor, "R O"] | None

    @property
    def ordinary(self) -> Float[Tensor, "S I"]:
        """The randomly drawn rows only, for percentiles; all rows, where all were kept."""
        drawn = (self.share > 1).squeeze(1)
        return self.x[drawn] if drawn.any() else self.x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionSamples:
    """Operands of an attention on a few images; `bias` is what was added to the scaled logits, or None."""

    q: Float[Tensor, "S H N K"]
    k: Float[Tensor, "S H M K"]
    v: Float[Tensor, "S H M K"]
    logits: Float[Tensor, "S H N M"]
    grad_logits: Float[Tensor, "S H N M"] | None
    grad_output: Float[Tensor, "S H N K"] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """Everything that a method may look at."""

    linears: Mapping[str, LinearSamples]
    attentions: Mapping[str, AttentionSamples]
    images: int


class _Reservoir:
    """Keeps what `Samples` holds while batches pass."""

    def __init__(self, layers: set[str], attentions: set[str], quota: int, seed: int, leave_out: int) -> None:
        self._layers, self._attentions, self._quota, self._seed = layers, attentions, quota, seed
        self._leave_out = leave_out
        self.arrays: dict[str, list[Tensor]] = {}
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self._rows: dict[str, Tensor] = {}
        self.watched: dict[str, Tensor] = {}
        self.batch = 0
        self.take_attention = True
        self.first_bad: str | None = None

    def see(self, site: str, value: Tensor) -> None:
        owner, _, part = site.rpartition(".")
        if part == "x" and owner in self._layers:
            every = value.detach().reshape(-1, value.shape[-1])
            kept = ordinary_rows(value.detach(), self._leave_out)
            rows = every[kept]
            if self.first_bad is None and not torch.isfinite(rows.sum()):
                self.first_bad = site
            low, high = rows.amin(0), rows.amax(0)
            if owner in self.ranges:
                low, high = torch.minimum(low, self.ranges[owner][0]), torch.maximum(high, self.ranges[owner][1])
            self.ranges[owner] = (low, high)
            chosen, share = self._choose(owner, rows, self._quota * len(value))
            self._rows[owner] = kept[chosen]
            self._keep(site, rows[chosen])
            self._keep(f"{owner}.share", share)
        elif part == "y" and owner in self._layers:
            self.watched[f"{owner}.y"] = value
        elif self.take_attention:
            attention = owner if part != "y" else owner.rpartition(".")[0]
            if attention not in self._attentions or part == "softmax":
                return
            if part == "y":
                self.watched[site] = value
            if site.endswith(".qk.y") or part in ("q", "k", "v"):
                self._keep(site, value.detach())

    def _choose(self, owner: str, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Row numbers and their shares: the largest, and a random sample of the others."""
        if count >= len(rows):
            return torch.arange(len(rows)), torch.ones(len(rows), 1)
        order = rows.abs().amax(1).argsort(descending=True, stable=True)
        top, rest = order[: count // 2], order[count // 2 :]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed}:{self.batch}:{owner}".encode()))
        drawn = rest[torch.randperm(len(rest), generator=generator)[: count - len(top)]]
        share = torch.ones(count, 1)
        share[len(top) :] = len(rest) / len(drawn)
        return torch.cat((top, drawn)), share

    def _keep(self, site: str, value: Tensor) -> None:
        self.arrays.setdefault(site, []).append(value.clone())

    def keep_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        for site, gradient in gradients.items():
            owner = site.removesuffix(".y")
            if owner in self._layers:
                self._keep(f"{owner}.g", gradient.reshape(-1, gradient.shape[-1])[self._rows[owner]])
            else:
                self._keep(f"{owner}.g", gradient)


def ordinary_rows(x: Float[Tensor, "B *N D"], leave_out: int) -> Int[Tensor, " R"]:
    """Return the numbers of the rows of x without the `leave_out` largest of every image; all of a pooled x."""
    rows = x.shape[:-1].numel()
    if x.ndim < 3 or not leave_out or leave_out >= x.shape[1]:
        return torch.arange(rows)
    order = x.abs().amax(-1).argsort(dim=1, descending=True, stable=True)
    kept = order[:, leave_out:].sort(1).values
    return (kept + x.shape[1] * torch.arange(len(x))[:, None]).flatten()


def collect(
    network: Network,
    examples: Examples,
    *,
    gradients: Curvature | None,
    seed: int = 0,
    batch: int = 8,
    advance: Advance | None = None,
    rows: int = ROWS,
) -> Samples:
    """Run a network over the examples and sample every site; kept for the next call.

    Args:
        gradients: also sample the gradient of `probe` at every output, for the Hessian-guided search.
        rows: rows per linear layer over all examples, at least one per example.

    Raises:
        CalibrationError: if activations are NaN or infinite, naming the first site.
    """
    key = samples_key(network, examples, gradients, seed, batch, rows)
    kept = read_arrays("calibration", key)
    if kept is None or "images" not in kept:
        kept = _pass(network, examples, gradients=gradients, seed=seed, batch=batch, advance=advance, rows=rows)
        keep_arrays("calibration", key, kept)
    elif advance is not None:
        advance(examples.count)
    return _samples(network, {name: torch.from_numpy(array) for name, array in kept.items()})


def samples_key(
    network: Network, examples: Examples, gradients: Curvature | None, seed: int, batch: int, rows: int
) -> str:
    """Return the key of what `collect` keeps: everything that it looks at."""
    return key_of(_FORMAT, network.digest, examples.digest(), gradients, seed, batch, rows)


def _pass(
    network: Network,
    examples: Examples,
    *,
    gradients: Curvature | None,
    seed: int,
    batch: int,
    advance: Advance | None,
    rows: int,
) -> dict[str, np.ndarray]:
    linears, attentions = network.linears, {site.site for site in network.attentions}
    quota = max(1, rows // examples.count)
    layers = {s.layer for s in linears} | {s.apart for s in linears if s.apart is not None}
    reservoir = _Reservoir(layers, attentions, quota, seed, network.leave_out)
    ops = Record(network.params, reservoir.see)
    seen = 0
    generator = torch.Generator().manual_seed(seed)
    for group in examples.batches(batch):
        reservoir.batch += 1
        reservoir.take_attention = seen < ATTENTION_IMAGES
        reservoir.watched = {}
        if gradients is not None:
            with torch.enable_grad():
                output = network.run(ops, tuple(value.requires_grad_() for value in group.inputs))
                loss = probe(output, network.head, gradients, generator)
                watched = reservoir.watched
                found = torch.autograd.grad(loss, list(watched.values()), allow_unused=True)
            reservoir.keep_gradients(
                {
                    site: torch.zeros_like(watched[site]) if gradient is None else gradient
                    for site, gradient in zip(watched, found, strict=True)
                }
            )
        else:
            with torch.inference_mode():
                network.run(ops, group.inputs)
        if reservoir.first_bad is not None:
            raise CalibrationError(
                f"the activations at {reservoir.first_bad} are NaN or infinite on images like "
                f"{group.first}; check the preprocessing and the weights, or keep that site float "
                "with --keep-float"
            )
        seen += group.size
        if advance is not None:
            advance(group.size)
    reservoir.watched = {}
    arrays = {site: torch.cat(parts).numpy() for site, parts in reservoir.arrays.items()}
    for layer, (low, high) in reservoir.ranges.items():
        arrays[f"{layer}.low"], arrays[f"{layer}.high"] = low.numpy(), high.numpy()
    arrays["images"] = np.array(seen)
    return arrays


def probe(
    output: Float[Tensor, "B *N C"], head: Head, curvature: Curvature, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Return a scalar whose squared gradients estimate the diagonal of a curvature matrix of the loss; no labels.

    Equation: <r, S^T output>, r random signs: E[(J^T S r)^2] = diag(J^T S S^T J). "gauss-newton": S = I, the squared
    error of the output. "fisher", on logits of one class: S = diag(sqrt p) - p sqrt(p)^T, p = softmax(output), so that
    S S^T = diag(p) - p p^T: the Fisher information, which is the Hessian of KL(p || softmax(output)) where the
    model equals itself; on logits of several labels S = diag(sqrt(p (1 - p))), p = sigmoid(output). Features are
    normalized first, and as what a regression gives, they have S = I in both.

    A gradient of that divergence itself is zero there. The Fisher information of a confident image all but vanishes;
    to the Gauss-Newton matrix every image counts alike.

    Source: PTQ4ViT (2111.12293), section 3.3, the Hessian by squared gradients; Hutchinson's estimator as in
    PyHessian (1912.07145).
    """
    signs = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1.0
    if head == "features":
        output = torch.nn.functional.normalize(output, dim=-1)
    elif curvature == "fisher" and head == "single_label":
        p = output.detach().softmax(-1)
        signs = p.sqrt() * signs - p * (p.sqrt() * signs).sum(-1, keepdim=True)
    elif curvature == "fisher" and head == "multi_label":
        p = output.detach().sigmoid()
        signs = (p * (1.0 - p)).sqrt() * signs
    return (output * signs).sum()


def _samples(network: Network, arrays: Mapping[str, Tensor]) -> Samples:
    linears, attentions = network.linears, network.attentions
    names = [name for s in linears for name in (s.layer, s.apart) if name is not None]
    return Samples(
        linears={
            name: LinearSamples(
                x=arrays[f"{name}.x"],
                share=arrays[f"{name}.share"],
                low=arrays[f"{name}.low"],
                high=arrays[f"{name}.high"],
                grad=arrays.get(f"{name}.g"),
            )
            for name in names
        },
        attentions={
            s.site: AttentionSamples(
                q=arrays[f"{s.site}.q"],
                k=arrays[f"{s.site}.k"],
                v=arrays[f"{s.site}.v"],
                logits=arrays[f"{s.site}.qk.y"],
                grad_logits=arrays.get(f"{s.site}.qk.g"),
                grad_output=arrays.get(f"{s.site}.av.g"),
            )
            for s in attentions
        },
        images=int(arrays["images"]),
    )
