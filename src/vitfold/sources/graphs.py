"""Reading a module that no reader knows as a graph, with what its zoo says of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitfold.errors import SourceError
from vitfold.model import Model, Origin, Preprocess
from vitfold.model.spec import Problem
from vitfold.sources.onnx.exporting import INPUT, Given, image_part, named_tensors, read_module
from vitfold.sources.onnx.loading import model_of
from vitfold.sources.reader import Facts
from vitfold.sources.transformers import PROBLEMS
from vitfold.sources.transformers_preprocess import default_processor, preprocess_from_processor
from vitfold.sources.wholes import FixedGrid, fed_by_one_array

_BILINEAR = 2
"""How SigLIP 2 resizes images to whole patches, as Pillow counts ways."""
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
    shape: tuple[int, ...] | None = None,
    outputs: Sequence[str] | None = None,
) -> tuple[Model, torch.nn.Module]:
    """Read a module as a graph, since no reader knows its class for `reason`; return also the part that was read.

    Raises:
        SourceError: with that reason too, if it is no graph that vitfold can hold.
    """
    problem = facts.get("problem") or _stated_problem(module, reason)
    try:
        size = size or (None if preprocess is None else preprocess.crop_size)
        module = fed_by_one_array(module, size)
        if isinstance(module, FixedGrid):
            size = module.size
            usual = {**default_processor("siglip", size), "resample": _BILINEAR}
            preprocess = preprocess or preprocess_from_processor(usual, size)
        given = given_to(module, size, shape)
        part, path = image_part(module, given)
        read = read_module(part, given, outputs=outputs, head=problem)
    except SourceError as error:
        unknown = "" if translator is None else f"{reason}; "
        raise SourceError(f"{unknown}{type(module).__name__} as a graph: {error}") from None
    if path:
        _log.info("taking %s of %s, which takes images alone", path, type(module).__name__)
    if translator is not None and preprocess is None:
        with contextlib.suppress(SourceError, AttributeError, KeyError):
            preprocess, found = translator.describe(part, read.spec, facts)
            labels = labels or found
    return model_of(read, origin, labels=labels, preprocess=preprocess), part


def first_output(module: torch.nn.Module, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what maps inputs to the output of a module that has this name as a graph."""

    def forward(given: torch.Tensor) -> torch.Tensor:
        return named_tensors(module(given))[name]

    return forward


def _stated_problem(module: torch.nn.Module, reason: SourceError) -> Problem | None:
    """What a configuration of transformers says that logits stand for.

    Raises:
        SourceError: `reason`, if that is none that vitfold knows.
    """
    stated = getattr(getattr(module, "config", None), "problem_type", None)
    if stated is not None and stated not in PROBLEMS:
        raise reason
    return None if stated is None else PROBLEMS[stated]


def given_to(module: torch.nn.Module, size: tuple[int, int] | None, shape: tuple[int, ...] | None = None) -> Given:
    """Return what a module takes: images, or what its configuration says of videos, spectrograms and texts.

    Raises:
        SourceError: if nothing says it.
    """
    config: Any = getattr(module, "config", None)
    name = str(getattr(module, "main_input_name", INPUT))
    if name == "input_ids" and getattr(config, "vision_config", None) is None and hasattr(config, "vocab_size"):
        length = getattr(config, "max_position_embeddings", None)
        if shape is None and length is None:
            raise SourceError("nothing says how long its texts are; give input_shape=(LENGTH,)")
        return Given(name=name, shape=shape or (int(length or 1),), dtype="int64")
    name = name if name.startswith(INPUT) or name == "input_values" else INPUT
    if shape is not None:
        return Given(name=name, shape=shape)
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return Given(name=name, shape=(int(config.max_length), int(config.num_mel_bins)))
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    image = _image_shape(module, size)
    return Given(name=name, shape=image if frames is None else (int(frames), *image))


def _image_shape(module: torch.nn.Module, size: tuple[int, int] | None) -> tuple[int, ...]:
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
        side = getattr(part, "image_size", None) or getattr(part, "crop_size", None)
        if stated is None and side is not None:
            sides = side if isinstance(side, list | tuple) else [side] * 2
            stated = (getattr(part, "num_channels", None) or getattr(part, "in_chans", 3), *sides)
    if size is not None:
        return (stated[0] if stated else 3, *size)
    if stated is None:
        raise SourceError("nothing says how large its images are; give image_size=(HEIGHT, WIDTH)")
    return tuple(int(n) for n in stated)
