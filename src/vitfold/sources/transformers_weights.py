"""Weights of the package transformers: those of a class, and those that a LoRA adapter changes."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitfold.errors import SourceError
from vitfold.sources.failures import load_error
from vitfold.sources.lora import CONFIG as ADAPTER
from vitfold.sources.lora import WEIGHTS as ADAPTER_WEIGHTS
from vitfold.sources.lora import Adapter, merge_adapter, read_adapter


def load_weights(
    kind: Any,
    name: str,
    *,
    shown: str | None = None,
    classes: int | None = None,
    given: Set[str] = frozenset(),
    changed: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load weights; with `classes` a head of so many, whose parameters are `given` by somebody else.

    `changed` are values of its configuration that another file states.
    """
    shown = shown or name
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True, **(changed or {})}
    if classes is not None:
        options |= {"num_labels": classes, "ignore_mismatched_sizes": True}
    try:
        with _without_report():
            module, info = kind.from_pretrained(name, **options)
            missing = sorted(info["missing_keys"])
            if missing and all(key.startswith("pooler.") for key in missing):
                module, info = kind.from_pretrained(name, add_pooling_layer=False, **options)
                missing = sorted(info["missing_keys"])
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        folder = Path(shown).expanduser()
        raise load_error(f"hf:{shown}", error, folder=folder if folder.is_dir() else None) from error
    missing = [key for key in [*missing, *(str(entry[0]) for entry in info["mismatched_keys"])] if key not in given]
    if missing:
        raise SourceError(
            f"the weights of hf:{shown} lack {missing[:4]}, which {kind.__name__} needs and would leave random; "
            "fix 'architectures' in its config.json, or use another checkpoint"
        )
    result: nn.Module = module
    return result


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers' table of weights off the terminal: what is missing is an error here, the rest is not used."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def find_adapter(name: str) -> Adapter | None:
    """Return the adapter in a folder or a repository of the hub, None where there is none."""
    if Path(name).is_dir():
        folder = Path(name)
        return read_adapter(folder) if (folder / ADAPTER).is_file() else None
    from transformers.utils import cached_file

    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        found = cached_file(name, ADAPTER, **quiet)
        if found is None:
            return None
        cached_file(name, ADAPTER_WEIGHTS, **quiet)
    except OSError:  # what is wrong with the repository is said where its config is read
        return None
    return read_adapter(Path(found).parent)


def base_of(adapter: Adapter) -> str:
    """Return where an adapter's base model lies: beside it, or where its file says.

    Raises:
        SourceError: if that is no model.
    """
    if (adapter.folder / "config.json").is_file():
        return str(adapter.folder)
    if adapter.base is None:
        raise SourceError(
            f"{adapter.folder} holds an adapter alone, and its {ADAPTER} names no base model; put config.json and "
            "model.safetensors of the base beside it"
        )
    folder = Path(adapter.base).expanduser()
    if (folder / ADAPTER).is_file():
        raise SourceError(f"the base {folder} of the adapter in {adapter.folder} is an adapter itself; merge it first")
    if adapter.base.startswith((".", "/", "~")) and not folder.is_dir():
        raise SourceError(
            f"{adapter.folder} holds an adapter of {adapter.base}, and there is no such folder; put config.json and "
            "model.safetensors of that base beside the adapter"
        )
    return str(folder) if folder.is_dir() else adapter.base


def load_adapted(kind: Any, base: str, adapter: Adapter) -> nn.Module:
    """Load the base model as if no adapter lay beside it, and merge the adapter."""
    with tempfile.TemporaryDirectory(prefix="vitfold-") as work:
        alone = base
        if Path(base).is_dir():  # transformers loads an adapter by itself, but only where peft is installed
            alone = work
            for path in Path(base).iterdir():
                if not path.name.startswith("adapter_"):
                    (Path(work) / path.name).symlink_to(path.resolve())
        trained = set(adapter.tensors)
        module = load_weights(kind, alone, shown=base, classes=adapter.classes, given=trained)
    merge_adapter(module, adapter)
    return module
