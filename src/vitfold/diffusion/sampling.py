"""The sampling loop: which part of a model runs at which step, with classifier-free guidance in one batch.

Seeds, guidance and the order of parts. Caches live with the session under names; the loop says which name a part
reads and writes, so they are never copied.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from vitfold.diffusion.conditions import Classes, Conditions
from vitfold.diffusion.methods import ReuseMethod, full_steps
from vitfold.diffusion.parts import CHANGE, FILTER, LAST, RESIDUAL, SCORES, WEIGHTS, module_names
from vitfold.diffusion.token_choice import BlockChoice, choose_blocks
from vitfold.engines import Session
from vitfold.errors import EngineError, RecipeError
from vitfold.model import Array, DenoiserSpec, DiTSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sampled:
    """Samples in [-1, 1] (or latents), and how long every step took: those computed in full, and those that reused.

    `kept_bytes` is None where somebody else keeps them.
    """

    samples: Float[np.ndarray, B * latent]
    full_ns: tuple[int, ...]
    reused_ns: tuple[int, ...]
    kept_bytes: int | None

    @property
    def full_steps(self) -> int:
        """Steps that were computed in full."""
        return len(self.full_ns)

    @property
    def reused_steps(self) -> int:
        """Steps that reused something."""
        return len(self.reused_ns)


def sample(
    executor: Session,
    spec: DiTSpec | DenoiserSpec,
    scheduler: Any,
    method: ReuseMethod,
    labels: Sequence[int],
    *,
    seed: int,
    guidance: float,
    conditions: Conditions | None = None,
    watch: Callable[[Array], None] | None = None,
) -> Sampled:
    """Draw one sample per label; sample i depends on seed + i alone, and not on what is drawn beside it.

    Labels are numbers among the `conditions`, by default the model's classes.
    A method that decides as it goes decides for every sample by itself, so its samples are drawn one by one.
    `watch` is shown what all blocks added at every step, (2 B, N, D), by a method that keeps it and computes all.

    Equation: e = e_null + g (e_class - e_null), both from one batch of 2 B rows; with g = 1 only e_class is computed.
    A learned variance is not guided: it is the one with the class.

    Source: classifier-free guidance (2207.12598).

    Raises:
        EngineError: if a sample is NaN or infinite.
        RecipeError: if the model's conditions come from outside, and there are none.
    """
    count = len(labels)
    if method.decides and count > 1:
        again = {"seed": seed, "guidance": guidance, "conditions": conditions, "watch": watch}
        return _one_by_one(executor, spec, scheduler, method, labels, again)
    rows = 2 * count if guidance != 1.0 else count
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    x = _noise(spec, generators) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    timesteps = [float(t) for t in scheduler.timesteps]
    at = (conditions or conditions_of(spec)).at(executor, timesteps, labels, guided=rows > count)
    state = _State(
        executor=executor,
        method=method,
        must=full_steps(method, len(timesteps)),
        spec=spec,
        count=count,
        rows=rows,
        ages=[0] * spec.num_layers,
        chance=[np.random.default_rng((seed + i, 1)) for i in range(count)],
    )
    extra: dict[str, Any] = {"generator": generators} if _is_stochastic(scheduler) else {}
    took: dict[bool, list[int]] = {True: [], False: []}
    for step, t in enumerate(scheduler.timesteps):
        began, full_before = time.perf_counter_ns(), state.full
        entering = _scaled(scheduler, x, t).float().numpy()
        state.given = {"image": np.concatenate([entering] * (rows // count)), **at(step)}
        if method.cut == "filtered" and isinstance(spec, DiTSpec):
            state.given = {**state.given, FILTER: content_filter(spec.grid, scheduler, int(t))}
        predicted = torch.from_numpy(_finite(state.advance(step, guidance), f"step {step + 1} of {len(timesteps)}"))
        if spec.learned_sigma and not _learned(scheduler):
            predicted = predicted[:, : spec.channels]
        if watch is not None:
            watch(executor.fetch(state.newest)[state.newest])
        x = scheduler.step(predicted, t, x, **extra).prev_sample
        took[state.full > full_before].append(time.perf_counter_ns() - began)
    return Sampled(
        samples=_finite(x.float().numpy(), "the last step"),
        full_ns=tuple(took[True]),
        reused_ns=tuple(took[False]),
        kept_bytes=executor.kept_bytes,
    )


def conditions_of(spec: DiTSpec | DenoiserSpec) -> Classes:
    """Return the conditions of a model that has them within.

    Raises:
        RecipeError: if they come from outside.
    """
    if isinstance(spec, DiTSpec):
        return Classes(spec=spec)
    names = ", ".join(one.name for one in spec.conditions)
    raise RecipeError(
        f"{spec.module} draws by embeddings of prompts ({names}); give --embeddings FILE, which vitfold "
        "diffusion embed writes"
    )


def content_filter(grid: int, scheduler: Any, t: int) -> Float[np.ndarray, "1 N N"]:
    """Return the matrix that mixes tokens (grid x grid) so that those frequencies pass which are no noise at time t.

    Equation: H(f) = a S(f) / (a^2 S(f) + b^2), with x_t = a x + b noise and the spectrum of images S(f) = 1 / f^2; its
    largest value is one.

    Source: SeaCache (2602.18993).
    """
    signal = float(scheduler.alphas_cumprod[t])
    axis = np.fft.fftfreq(grid) * grid
    spread = np.maximum(axis[:, None] ** 2 + axis**2, 1.0)  # the mean is as large as the slowest wave
    gain = np.sqrt(signal) / (signal + (1 - signal) * spread)
    waves = np.fft.fft2(np.eye(grid * grid).reshape(-1, grid, grid))
    found = np.fft.ifft2(waves * (gain / gain.max())).real.reshape(1, grid * grid, grid * grid)
    return found.astype(np.float32)


def _noise(spec: DiTSpec | DenoiserSpec, generators: Sequence[torch.Generator]) -> torch.Tensor:
    drawn = [torch.randn(spec.image_shape, generator=generator) for generator in generators]
    return torch.stack([pack(one, spec) if isinstance(spec, DenoiserSpec) else one for one in drawn])


def pack(drawn: torch.Tensor, spec: DenoiserSpec) -> torch.Tensor:
    """Return noise in the order of latents: as a pipeline packs what it draws."""
    if not spec.packing:
        return drawn
    strides = [stride for _, stride in spec.packing]
    return drawn.reshape(-1).as_strided([length for length, _ in spec.packing], strides).reshape(spec.image_shape)


def _scaled(scheduler: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """What enters the model; schedulers of flow matching leave it as it is."""
    scale = getattr(scheduler, "scale_model_input", None)
    return x if scale is None else scale(x, t)


def _finite(values: Array, where: str) -> Array:
    if not np.isfinite(values).all():
        raise EngineError(
            f"{where} gives values that are NaN or infinite; the weights or the graphs overflow, or the sampler does "
            "not go with the model: try --sampler ddim, or --engine torch to see whose fault it is"
        )
    return values


def _one_by_one(
    executor: Session,
    spec: DiTSpec | DenoiserSpec,
    scheduler: Any,
    method: ReuseMethod,
    labels: Sequence[int],
    how: Mapping[str, Any],
) -> Sampled:
    """Draw every sample as if it were alone; steps are those of the sample that computed the most in full."""
    found = []
    for place, label in enumerate(labels):
        mine = copy.deepcopy(scheduler)  # a solver of several steps remembers those that it has taken
        found.append(sample(executor, spec, mine, method, [label], **{**how, "seed": how["seed"] + place}))
    return joined(found)


def joined(found: Sequence[Sampled]) -> Sampled:
    """Return batches as one; steps are those of the batch that computed the most in full."""
    most = max(found, key=lambda batch: batch.full_steps)
    return Sampled(
        samples=np.concatenate([batch.samples for batch in found]),
        full_ns=most.full_ns,
        reused_ns=most.reused_ns,
        kept_bytes=max((batch.kept_bytes for batch in found if batch.kept_bytes is not None), default=None),
    )


_WATCHED = ("first", "input", "filtered")
"""Cuts whose `front` runs at every step and says whether the rest does."""


@dataclass(slots=True, kw_only=True)
class _State:
    """What the loop remembers between steps: where full steps were, and under which names their tensors are kept.

    `given` are image and condition of the step, for all rows; `ages` the refreshed steps since each block ran in full,
    `chance` what scores at random come from, for each image.
    """

    executor: Session
    method: ReuseMethod
    must: tuple[bool, ...]
    spec: DiTSpec | DenoiserSpec
    count: int
    rows: int
    full: int = 0
    places: tuple[int, ...] = ()
    own: tuple[str, str] = ("own.0", "own.1")
    moved: float = 0.0
    difference: Array | None = None
    given: Mapping[str, Array] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    ages: list[int] = field(default_factory=list)
    chance: Sequence[np.random.Generator] = ()

    @property
    def newest(self) -> str:
        """The name under which the residual of the newest full step is kept."""
        return f"{RESIDUAL}.{(self.full - 1) % self.method.history}"

    def advance(self, step: int, guidance: float) -> Array:
        """Return the guided prediction of this step."""
        if self.method.guidance and self.rows > self.count:
            return self._past_guidance(step, guidance)
        self.executor.bind(self.given)
        self._predict(step)
        found = self._prediction()
        if self.rows == self.count:
            return found
        with_class, without = found[: self.count], found[self.count :]
        return _guided(with_class, without, guidance, self.spec)

    def _past_guidance(self, step: int, guidance: float) -> Array:
        if self.must[step] or self.difference is None:
            self.executor.bind(self.given)
            self.executor.run("step")
            found = self._prediction()
            self.difference = found[self.count :] - found[: self.count]
            self.full += 1
        else:
            self.executor.bind({name: values[: self.count] for name, values in self.given.items()})
            self.executor.run("step")
            found = self._prediction()
        with_class = found[: self.count]
        return _guided(with_class, with_class + self.difference, guidance, self.spec)

    def _prediction(self) -> Array:
        return self.executor.fetch("prediction")["prediction"]

    def _run(self, part: str, names: Mapping[str, str] | None = None) -> None:
        """Run a part; what it reads and no step has written yet is zeros."""
        names, ends = names or {}, self.executor.parts[part]
        for port in ends.inputs:
            name = names.get(port.name, port.name)
            if name not in self.known and name not in self.given:
                rows = port.batch if isinstance(port.batch, int) else self.rows
                self.executor.bind({name: np.zeros((rows, *port.shape), np.float32)})
                self.known.add(name)
        self.executor.run(part, names)
        self.known |= {names.get(port.name, port.name) for port in ends.outputs}

    def _predict(self, step: int) -> None:
        cut, run = self.method.cut, self._run
        if cut == "whole":
            run("step")
            self.full += 1
            return
        whole = self.must[step]
        if cut in ("tokens", "blocks"):
            self._renew(step, whole=whole)
            return
        if cut in _WATCHED:
            before, own = self.own
            run("front", {"before": before, "own": own})
            whole = self._moved(step) or whole
            if cut != "first":
                self.own = self.own[::-1]  # changes are from one step to the next
        elif cut == "verified" and not whole:
            self._forecast(step)
            run("front")
            whole = self._moved(step)
        if whole:
            self._keep(step)
            return
        if cut == "verified":
            return
        if cut != "modules" or self.method.history > 1:
            self._forecast(step)
        run("resume")

    def _keep(self, step: int) -> None:
        """Compute the step in full, or what `front` has not computed of it."""
        cut, slot = self.method.cut, self.full % self.method.history
        names = {RESIDUAL: f"{RESIDUAL}.{slot}", LAST: f"{LAST}.{slot}"}
        if cut == "modules" and self.method.history > 1 and isinstance(self.spec, DiTSpec):
            names = {name: f"{name}.{slot}" for name in module_names(self.spec)}
        self._run("rest" if cut in _WATCHED else "full", names)
        self.full += 1
        self.moved = 0.0
        self.places = (*self.places, step)[-self.method.history :]
        if cut == "first":
            self.own = self.own[::-1]

    def _forecast(self, step: int) -> None:
        self.executor.bind({WEIGHTS: self._weights(step)})
        self.known.add(WEIGHTS)

    def _renew(self, step: int, *, whole: bool) -> None:
        """A refreshed step reads what one side keeps and writes the other."""
        depth, (before, now) = self.spec.num_layers, self.own
        names = {f"{RESIDUAL}.{block}": f"{now}.{block}" for block in range(depth)}
        kept = {f"kept.{block}": f"{before}.{block}" for block in range(depth)}
        if whole:
            self._run("full", names)
            self.ages = [0] * depth
        elif self.method.choice is None:
            self._run("refresh", {**names, **kept})
        else:
            self._block_by_block(step, self.method.choice, {**names, **kept})
        self.full += whole
        self.own = self.own[::-1]

    def _block_by_block(self, step: int, choice: BlockChoice, names: Mapping[str, str]) -> None:
        """Choose the blocks that leave out tokens, by the scores of all rows, and run one after the other."""
        depth = self.spec.num_layers
        turns = "x.0", "x.1"
        self._run("front", {**names, "x": turns[0]})
        reused = choose_blocks(
            self._scores(choice).mean((0, 1)),
            self.ages,
            choice.reused_blocks(depth),
            by_turns=choice.by_turns(step, len(self.must)),
        )
        for block in range(depth):
            part = "renew" if block in reused else "whole"
            self._run(f"{part}.{block}", {**names, "x": turns[block % 2], "y": turns[1 - block % 2]})
        self.ages = [age + 1 if block in reused else 0 for block, age in enumerate(self.ages)]

    def _scores(self, choice: BlockChoice) -> Float[np.ndarray, "B N L"]:
        """What the front has found, or chance: the same for an image with its class and without."""
        if choice.scoring != "random":
            found = self.executor.fetch(SCORES)[SCORES]
            return found if choice.scoring == "norm" else 1 / (1 + np.exp(-found.astype(np.float64)))
        drawn = np.stack([one.random((self.spec.tokens, self.spec.num_layers), np.float32) for one in self.chance])
        scores = np.tile(drawn, (self.rows // self.count, 1, 1))
        if any(port.name == SCORES for ends in self.executor.parts.values() for port in ends.inputs):
            self.executor.bind({SCORES: scores})
            self.known.add(SCORES)
        return scores

    def _moved(self, step: int) -> bool:
        """Whether the change that `front` found is too large to reuse anything."""
        threshold = self.method.threshold
        if threshold is None:
            return False
        change = float(np.mean(self.executor.fetch(CHANGE)[CHANGE]))
        if self.method.cut in ("first", "verified"):
            return math.sqrt(change) > threshold * math.pow(self.method.decay, step / len(self.must))
        self.moved += max(float(np.polyval(self.method.rescale, change)), 0.0) if self.method.rescale else change
        return self.moved > threshold

    def _weights(self, step: int) -> Float[np.ndarray, "1 K 1"]:
        """The forecast's weights in the order of the names under which full steps were kept."""
        method, weights = self.method, np.zeros((1, self.method.history, 1), np.float32)
        row = method.rows[step] if method.rows else method.forecast(self.places, step)
        for back, weight in enumerate(reversed(row[-len(self.places) :])):
            weights[0, (self.full - 1 - back) % method.history, 0] = weight
        return weights


def _guided(with_class: Array, without: Array, guidance: float, spec: DiTSpec | DenoiserSpec) -> Array:
    """Guide the prediction itself; a variance in the channels behind it is the one with the class."""
    channels = spec.channels if spec.learned_sigma else None
    guided: Array = with_class.copy()
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused where the step is known
        guided[:, :channels] = without[:, :channels] + np.float32(guidance) * (with_class - without)[:, :channels]
    return guided


def _is_stochastic(scheduler: Any) -> bool:
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    return type(scheduler).__name__ == "DDPMScheduler" or algorithm.startswith("sde")


def _learned(scheduler: Any) -> bool:
    return str(scheduler.config.get("variance_type", "")).startswith("learned")
