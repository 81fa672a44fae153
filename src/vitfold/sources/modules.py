"""Modules in memory: which file here reads one, and what wrappers leave of it."""

from __future__ import annotations

import copy
import importlib
import types
from typing import Any

from torch import nn

from vitfold.errors import SourceError, UnsupportedError, nearest
from vitfold.sources.reader import PLAIN, REFUSED, class_name, refuse, same_body, why_not

# Package -> the file here that reads its classes.
READERS = {package: package for package in ("timm", "transformers", "torchvision", "open_clip")}
_KNOWN = {
    "timm": ("timm.VisionTransformer", "timm.VisionTransformerDistilled"),
    "torchvision": ("torchvision.VisionTransformer",),
    "open_clip": ("open_clip.VisionTransformer", "open_clip.TimmModel", "open_clip.CLIP", "open_clip.CustomTextCLIP"),
}
# Wrapper -> where the module lies that computes the same.
_WRAPPERS = {
    "torch.OptimizedModule": "_orig_mod",
    "torch.DataParallel": "module",
    "torch.DistributedDataParallel": "module",
    "torch.AveragedModel": "module",
}
_HARMLESS = frozenset({"__init__", "__repr__", "extra_repr", "train", "no_weight_decay", "init_weights"})
"""Methods that a subclass may have of its own, as no forward pass calls them."""


def bare_module(module: nn.Module) -> nn.Module:
    """Return what a wrapper runs, and an instance of a subclass as one of the class that it inherits all from.

    Raises:
        SourceError: if a subclass computes something else, naming what it overrides.
    """
    while class_name(module) in _WRAPPERS:
        inner = getattr(module, _WRAPPERS[class_name(module)])
        assert isinstance(inner, nn.Module)
        module = inner
    if _is_known(class_name(module)):
        return module
    kinds = type(module).__mro__
    for place, base in enumerate(kinds[1:], start=1):
        if issubclass(base, nn.Module) and _is_known(_name(base)):
            changed = sorted({name for kind in kinds[:place] for name in _overridden(kind, base)})
            if changed:
                raise refuse(
                    f"its own {', '.join(changed)} ({class_name(module)}, a subclass of {_name(base)})",
                    f"load its weights into a {base.__name__}, if that computes the same, and pass that one",
                )
            plain = copy.copy(module)
            plain.__class__ = base
            return plain
    return module


def part_of(module: nn.Module, path: str) -> nn.Module:
    """Return the part of a module that a path such as "vision_model.encoder" names.

    Raises:
        SourceError: if there is none, naming those that there are.
    """
    try:
        part = module.get_submodule(path)
    except AttributeError:
        part = None
    if part is None or not path:
        inside = [name for name, one in module.named_modules() if name and name.count(".") < 2 and any(one.children())]
        raise SourceError(f"{type(module).__name__} has no part {path!r}; {nearest(path, inside)}")
    return part


def _name(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _overridden(kind: type, base: type) -> list[str]:
    """Functions of a class that stand in for those of its base."""
    functions = (types.FunctionType, property, classmethod, staticmethod)
    own = (name for name, value in vars(kind).items() if isinstance(value, functions))
    return [name for name in own if name not in _HARMLESS and hasattr(base, name)]


def _is_known(name: str) -> bool:
    return name in _known(name.partition(".")[0])


def _known(package: str) -> tuple[str, ...]:
    """The classes of a package that are read."""
    if package == "transformers":
        return tuple(importlib.import_module("vitfold.sources.transformers").MODELS)
    return _KNOWN.get(package, ())


def find_translator(module: nn.Module) -> tuple[Any, Any]:
    """Return the file here that reads this class, and the zoo it comes from.

    Raises:
        UnsupportedError: naming the class, and the supported ones.
    """
    name = class_name(module)
    package, _, stem = name.partition(".")
    if _is_known(name):
        return importlib.import_module(f"vitfold.sources.{READERS[package]}"), importlib.import_module(package)
    if name in REFUSED:
        raise refuse(f"{why_not(module)} ({name})", PLAIN)
    inner = next((at for at, part in module.named_modules() if at and _is_known(class_name(part))), None)
    if inner is not None:
        raise UnsupportedError(
            f"vitfold does not read {name} ({type(module).__module__}), nor what it does beside the model within; pass "
            f"that one: its attribute {inner}"
        )
    stems = [one.partition(".")[2] for one in _known(package)] if package in READERS else []
    shown = ", ".join(one for package in READERS for one in _known(package))
    raise UnsupportedError(
        f"vitfold does not read {name} ({type(module).__module__}); {same_body(stem, stems)}supported: {shown}"
    )
