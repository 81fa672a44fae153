"""Joint reconstruction by gradients, after everything that has a closed form: for minutes that the user grants.

What the graph has anyway is trained: weights before rounding, scales, biases and the affine of norms. No label is read.
A part of the images is held out, and what serves them best is kept, the unpolished network being the first candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitfold.errors import CalibrationError, RecipeError
from vitfold.model import Array
from vitfold.model.spec import Head
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.ops.straight import StraightThrough, codes_through
from vitfold.progress import Say
from vitfold.quant.network import Examples, Network
from vitfold.quantizer import Quantizer, QuantParams, Uniform, in_half

LEAST_IMAGES = 16
BATCH = 16
_EVERY = 8
"""One image in so many is held out."""
_MOST_HELD_OUT = 256
_MOST_BYTES = 2**30
"""Inputs are kept in memory up to here; further images are not used."""
_CODE_RATE, _RATE, _SCALE_RATE = 3e-3, 1e-4, 3e-4
"""Of codes, in steps of their grids; of biases and norms; of the logarithms of scales."""
_WARMUP = 0.1
"""The share of the time in which rates rise."""
_JUDGEMENTS = 6
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolishRecord:
    """How a polish went: images trained on and held out, updates, the loss on the held-out ones before and after."""

    images: int
    held_out: int
    updates: int
    loss_before: float
    loss_after: float

    @property
    def kept(self) -> bool:
        """True if the polished network is the better one."""
        return self.loss_after < self.loss_before

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "kept": self.kept}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Polished:
    """Parameters on their grids and quantizers, with what was measured."""

    params: Mapping[str, Array]
    quantizers: QuantParams
    record: PolishRecord


def polish_network(
    teacher: Network,
    network: Network,
    quantizers: QuantParams,
    examples: Examples,
    *,
    budget: float,
    seed: int = 0,
    half_scales: bool = False,
    say: Say = lambda _: None,
    clock: Clock = time.monotonic,
) -> Polished:
    """Train a quantized network to give what the float one gives, until the clock says stop.

    Equation: the Kullback-Leibler divergence of classes, the cross entropy of labels, or |y - t|^2 / |t|^2 of others.

    Args:
        teacher: the float network whose outputs are wanted.
        network: the quantized one, its weights on their grids.
        budget: seconds of training by `clock`; the seed fixes the order of images, the clock how many are seen.

    Raises:
        CalibrationError: on too few images.
        RecipeError: if no gradient reaches anything that could be trained.
    """
    say("polishing: float outputs")
    training, held_out = (_taught(teacher, inputs) for inputs in _divided(examples))
    learner = _Learner(network=network, quantizers=quantizers, half_scales=half_scales)
    judge = _Judge(network=network, held_out=held_out, params=network.params, quantizers=quantizers)
    before = judge.least = judge.loss(network.params, quantizers)
    updates = _train(learner, judge, training.shuffled(seed), budget=budget, clock=clock, say=say)
    record = PolishRecord(
        images=training.count,
        held_out=held_out.count,
        updates=updates,
        loss_before=before,
        loss_after=judge.least,
    )
    return Polished(params=judge.params, quantizers=judge.quantizers, record=record)


def _train(
    learner: _Learner, judge: _Judge, batches: Iterator[_Taught], *, budget: float, clock: Clock, say: Say
) -> int:
    """Train until the time is spent, let the judge see the network now and then, and return how many updates it took.

    Rates rise in a straight line, then fall as half a cosine of the time that is spent.
    """
    optimizer = learner.optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    start, unpolished, updates, judged = clock(), judge.least, 0, 0
    for batch in batches:
        spent = min((clock() - start) / budget, 1.0)
        if updates and spent * _JUDGEMENTS >= judged + 1:
            judged = int(spent * _JUDGEMENTS)
            loss = judge.see(*learner.rounded())
            say(f"polishing: {100 * spent:.0f} %, held-out loss {loss:.4g}, unpolished {unpolished:.4g}")
        if spent >= 1.0:
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min((spent + 0.01) / _WARMUP, 0.5 * (1.0 + math.cos(math.pi * spent)))
        optimizer.zero_grad()
        _backward(loss_of(learner.run(batch.inputs), batch.wanted, learner.network.head))
        optimizer.step()
        updates += 1
    return updates


def loss_of(found: Float[Tensor, "*B D"], wanted: Float[Tensor, "*B D"], head: Head) -> Tensor:
    """Return how far outputs are from those of the float network, per image: see `polish_network`."""
    if head == "single_label":
        log_found, log_wanted = (y.flatten(0, -2).log_softmax(-1) for y in (found, wanted))
        return F.kl_div(log_found, log_wanted, reduction="batchmean", log_target=True)
    if head == "multi_label":
        return F.binary_cross_entropy_with_logits(found, wanted.sigmoid())
    return (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Taught:
    """Inputs, and what the float network makes of them."""

    inputs: tuple[Tensor, ...]
    wanted: Tensor

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.wanted)

    def shuffled(self, seed: int) -> Iterator[_Taught]:
        """Return batches without end, drawn anew from all in every round."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.split(torch.randperm(self.count, generator=generator), BATCH):
                yield _Taught(inputs=tuple(x[part] for x in self.inputs), wanted=self.wanted[part])


def _divided(examples: Examples) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Read inputs to train on, and others that are held out, as many as memory is granted for."""
    if examples.count < LEAST_IMAGES:
        raise CalibrationError(
            f"{examples.count} images are too few to polish with; give at least {LEAST_IMAGES}, better 1024: "
            "--calibration-size 1024"
        )
    kept: list[tuple[Tensor, ...]] = []
    size = 0
    for batch in examples.batches(BATCH):
        size += sum(x.numel() * x.element_size() for x in batch.inputs)
        if kept and size > _MOST_BYTES:
            break
        kept.append(batch.inputs)
    inputs = [torch.cat(parts) for parts in zip(*kept, strict=True)]
    every = max(_EVERY, -(-len(inputs[0]) // _MOST_HELD_OUT))
    held = torch.arange(len(inputs[0])) % every == every - 1
    return tuple(x[~held] for x in inputs), tuple(x[held] for x in inputs)


def _outputs(network: Network, ops: Run, inputs: tuple[Tensor, ...]) -> Tensor:
    groups = zip(*(torch.split(x, BATCH) for x in inputs), strict=True)
    with torch.no_grad():
        return torch.cat([network.run(ops, group) for group in groups])


def _taught(teacher: Network, inputs: tuple[Tensor, ...]) -> _Taught:
    return _Taught(inputs=inputs, wanted=_outputs(teacher, Run(teacher.params), inputs))


@dataclass(slots=True, kw_only=True, eq=False)
class _Judge:
    """The network that served the held-out images best, as it would be deployed."""

    network: Network
    held_out: _Taught
    params: Mapping[str, Array]
    quantizers: QuantParams
    least: float = math.inf

    def loss(self, params: Mapping[str, Array], quantizers: QuantParams) -> float:
        """Return the loss on the held-out images."""
        found = _outputs(self.network, Simulate(params, quantizers), self.held_out.inputs)
        return float(loss_of(found, self.held_out.wanted, self.network.head))

    def see(self, params: Mapping[str, Array], quantizers: QuantParams) -> float:
        """Return the loss of a candidate, and keep it if it is the best."""
        loss = self.loss(params, quantizers)
        if loss < self.least:
            self.least, self.params, self.quantizers = loss, params, quantizers
        return loss


def _backward(loss: Tensor) -> None:
    if not loss.requires_grad:
        raise RecipeError(
            "nothing of this model can be polished: its outputs come from operators through which no gradient "
            "passes; leave --polish out"
        )
    loss.backward()  # type: ignore[no-untyped-call]


@dataclass(slots=True, kw_only=True, eq=False)
class _Learner:
    """What is trained: codes as real numbers, logarithms of scales, biases and the affine of norms."""

    network: Network
    quantizers: QuantParams
    half_scales: bool
    codes: dict[str, Tensor] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        params = self.network.params
        norms = [node.site for node in self.network.program.nodes if node.op == "layer_norm"]
        for site, quantizer in self.quantizers.items():
            if not isinstance(quantizer, Uniform):
                continue
            layer, _, operand = site.rpartition(".")
            if operand == "w":
                self.codes[layer] = self._first_codes(layer, quantizer)
                norms.append(layer)
            if operand != "y" and f"{layer}.y" not in self.quantizers and self._free(layer, quantizer):
                self.logs[site] = torch.from_numpy(np.asarray(np.log(quantizer.scale))).requires_grad_()
        for name in (f"{site}.{kind}" for site in norms for kind in ("weight", "bias")):
            if name in params and params[name].ndim == 1:
                self.vectors[name] = torch.from_numpy(params[name].copy()).requires_grad_()

    def _free(self, layer: str, quantizer: Uniform) -> bool:
        """Say whether every scale of a quantizer may have a value of its own."""
        return quantizer.axis is None or len(np.unique(quantizer.scale)) > 3 or layer not in self.codes

    def _first_codes(self, layer: str, quantizer: Uniform) -> Tensor:
        """Where the weight was rounded to."""
        now = np.rint(self.network.params[f"{layer}.weight"] / quantizer.scale.reshape(self._shape(quantizer)))
        return torch.from_numpy(np.asarray(now, np.float32)).requires_grad_()

    def optimizer(self) -> torch.optim.Optimizer:
        """Return Adam with a rate for each kind."""
        kinds = ((self.codes, _CODE_RATE), (self.vectors, _RATE), (self.logs, _SCALE_RATE))
        return torch.optim.Adam([{"params": list(kind.values()), "lr": rate} for kind, rate in kinds if kind])

    def run(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the outputs, with gradients."""
        scales = {site: log.exp() for site, log in self.logs.items()}
        learned = dict(self.vectors)
        for layer, codes in self.codes.items():
            quantizer = self._grid(layer)
            scale = scales.get(f"{layer}.w", torch.from_numpy(quantizer.scale)).reshape(self._shape(quantizer))
            learned[f"{layer}.weight"] = codes_through(codes, *self._ends(quantizer)) * scale
        ops = StraightThrough(self.network.params, self.quantizers, learned=learned, scales=scales)
        return self.network.run(ops, inputs)

    def rounded(self) -> tuple[dict[str, Array], QuantParams]:
        """Return the parameters on their grids, and the quantizers."""
        found: dict[str, Quantizer] = dict(self.quantizers)
        for site, log in self.logs.items():
            quantizer = self.quantizers[site]
            assert isinstance(quantizer, Uniform)
            learned = replace(quantizer, scale=log.detach().exp().numpy())
            found[site] = in_half(learned) if self.half_scales else learned
        params = dict(self.network.params)
        params |= {name: vector.detach().numpy().copy() for name, vector in self.vectors.items()}
        for layer, codes in self.codes.items():
            quantizer = found[f"{layer}.w"]
            assert isinstance(quantizer, Uniform)
            whole = codes_through(codes.detach(), *self._ends(quantizer))
            scale = torch.from_numpy(quantizer.scale).reshape(self._shape(quantizer))
            params[f"{layer}.weight"] = (whole * scale).numpy()
        return params, QuantParams(found)

    def _grid(self, layer: str) -> Uniform:
        quantizer = self.quantizers[f"{layer}.w"]
        assert isinstance(quantizer, Uniform)
        return quantizer

    def _shape(self, quantizer: Uniform) -> tuple[int, ...]:
        return (-1, 1) if quantizer.axis == 0 else ()

    def _ends(self, quantizer: Uniform) -> tuple[Tensor, Tensor]:
        zero_point = torch.from_numpy(quantizer.zero_point).float().reshape(self._shape(quantizer))
        return quantizer.low - zero_point, quantizer.high - zero_point
