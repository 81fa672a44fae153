"""The stack of blocks of a transformer, found by watching one call: no class is known by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import nn

from vitfold.errors import UnsupportedError

Stream = Literal["image", "text"]
_IMAGE, _TEXT = ("hidden_states", "x"), ("encoder_hidden_states",)
_CURE = "draw with all steps, or with a cache that knows this class"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One list of blocks: its name in the transformer, how many there are, and the streams that each returns."""

    name: str
    count: int
    streams: tuple[Stream, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The lists of blocks through which the image's stream goes without a break, in order."""

    parts: tuple[Part, ...]

    def blocks(self, transformer: nn.Module) -> list[tuple[nn.Module, tuple[Stream, ...]]]:
        """Return every block of a transformer with the streams that it returns.

        Raises:
            UnsupportedError: if the transformer has no such lists.
        """
        found = []
        for part in self.parts:
            try:
                blocks = list(transformer.get_submodule(part.name).children())
            except AttributeError:
                blocks = []
            if len(blocks) != part.count:
                raise UnsupportedError(
                    f"{type(transformer).__name__} has {len(blocks)} blocks {part.name!r}, the plan is of one that has "
                    f"{part.count}; make a plan of this model"
                )
            found += [(block, part.streams) for block in blocks]
        return found


def argument(block: nn.Module, stream: Stream, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return what a block was handed of a stream; None where it takes none."""
    names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
    wanted = _IMAGE if stream == "image" else _TEXT
    name = next((name for name in wanted if name in names), names[0] if stream == "image" else "")
    if name in kwargs:
        return kwargs[name]
    return args[names.index(name)] if name in names and names.index(name) < len(args) else None


class StackFinder:
    """Watches the first call of a transformer; `stack` is what it found, `close` ends it."""

    def __init__(self, transformer: nn.Module) -> None:
        self._transformer = transformer
        self._calls: list[tuple[str, nn.Module, Any, Any, Any]] = []
        self.stack: Stack | None = None
        self._counts: dict[str, int] = {}
        self._hooks = [transformer.register_forward_hook(self._finish)]
        for name, blocks in _lists(transformer):
            self._counts[name] = len(blocks)
            self._hooks += [block.register_forward_hook(self._note(name), with_kwargs=True) for block in blocks]

    def close(self) -> None:
        """Watch no more."""
        for hook in self._hooks:
            hook.remove()
        self._calls.clear()

    def _note(self, name: str) -> Any:
        def note(block: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            streams = (argument(block, "image", args, kwargs), argument(block, "text", args, kwargs))
            self._calls.append((name, block, *streams, output))

        return note

    def _finish(self, *_: Any) -> None:
        calls = [list(group) for _, group in groupby(self._calls, key=lambda call: call[0])]
        once = [run for run in calls if len(run) == self._counts[run[0][0]] == len({id(call[1]) for call in run})]
        best: list[Part] = []
        chain: list[Part] = []
        left: Any = None
        for run in once:
            part = _part(run)
            if part is None:
                chain, left = [], None
                continue
            chain = [*chain, part] if left is not None and run[0][2] is left else [part]
            left = _of(run[-1][4], part.streams, "image")
            best = max(best, chain, key=lambda parts: sum(one.count for one in parts))
        kind = type(self._transformer).__name__
        self.close()
        if not best:
            raise UnsupportedError(
                f"no list of blocks was found in {kind} through which an image's tokens go from block to block in one "
                f"shape; {_CURE}"
            )
        self.stack = Stack(parts=tuple(best))


def _lists(transformer: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules of one kind of structure."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in transformer.named_modules():
        within = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, nn.ModuleList) and len(module) and not within:
            found.append((name, module))
    return found


def _part(run: Sequence[tuple[str, nn.Module, Any, Any, Any]]) -> Part | None:
    """What a run of calls through one list is; None unless the image's stream keeps its shape."""
    streams = _order(run)
    if streams is None:
        return None
    entered, left = run[0][2], _of(run[-1][4], streams, "image")
    if not isinstance(entered, torch.Tensor) or not isinstance(left, torch.Tensor) or entered.shape != left.shape:
        return None
    return Part(name=run[0][0], count=len(run), streams=streams)


def _order(run: Sequence[tuple[str, nn.Module, Any, Any, Any]]) -> tuple[Stream, ...] | None:
    """Which streams a block returns: told by what the next block is handed, else by shapes where they differ."""
    output = run[0][4]
    if isinstance(output, torch.Tensor):
        return ("image",)
    if not isinstance(output, tuple) or len(output) != 2:
        return None
    if len(run) > 1:
        for image in (0, 1):
            if run[1][2] is output[image]:
                return ("image", "text") if image == 0 else ("text", "image")
    shapes = [one.shape if isinstance(one, torch.Tensor) else None for one in (*run[0][2:4], *output)]
    if shapes[0] != shapes[1]:
        if shapes[0] == shapes[2]:
            return ("image", "text")
        if shapes[0] == shapes[3]:
            return ("text", "image")
    return None


def _of(output: Any, streams: tuple[Stream, ...], stream: Stream) -> Any:
    return output if isinstance(output, torch.Tensor) else output[streams.index(stream)]


def image_of(output: Any, streams: tuple[Stream, ...]) -> Any:
    """Return the image's stream of what a block returned."""
    return _of(output, streams, "image")
