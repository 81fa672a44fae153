"""`vitfold doctor`: what is installed, what the processor can do, and the command that mends what is missing."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vitfold.cli import options
from vitfold.cli.terminal import command, note, out, print_json

_PARTS = (
    ("onnxruntime", "onnxruntime", "runs bundles", "vitfold"),
    ("torch", "torch", "loads originals, reference interpreter", "vitfold[optimize]"),
    ("onnx-ir", "onnx_ir", "writes ONNX graphs", "vitfold[optimize]"),
    ("timm", "timm", "source timm:NAME, files, demo", "vitfold[optimize]"),
    ("transformers", "transformers", "source hf:REPO_OR_FOLDER", "vitfold[transformers]"),
    ("torchvision", "torchvision", "source torchvision:NAME", "vitfold[torchvision]"),
    ("open_clip_torch", "open_clip", "source open_clip:NAME", "vitfold[open_clip]"),
    ("onnxscript", "onnxscript", "peer onnxruntime in bench", "vitfold[peers]"),
)


@command
def doctor(json: options.Json = False) -> None:
    """Say what is installed, which instruction sets the processor has, and how to mend what is missing."""
    from vitfold.bench.environment import environment, installed_version
    from vitfold.cache import cache_folder
    from vitfold.target import TARGETS
    from vitfold.version import __version__

    facts = environment()
    parts: list[dict[str, Any]] = []
    for package, module, purpose, cure in _PARTS:
        version = installed_version(package)
        problem = None if version is None else _import_problem(module)
        parts.append(
            {
                "package": package,
                "version": version,
                "purpose": purpose,
                "problem": problem if version is not None else "not installed",
                "cure": None if version is not None and problem is None else f"pip install -U '{cure}'",
            }
        )
    advice = _advice(facts["processor"]["instruction_sets"])
    if json:
        print_json(
            {
                "vitfold": __version__,
                "environment": facts,
                "packages": parts,
                "targets": {name: target.why for name, target in TARGETS.items()},
                "cache": str(cache_folder()),
                "advice": advice,
            }
        )
        return
    processor = facts["processor"]
    out.print(f"[bold]vitfold {__version__}[/] on Python {facts['python']}, {facts['system']}", highlight=False)
    out.print(f"  processor   {processor['name']}, {facts['cores']} usable cores", highlight=False)
    out.print(f"  sets        {' '.join(processor['instruction_sets']) or 'none known'}", highlight=False)
    out.print(f"  cache       {cache_folder()}", highlight=False, soft_wrap=True)
    table = Table(pad_edge=False)
    for column in ("package", "version", "for", "to mend it"):
        table.add_column(column)
    for part in parts:
        state = part["version"] or "-"
        if part["problem"] and part["version"]:
            state += f" ({part['problem']})"
        table.add_row(part["package"], state, part["purpose"], part["cure"] or "")
    out.print(table)
    for name, target in TARGETS.items():
        out.print(f"  target {name:9} {target.why}", highlight=False)
    for line in advice:
        note(line)


def _import_problem(module: str) -> str | None:
    """Return why an installed package cannot be imported, or None."""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["import failed"])[-1]


def _advice(sets: list[str]) -> list[str]:
    if "amx_int8" in sets or "avx512_vnni" in sets or "avx_vnni" in sets:
        return ["this processor has integer dot products (VNNI or AMX)"]
    if "avx2" in sets:
        return ["this processor has AVX2 without integer dot products"]
    return []
