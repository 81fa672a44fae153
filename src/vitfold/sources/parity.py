"""Comparison of the original module with the program that was read from it.

Loads and translates nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.errors import ParityError
from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.transforms.tokens import Tokens

TOLERANCE = 1e-5


def check_parity(
    original_forward: Callable[[Tensor], Tensor], model: Model, *, blocks: Sequence[nn.Module] = (), seed: int = 0
) -> float:
    """Return max|a - b| / max|a| of original a and program b on two random images.

    Raises:
        ParityError: if it exceeds 1e-5, naming the first of `blocks` whose output differs.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, model.spec.channels, *model.spec.image_size, generator=generator)
    run = Run(model.params)
    with torch.inference_mode():
        expected = original_forward(image)
        actual = forward(run, model.spec, UNMERGED, image)
        if not bool(torch.isfinite(expected).all()):
            raise ParityError(
                "the original model's output is not finite on random input; its weights are damaged: "
                "use another checkpoint"
            )
        if expected.shape != actual.shape:
            raise ParityError(
                f"the original returns {tuple(expected.shape)}, the program {tuple(actual.shape)}; "
                "this is a bug in vitfold's translation of the model: please report it with the model's name"
            )
        error = _relative_error(expected, actual)
        if error <= TOLERANCE:
            return error
        where = _first_difference(original_forward, model, run, image, blocks)
    raise ParityError(
        f"the program differs from the original by {error:.2g} (relative; at most {TOLERANCE:g} is allowed), {where}; "
        "the model has a part that vitfold does not know or that a hook or patch changes: use the unpatched model, "
        "or report this with the model's name"
    )


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """max|a - b| / max|a|; where a is all zeros, max|b|."""
    scale = float(expected.abs().max())
    return float((expected - actual).abs().max()) / (scale or 1.0)


def _first_difference(
    original_forward: Callable[[Tensor], Tensor], model: Model, run: Run, image: Tensor, blocks: Sequence[nn.Module]
) -> str:
    """Return a phrase that names the first stage whose output differs."""
    if len(blocks) != model.spec.num_layers:
        return "the place is unknown since the blocks cannot be observed"
    entering: list[Tensor] = []
    leaving: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering.append(args[0] if args else next(iter(kwargs.values())))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        leaving.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        handles += [block.register_forward_hook(after) for block in blocks]
        for handle in handles:
            hooks.callback(handle.remove)
        original_forward(image)
    seen: list[Tensor] = []

    def observe(_: int, tokens: Tokens[Tensor]) -> None:
        seen.append(tokens.x)

    forward(run, model.spec, UNMERGED, image, observe=observe)
    stages = [("the embedding", entering[0], seen[0])]
    stages += [(f"block {i}", a, b) for i, (a, b) in enumerate(zip(leaving, seen[1:], strict=True))]
    for name, expected, actual in stages:
        if expected.shape != actual.shape:
            return f"first at {name}: shape {tuple(expected.shape)} became {tuple(actual.shape)}"
        error = _relative_error(expected, actual)
        if error > TOLERANCE:
            return f"first at {name} (by {error:.2g})"
    return "first behind the last block, in the pooling or the head"
