"""Measures vitfold's torch modules on the GPU at hand, most important first, within a time that is given.

    python -m vitfold.gpu --output results --seconds 360

Every file `gpu-NAME.json` is whole after each row, so that whatever time is left at the end, what was measured stands
there. Needs torch, timm, onnx and what vitfold needs; no network. With `--device cpu` small models stand in for large.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from vitfold.gpu.samplers import draw
from vitfold.gpu.sections import SECTIONS, measure
from vitfold.gpu.study import allow_recompilations, compile_a_line, compile_a_subject

TASKS: Mapping[str, Callable[..., None]] = {
    "preflight": compile_a_line,
    "subject": compile_a_subject,
    "sample": draw,
}
"""What children do."""


def main() -> int:
    """Measure what the command line asks for, or do what a report asks of one of its processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        allow_recompilations()
        task, *arguments = json.loads(asked.child)
        TASKS[task](*arguments)
        return 0
    return measure(asked.output, asked.device, asked.seconds, asked.sections.split(","))


if __name__ == "__main__":
    sys.exit(main())
