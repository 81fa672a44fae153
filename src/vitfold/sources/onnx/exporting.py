"""Any torch module as a graph: exported by torch.onnx, in the way that works for it, and read like a file."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitfold.errors import SourceError, UnsupportedError
from vitfold.model import Array
from vitfold.model.graph import Kind
from vitfold.model.spec import random_array
from vitfold.program import Program
from vitfold.sources.onnx.model import ReadGraph, lift_blocks, read
from vitfold.sources.onnx.reading import BATCHES, Plain, read_plain, read_plain_pair

R = TypeVar("R")
INPUT = "pixel_values"
OUTPUT = "output"
_OPSET = 17
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NAMED = (
    *("logits", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state"),
    *("predicted_depth", "pred_boxes", "heatmaps"),
)
"""Outputs by these names come first, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One input that a module takes: its name, its shape without the batch, its type as NumPy calls it."""

    name: str = INPUT
    shape: tuple[int, ...]
    dtype: str = "float32"

    def example(self, batch: int) -> Tensor:
        """Return random numbers of this kind."""
        return torch.from_numpy(random_array((batch, *self.shape), self.dtype, np.random.default_rng(0)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleProgram:
    """What a module computes as a program with its parameters, and how far that is from its export."""

    program: Program
    params: Mapping[str, Array]
    error: float


def read_program(
    module: nn.Module, given: Sequence[Given], names: Sequence[str], *, attending: bool = True
) -> ModuleProgram:
    """Read a module of several inputs, whose batch is in front, as a program; it returns as many tensors as `names`.

    Args:
        attending: it has to have attention, as transformers have.

    Raises:
        SourceError: if torch cannot export it, or it has what vitfold cannot hold, with every reason.
        ParityError: if the program does not compute what the export does.
    """

    def reader(plain: Plain, model: onnx.ModelProto, path: Path) -> ModuleProgram:
        found, error, _ = lift_blocks(plain, model, path, attending=attending)
        return ModuleProgram(program=found.program, params=found.params, error=error)

    return _lifted(module, given, names, type(module).__name__, reader)


def read_module(
    module: nn.Module, given: Given, *, outputs: Sequence[str] | None = None, head: Kind | None = None
) -> ReadGraph:
    """Read a module by what it computes for one input.

    Args:
        outputs: which of its named outputs, all if None.

    Raises:
        SourceError: if torch cannot export it, or it has what vitfold cannot hold, with every reason.
        ParityError: if the program does not compute what the export does.
    """
    wrapped = _Tensors(module, outputs)
    with torch.no_grad():
        names = wrapped.names(given.example(BATCHES[0]))
    return _lifted(wrapped, (given,), names, type(module).__name__, functools.partial(read, head=head))


def _lifted(
    module: nn.Module,
    given: Sequence[Given],
    names: Sequence[str],
    kind: str,
    reader: Callable[[Plain, onnx.ModelProto, Path], R],
) -> R:
    """Export a module in the first way that a reader can read."""
    reasons = []
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        for name, way in WAYS.items():
            try:
                with _quietly(), _AsTorchSqueezes():
                    plain, model = way(module, given, names, Path(folder))
                return reader(plain, model, Path(kind))
            except UnsupportedError:
                raise
            except SourceError as error:
                reasons.append(f"{name}: {error}")
            except Exception as error:  # the exporters raise errors of many classes
                reasons.append(f"{name}: {_short(error)}")
    raise SourceError(f"{kind} cannot be read as a graph: {'; '.join(reasons)}")


class _AsTorchSqueezes(TorchFunctionMode):
    """Leaves out what squeezes an axis of another length than 1: nothing in torch, and an error in ONNX."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in (Tensor.squeeze, torch.squeeze) and args:
            axis = given.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(axis, int) and args[0].shape[axis] != 1:
                return args[0]
        return func(*args, **given)


class _Tensors(nn.Module):
    """A module of one input whose outputs are tensors by name."""

    def __init__(self, module: nn.Module, outputs: Sequence[str] | None) -> None:
        super().__init__()
        self.module, self._wanted = module, outputs

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs in order."""
        return tuple(self._named(self.module(*given)).values())

    def names(self, example: Tensor) -> tuple[str, ...]:
        """Return the outputs' names."""
        return tuple(self._named(self.module(example)))

    def _named(self, made: Any) -> dict[str, Tensor]:
        found = named_tensors(made)
        if self._wanted is not None:
            missing = [name for name in self._wanted if name not in found]
            if missing:
                raise SourceError(f"there is no output {missing[0]!r}; there are {', '.join(found)}")
            return {name: found[name] for name in self._wanted}
        return found


def named_tensors(made: Any) -> dict[str, Tensor]:
    """Return what a module made as real tensors by name, those that users mean first."""
    if isinstance(made, Tensor):
        found = {OUTPUT: made}
    elif isinstance(made, Mapping):
        found = {str(name): value for name, value in made.items() if isinstance(value, Tensor)}
    else:
        values = made if isinstance(made, tuple | list) else [made]
        found = {f"{OUTPUT}{i or ''}": value for i, value in enumerate(values) if isinstance(value, Tensor)}
    found = {name: value for name, value in found.items() if value.is_floating_point()}
    first = [name for name in _NAMED if name in found]
    return {name: found[name] for name in (*first, *(name for name in found if name not in first))}


def _with_any_batch(module: nn.Module, given: Sequence[Given], names: Sequence[str], folder: Path) -> Any:
    """Export by torch.export with an open batch."""
    path = folder / "open.onnx"
    batch = torch.export.Dim("batch", min=1)
    _export(module, given, BATCHES[0], names, path, dynamo=True, dynamic_shapes=(tuple({0: batch} for _ in given),))
    return read_plain(path, several=len(given) > 1)


def _batch_by_batch(module: nn.Module, given: Sequence[Given], names: Sequence[str], folder: Path) -> Any:
    """Export by torch.export for each of the two batches."""
    paths = (folder / "first.onnx", folder / "second.onnx")
    for path, size in zip(paths, BATCHES, strict=True):
        _export(module, given, size, names, path, dynamo=True)
    return read_plain_pair(paths)


def _by_torchscript(module: nn.Module, given: Sequence[Given], names: Sequence[str], folder: Path) -> Any:
    """Export by tracing."""
    path = folder / "traced.onnx"
    axes = {name: {0: "batch"} for name in (*(one.name for one in given), *names)}
    _export(module, given, BATCHES[0], names, path, dynamo=False, opset_version=_OPSET, dynamic_axes=axes)
    return read_plain(path, several=len(given) > 1)


WAYS: Mapping[str, Callable[[nn.Module, Sequence[Given], Sequence[str], Path], Any]] = {
    "torch.export with an open batch": _with_any_batch,
    "torch.export for two batches": _batch_by_batch,
    "tracing": _by_torchscript,
}
"""How a module is exported, in the order in which it is tried."""


def _export(
    module: nn.Module, given: Sequence[Given], batch: int, names: Sequence[str], path: Path, **options: Any
) -> None:
    examples = tuple(one.example(batch) for one in given)
    inputs = [one.name for one in given]
    torch.onnx.export(module, examples, path, input_names=inputs, output_names=list(names), **options)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what exporters say off the terminal; a tracer that fails writes the whole graph past Python."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _closed(1),
            torch.no_grad(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _closed(descriptor: int) -> Iterator[None]:
    """Let what native code writes into a descriptor vanish."""
    try:
        kept = os.dup(descriptor)
    except OSError:  # there is none, as in a service
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), descriptor)
            yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


def _short(error: Exception) -> str:
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def image_part(module: nn.Module, given: Given) -> tuple[nn.Module, str]:
    """Return the outermost part of a module that runs on one such input, and its path; "" is the module itself.

    Raises:
        SourceError: if there is none.
    """
    example = given.example(1)
    reason = None
    for path, part in _candidates(module, given.name):
        try:
            with torch.no_grad():
                part(example)
        except Exception as error:  # whatever a stranger's forward raises
            reason = reason or error
            continue
        return part, path
    raise SourceError(
        f"{type(module).__name__} does not run on one input of {tuple(example.shape)}: "
        f"{_short(reason or Exception())}; give the part that does, or another image size"
    )


def _candidates(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module, then parts that say of themselves that they take such an input."""
    yield "", module
    for path, part in module.named_modules():
        if path and getattr(part, "main_input_name", None) == name:
            yield path, part
    for path in ("visual", "vision_model", "image_encoder", "encoder", "backbone"):
        if isinstance(getattr(module, path, None), nn.Module):
            yield path, getattr(module, path)
