"""Reading a module that no reader knows as a graph, with what its zoo says of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from vitfold.errors import SourceError
from vitfold.model import Model, Origin, Preprocess
from vitfold.model.spec import Problem
from vitfold.sources.onnx.exporting import image_part, read_module
from vitfold.sources.onnx.loading import model_of
from vitfold.sources.reader import Facts
from vitfold.sources.transformers import PROBLEMS

_log = logging.getLogger("vitfold")


def as_graph(
    module: torch.nn.Module,
    origin: Origin,
    reason: SourceError,
    *,
    preprocess: Preprocess | None,
    labels: Sequence[str] | None,
    facts: Facts,
    translator: Any,
    size: tuple[int, int] | None,
    outputs: Sequence[str] | None = None,
) -> tuple[Model, torch.nn.Module]:
    """Read a module as a graph, since no reader knows its class for `reason`; return also the part that was read.

    Raises:
        SourceError: with that reason too, if it is no graph that vitfold can hold.
    """
    problem = facts.get("problem") or _stated_problem(module, reason)
    try:
        shape = _input_shape(module, size or (None if preprocess is None else preprocess.crop_size))
        part, path = image_part(module, shape)
        read = read_module(part, shape, outputs=outputs, head=problem)
    except SourceError as error:
        raise SourceError(f"{reason}; as a graph: {error}") from None
    if path:
        _log.info("taking %s of %s, which takes images alone", path, type(module).__name__)
    if translator is not None and preprocess is None:
        with contextlib.suppress(SourceError, AttributeError, KeyError):
            preprocess, found = translator.describe(part, read.spec, facts)
            labels = labels or found
    return model_of(read, origin, labels=labels, preprocess=preprocess), part


def _stated_problem(module: torch.nn.Module, reason: SourceError) -> Problem | None:
    """What a configuration of transformers says that logits stand for.

    Raises:
        SourceError: `reason`, if that is none that vitfold knows.
    """
    stated = getattr(getattr(module, "config", None), "problem_type", None)
    if stated is not None and stated not in PROBLEMS:
        raise reason
    return None if stated is None else PROBLEMS[stated]


def _input_shape(module: torch.nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
    """Channels, height and width of a module's images: as given, else as its configuration says.

    Raises:
        SourceError: if nothing says it.
    """
    stated: Any = (getattr(module, "pretrained_cfg", None) or {}).get("input_size")
    held = getattr(getattr(module, "patch_embed", None), "img_size", None)
    if stated is not None and isinstance(held, tuple) and len(held) == 2:
        stated = (stated[0], *held)
    config = getattr(module, "config", None)
    for name in ("", "vision_config", "encoder", "backbone_config"):
        part = getattr(config, name, None) if name else config
        side = getattr(part, "image_size", None)
        if stated is None and side is not None:
            sides = side if isinstance(side, list | tuple) else [side] * 2
            stated = (getattr(part, "num_channels", 3), *sides)
    if size is not None:
        return (stated[0] if stated else 3, *size)
    if stated is None:
        raise SourceError("nothing says how large its images are; give image_size=(HEIGHT, WIDTH)")
    return tuple(int(n) for n in stated)
