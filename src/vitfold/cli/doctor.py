"""`vitfold doctor`: what is installed, what the processor can do, and the command that mends what is missing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from vitfold.artifacts.cache import cache_entries, cache_folder, cache_limit
from vitfold.bench.environment import environment, installed_version
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import heading, note, out, print_json, steps
from vitfold.engines import ENGINES, engine_obstacle, runs_here
from vitfold.errors import EngineError
from vitfold.storage.workshop import leftovers
from vitfold.target import TARGETS, find_target
from vitfold.version import __version__

if TYPE_CHECKING:
    from vitfold.storage.workshop import Leftover

_PARTS = (
    ("onnxruntime", "onnxruntime", "runs bundles", "vitfold"),
    ("torch", "torch", "loads originals, reference interpreter, engines torch and torch-compile", "vitfold[optimize]"),
    ("onnx-ir", "onnx_ir", "writes ONNX graphs", "vitfold[optimize]"),
    ("timm", "timm", "source timm:NAME, files, demo", "vitfold[optimize]"),
    ("transformers", "transformers", "source hf:REPO_OR_FOLDER", "vitfold[transformers]"),
    ("torchvision", "torchvision", "source torchvision:NAME", "vitfold[torchvision]"),
    ("open_clip_torch", "open_clip", "source open_clip:NAME", "vitfold[open_clip]"),
    ("openvino", "openvino", "engine openvino, peers openvino and nncf in bench", "vitfold[openvino]"),
    ("tensorrt", "tensorrt", "engine tensorrt, on NVIDIA GPUs", "vitfold[tensorrt]"),
    ("cuda-bindings", "cuda.bindings.runtime", "engine tensorrt, on NVIDIA GPUs", "vitfold[tensorrt]"),
    ("tensorrt-rtx-cu13", "tensorrt_rtx", "audit", "vitfold[audit]"),
    ("onnxscript", "onnxscript", "peers that start from the plain ONNX export in bench", "vitfold[peers]"),
    ("onnx", "onnx", "peers onnxruntime-int8 and -optimizer in bench", "vitfold[peers]"),
    ("sympy", "sympy", "peer onnxruntime-int8 in bench", "vitfold[peers]"),
    ("nncf", "nncf", "peer nncf in bench", "vitfold[peers]"),
)
# The same package under the names of one CUDA version.
_ALSO = {
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx-cu13": ("tensorrt-rtx-cu12",),
}


@command()
def doctor(as_json: options.Json = False) -> None:
    """Say what is installed, which instruction sets the processor has, and how to mend what is missing."""
    facts = environment()
    with steps("doctor") as say:
        say("importing what is installed")
        parts = package_rows(installed_version, _import_problems)
        say("starting engines")
        engines = {name: engine_obstacle(name) for name, row in ENGINES.items() if row.executes}
    exact = _exactness()
    advice = _advice(exact)
    kept = sum(entry.size for entry in cache_entries())
    partial = leftovers(Path.cwd())
    if as_json:
        print_json(
            {
                "vitfold": __version__,
                "environment": facts,
                "packages": parts,
                "engines": engines,
                "targets": {name: target.why for name, target in TARGETS.items()},
                "exact_8_bit_products": exact,
                "cache": str(cache_folder()),
                "cache_bytes": kept,
                "cache_limit_bytes": cache_limit(),
                "leftovers": [
                    {"path": str(one.path), "bytes": one.size_bytes, "of": one.destination.name, "running": one.lives}
                    for one in partial
                ],
                "advice": advice,
            }
        )
        return
    processor = facts["processor"]
    heading(f"vitfold {__version__}", f" on Python {facts['python']}, {facts['system']}")
    out.print(f"  processor   {processor['name']}, {facts['cores']} usable cores")
    out.print(f"  sets        {' '.join(processor['instruction_sets']) or 'none known'}")
    for name, value in processor.get("settings", {}).items():
        out.print(f"  set         {name}={value}")
    out.print(
        f"  cache       {cache_folder()}, {kept / 1e9:.1f} of at most {cache_limit() / 1e9:.1f} GB",
        soft_wrap=True,
    )
    out.print(_table(parts))
    for name, obstacle in engines.items():
        out.print(f"  engine {name:20} {obstacle or 'runs here'}")
    for name, target in TARGETS.items():
        out.print(f"  target {name:9} {target.why}")
    for line in (*advice, *map(_leftover, partial)):
        note(line)


def package_rows(
    version_of: Callable[[str], str | None], problems_of: Callable[[list[str]], dict[str, str]]
) -> list[dict[str, Any]]:
    """Return a row per package: its version by `version_of`, what importing it meets with, and what mends that."""
    versions = {package: _version(package, version_of) for package, _, _, _ in _PARTS}
    problems = problems_of([module for package, module, _, _ in _PARTS if versions[package] is not None])
    rows = []
    for package, module, purpose, cure in _PARTS:
        problem = "not installed" if versions[package] is None else problems.get(module)
        rows.append(
            {
                "package": package,
                "version": versions[package],
                "purpose": purpose,
                "problem": problem,
                "cure": None if problem is None else f"pip install -U '{cure}'",
            }
        )
    return rows


def _table(parts: list[dict[str, Any]]) -> Table:
    table = Table(pad_edge=False)
    for column in ("package", "version", "for", "to mend it"):
        table.add_column(column)
    for part in parts:
        state = part["version"] or "-"
        if part["problem"] and part["version"]:
            state += f" ({part['problem']})"
        table.add_row(part["package"], state, part["purpose"], part["cure"] or "")
    return table


def _leftover(one: Leftover) -> str:
    """Return a sentence about a workshop in the current folder."""
    if one.lives:
        return f"{one.path.name}: {one.destination.name} is being written"
    cure = f"the next command that writes {one.destination.name} removes it, or remove it yourself"
    return f"{one.path.name}: {one.size_bytes / 1e6:.1f} MB of an interrupted command; {cure}"


def _version(package: str, find: Callable[[str], str | None]) -> str | None:
    versions = (find(name) for name in (package, *_ALSO.get(package, ())))
    return next((version for version in versions if version is not None), None)


def _import_problems(modules: list[str]) -> dict[str, str]:
    """Import installed packages in one process of their own; return what went wrong with which."""
    script = (
        "import importlib, json, sys\n"
        "sys.modules['openvino_telemetry'] = None\n"  # else importing OpenVINO reports to its makers
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        found[name] = f'{type(error).__name__}: {error}'.splitlines()[0]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["the process died"])[-1]
        return dict.fromkeys(modules, f"importing them together fails: {last}")
    problems: dict[str, str] = json.loads(lines[-1])
    return problems


def _exactness() -> dict[str, bool]:
    """Measure of every engine for CPUs that starts whether it computes products of 8-bit weights exactly here."""
    found = {}
    for engine, target in (("onnxruntime", "cpu-vnni"), ("openvino", "openvino")):
        with contextlib.suppress(EngineError):
            found[engine] = runs_here(find_target(target))
    return found


def _advice(exact: dict[str, bool]) -> list[str]:
    """Say per engine what 8-bit products come to on this processor, measured."""
    return [
        f"{engine}: 8-bit products are exact on this processor"
        if right
        else f"{engine}: 8-bit products saturate on this processor; quantize with --target cpu, openvino or portable, "
        "which take 7-bit weights here; bundles made elsewhere run exactly, but slower"
        for engine, right in exact.items()
    ]
