"""TokenCache's predictor: trained on trajectories of the frozen model, and how many tokens each block renews.

The model's weights never change; an article on the method calls it free of training, the paper trains this part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.architectures.dit import blocks, condition, embed, head, minus, modulations
from vitfold.diffusion.token_refresh import blended, predicted_scores, predictor_shapes
from vitfold.model import Array, DiTModel, DiTSpec
from vitfold.model.dit import class_rows, timestep_embedding
from vitfold.ops.run import Run

ROWS = 8
"""Rows of a training batch: half with a class, half without."""
PAIRS = 12
"""Pairs of steps along one trajectory that are learned from."""
_PENALTY = 0.05
_WHOLE = 0.9
"""From this share of its tokens on, a block is run whole."""
_RATE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenPredictor:
    """Trained weights, mean scores of each block's best token, its second best, ..., and losses before and after."""

    params: Mapping[str, Array]
    ranked: Float[np.ndarray, "L N"]
    losses: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A step, what every block added at an earlier one, and what leaves the last block."""

    x: Tensor
    given: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    last: Tensor


def train_predictor(
    model: DiTModel, scheduler: Any, *, rounds: int = 6, seed: int = 0, say: Callable[[str], None]
) -> TokenPredictor:
    """Train on steps that are one to three after the one that is kept.

    Equation: |x_L - x_L'|^2 / |x_L'' - x_L'|^2 + 0.05 mean a, x_L' of the whole step, x_L'' all from what is kept.

    Source: TokenCache (2409.18523); scores are soft in training, the best ones are taken at inference.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = _pairs(model, scheduler, generator)
    learned = {name: value.requires_grad_() for name, value in _initial(model.spec, generator).items()}
    ops = Run(model.params, learned=learned)
    optimizer = torch.optim.Adam(list(learned.values()), lr=_RATE)
    losses = []
    for turn in range(rounds):
        say(f"training the predictor: round {turn + 1}/{rounds}")
        total = 0.0
        for place in torch.randperm(len(pairs), generator=generator).tolist():
            loss = _loss(ops, model.spec, pairs[place])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() / len(pairs)
        losses.append(total)
    with torch.no_grad():
        ranked = torch.stack([_ranked(ops, model.spec, pair) for pair in pairs]).mean(0)
    return TokenPredictor(
        params={name: value.detach().numpy() for name, value in learned.items()},
        ranked=ranked.numpy(),
        losses=(losses[0], losses[-1]),
    )


def share_budget(ranked: Float[np.ndarray, "L N"], ratio: float) -> tuple[int, ...]:
    """Return how many tokens each block renews, if all blocks together leave out `ratio` of theirs.

    The best cells of all blocks are taken; `ranked` are mean scores of each block's best token, its second best, ...

    Source: TokenCache (2409.18523), its block selection.
    """
    depth, tokens = ranked.shape
    keep = round((1 - ratio) * depth * tokens)
    order = np.argsort(-ranked.reshape(-1), kind="stable")[:keep]
    return tuple(int(count) for count in np.bincount(order // tokens, minlength=depth))


def settle_counts(counts: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Let blocks that renew nearly all of their tokens renew all, at the cost of those that renew the fewest.

    Picking so many rows and putting them back takes longer than the few others. The sum stays; where nothing is left
    to take, the counts do.
    """
    found = [tokens if count >= _WHOLE * tokens else count for count in counts]
    owed = sum(found) - sum(counts)
    for block in sorted(range(len(found)), key=lambda block: found[block]):
        if found[block] < tokens:
            taken = min(found[block], owed)
            found[block], owed = found[block] - taken, owed - taken
    return tuple(counts) if owed else tuple(found)


def _initial(spec: DiTSpec, generator: torch.Generator) -> dict[str, Tensor]:
    """Random first layers; second ones that score every token alike, at three quarters."""
    found = {name: torch.zeros(shape) for name, shape in predictor_shapes(spec).items()}
    for name, value in found.items():
        if name.endswith("fc1.weight"):
            value.copy_(torch.randn(value.shape, generator=generator) / spec.embed_dim**0.5)
        elif name.endswith("fc2.bias"):
            value.fill_(1.0)
    return found


def _loss(ops: Run, spec: DiTSpec, pair: _Pair) -> Tensor:
    x, held, scores = pair.x, pair.x, _scores(ops, spec, pair)
    for block, kept in enumerate(pair.kept):
        x = x + blended(ops, spec, block, x, pair.given, kept, scores[:, :, block : block + 1])
        held = held + kept
    scale = (held - pair.last).square().mean() + 1e-12
    return (x - pair.last).square().mean() / scale + _PENALTY * scores.mean()


def _scores(ops: Run, spec: DiTSpec, pair: _Pair) -> Float[Tensor, "B N L"]:
    return predicted_scores(ops, spec, pair.x, *pair.given[:2]).sigmoid()


def _ranked(ops: Run, spec: DiTSpec, pair: _Pair) -> Float[Tensor, "L N"]:
    """Mean scores over rows, every block's best token first."""
    return _scores(ops, spec, pair).sort(dim=1, descending=True).values.mean(0).T


def _pairs(model: DiTModel, scheduler: Any, generator: torch.Generator) -> list[_Pair]:
    """Follow one trajectory of a few images without guidance and take pairs of steps along it."""
    spec, run = model.spec, Run(model.params)
    labels = torch.randint(spec.classes, (ROWS // 2,), generator=generator).tolist()
    rows = torch.from_numpy(class_rows(spec, np.array([*labels, *([spec.null_class] * (ROWS // 2))])))
    x = torch.randn(ROWS, spec.channels, spec.image_size, spec.image_size, generator=generator)
    timesteps = scheduler.timesteps
    stride = max(1, len(timesteps) // PAIRS)
    found: list[_Pair] = []
    held: list[tuple[Tensor, ...]] = []
    for step, t in enumerate(timesteps):
        t_freq = torch.from_numpy(timestep_embedding(spec, np.full(ROWS, int(t))))
        with torch.no_grad():
            given = modulations(run, spec, condition(run, spec, t_freq, rows))
            entering = embed(run, scheduler.scale_model_input(x, t).float())
            added, last = _follow(run, spec, entering, given)
            back = 1 + len(found) % 3
            if step % stride == stride - 1 and len(held) >= back:
                found.append(_Pair(x=entering, given=given, kept=held[-back], last=last))
            held = [*held[-2:], added]
            predicted = head(run, spec, last, given)[:, : spec.channels]
            x = scheduler.step(predicted, t, x).prev_sample
    return found


def _follow(run: Run, spec: DiTSpec, x: Tensor, given: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What every block adds, and what leaves the last one."""
    added = []
    for block in range(spec.num_layers):
        y = blocks(run, spec, x, given, range(block, block + 1))
        added.append(minus(run, y, x))
        x = y
    return tuple(added), x
