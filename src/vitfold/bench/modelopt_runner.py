"""The process that runs NVIDIA ModelOpt: a plain ONNX file in, its Q/DQ graph out.

ModelOpt needs other versions of ONNX packages than vitfold, so `peers` starts this file by its path in an
environment that has ModelOpt and no vitfold. Its one argument is a JSON object, its result another one in the file
that the first names.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantize as the argument says."""
    order = json.loads(sys.argv[1])
    quantize(order)
    result = {"version": importlib.metadata.version("nvidia-modelopt")}
    Path(order["result"]).write_text(json.dumps(result), encoding="utf-8")


def quantize(order: dict[str, Any]) -> None:
    """Write the graph of `modelopt.onnx.quantization.quantize` with ranges found on the CPU."""
    import numpy as np
    import onnx
    from modelopt.onnx.quantization import quantize

    pixels = np.load(order["pixels"])
    name = onnx.load(order["plain"], load_external_data=False).graph.input[0].name
    quantize(
        order["plain"],
        quantize_mode=order["mode"],
        calibration_data={name: pixels},
        calibration_shapes=f"{name}:{'x'.join(map(str, (min(order['batch'], len(pixels)), *pixels.shape[1:])))}",
        calibration_eps=["cpu"],
        output_path=order["quantized"],
        log_level="ERROR",
    )


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, whose names could hide those of packages
    main()
