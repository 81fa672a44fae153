"""Read every transformer of timm with random weights, a few blocks of each, and write which are read, and what merges.

    python examples/check_timm.py [NAME ...] [--output docs/timm.json] [--shard 0/2]

A transformer is an architecture that has a part whose class is called an attention over tokens. Of blocks that follow
each other in one stage the first two are kept. Every program is compared with the module (1e-5). Of architectures that
have the same parts in the same places, and differ in sizes, one is read and the others are `like` it. What stands in
the output already is not done again, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from check_models import randomized
from torch import nn

import vitfold
from vitfold.model import GraphSpec

KEPT = 2
_NUMBER = re.compile(r"\d+")
_GATES = ("Channel", "Se", "Eca", "Cbam", "Halo", "Bottleneck", "Gather", "Lambda")
"""Attention over channels, or of convolutional networks."""


def attends(module: nn.Module) -> bool:
    """Whether a part is an attention over tokens."""
    names = {type(part).__name__ for part in module.modules()}
    return any(("attention" in name.lower() or name.endswith("Attn")) and not name.startswith(_GATES) for name in names)


def shortened(module: nn.Module) -> nn.Module:
    """Keep the first blocks of every stage."""
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Sequential | nn.ModuleList) and len(child) > KEPT:
                kinds = {type(one) for one in child}
                if len(kinds) == 1 and kinds.pop().__name__.lower().endswith(("block", "layer")) and attends(child):
                    setattr(
                        part, name, type(child)(*child[:KEPT]) if isinstance(child, nn.Sequential) else child[:KEPT]
                    )
    return module


def _runnable(name: str, module: nn.Module, size: tuple[int, int]) -> nn.Module:
    """The first blocks of every stage, or all where the others need them."""
    try:
        short = shortened(module).eval()
        with torch.no_grad():
            short(torch.zeros(1, 3, *size))
    except (RuntimeError, ValueError, IndexError, AttributeError):
        return timm.create_model(name, pretrained=False)
    return short


def in_turn(names: list[str]) -> list[str]:
    """Order architectures so that every file of timm has its turn: what fails is seen early."""
    place: Counter[str] = Counter()
    keyed = []
    for name in names:
        module = timm.model_entrypoint(name).__module__
        keyed.append((place[module], module, name))
        place[module] += 1
    return [name for _, _, name in sorted(keyed)]


def parts_of(module: nn.Module) -> str:
    """Return a digest of which parts stand where, and which parameters they have; not of their sizes."""
    found = {
        (_NUMBER.sub("", path), type(part).__name__, *(name for name, _ in part.named_parameters(recurse=False)))
        for path, part in module.named_modules()
    }
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()


def check(name: str, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Return what of an architecture is read; None of one that is no transformer."""
    started = time.perf_counter()
    with torch.device("meta"):
        try:
            if not attends(timm.create_model(name, pretrained=False)):
                return None
        except Exception:  # some build tables that have no meta form
            pass
    found: dict[str, Any] = {"name": name, "read": None, "error": None}
    try:
        torch.manual_seed(0)
        module = timm.create_model(name, pretrained=False)
        if not attends(module):
            return None
        found |= {"class": type(module).__name__, "size": module.default_cfg["input_size"][1:]}
        module = randomized(_runnable(name, module, tuple(found["size"])))
        found["parts"] = parts_of(module)
        same = known.get(found["parts"])
        if same is not None and same["error"] is None:
            return {**same, "name": name, "like": same["name"], "size": found["size"]}
        model = vitfold.adapt(module, image_size=tuple(found["size"]))
        spec = model.spec
        found["read"] = "graph" if isinstance(spec, GraphSpec) else "reader"
        found |= {"tokens": spec.tokens, "why": spec.unmergeable or None}
        if isinstance(spec, GraphSpec):
            found["foreign"] = dict(Counter(reason.partition(":")[0] for _, reason in spec.foreign))
    except Exception as error:  # an architecture that cannot be built or read is one that fails
        found["error"] = f"{type(error).__name__}: {error}"[:500]
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Check all architectures, or those whose name holds one of the words given."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("names", nargs="*")
    arguments.add_argument("--output", type=Path)
    arguments.add_argument("--shard", default="0/1")
    given = arguments.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    shard, shards = (int(one) for one in given.shard.split("/"))
    done = {}
    if given.output is not None and given.output.exists():
        done = {row["name"]: row for row in json.loads(given.output.read_text(encoding="utf-8"))["models"]}
    for index, name in enumerate(in_turn(timm.list_models())):
        if index % shards != shard or name in done or (given.names and not any(word in name for word in given.names)):
            continue
        row = check(name, {row["parts"]: row for row in done.values() if "parts" in row and "like" not in row})
        if row is None:
            continue
        done[name] = row
        print(json.dumps(row), flush=True)
        if given.output is not None:
            given.output.write_text(json.dumps({"models": list(done.values())}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
