"""How large the integer accumulators of a quantized model are, and whether they fit FP16.

Usage: python examples/accumulators.py BUNDLE IMAGES OUT.json, for a bundle of target tensorrt-int8 and a folder of
images. With per-channel weight scales in an FP16 graph, TensorRT stores these accumulators as FP16, whose largest
number is 65504.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitfold.architectures.programs import forward
from vitfold.artifacts.bundle import QUANTIZERS, open_bundle
from vitfold.bench.environment import environment
from vitfold.bench.reference import reference_from_origin
from vitfold.images import batches, find_images
from vitfold.ops.simulate import Simulate
from vitfold.pipeline import calibrate_plan, optimize, recorded_images
from vitfold.quantizer import Quantizer, Uniform, load_quant_params

LARGEST_HALF = 65504
IMAGES = 64


class Accumulators(Simulate):
    """The simulation, which also looks at the integer product of every linear layer."""

    def __init__(self, params: Mapping[str, Any], quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__(params, quantizers)
        self.seen: dict[str, list[float]] = {}

    def linear(self, layer: str, x: torch.Tensor) -> torch.Tensor:
        """Count accumulators beyond FP16, and the largest."""
        inputs, weight = self._quantizers.get(f"{layer}.x"), self._quantizers.get(f"{layer}.w")
        if isinstance(inputs, Uniform) and isinstance(weight, Uniform):
            codes = (x / float(inputs.scale)).round().clamp(inputs.low - int(inputs.zero_point), 255)
            scale = torch.from_numpy(weight.scale).reshape(-1, 1)
            whole = (self._params[f"{layer}.weight"] / scale).round()
            sums = (codes @ whole.T).abs()
            count = self.seen.setdefault(layer, [0.0, 0.0, 0.0])
            count[0] += float((sums > LARGEST_HALF).sum())
            count[1] += sums.numel()
            count[2] = max(count[2], float(sums.max()))
        return super().linear(layer, x)


def main() -> None:
    """Run the model and write what was seen."""
    bundle, folder, output = open_bundle(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    manifest = bundle.manifest
    model = reference_from_origin(bundle).model
    assert model is not None
    assert manifest.calibration is not None
    planned = optimize(model, recipe=manifest.recipe, target="tensorrt-int8")
    done = calibrate_plan(planned, recorded_images(manifest.calibration, None))
    ops = Accumulators(done.folded.params, load_quant_params(bundle.path / QUANTIZERS))
    images = find_images(folder).first(IMAGES)
    with torch.inference_mode():
        for group in batches(images, model.preprocess, batch=8):
            forward(ops, done.folded.spec, manifest.recipe.merge, torch.from_numpy(np.asarray(group.pixel_values)))
    rows = [
        {"layer": layer, "share_beyond_fp16": beyond / total, "largest": largest}
        for layer, (beyond, total, largest) in ops.seen.items()
    ]
    document = {
        "source": manifest.origin["source"],
        "images": len(images.paths),
        "limit": LARGEST_HALF,
        "layers_beyond": sum(row["share_beyond_fp16"] > 0 for row in rows),
        "layers": len(rows),
        "rows": rows,
        "environment": environment(),
    }
    output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    worst = max(rows, key=lambda row: float(row["share_beyond_fp16"]))  # type: ignore[arg-type]
    sys.stdout.write(f"{document['layers_beyond']} of {document['layers']} layers exceed FP16; worst: {worst}\n")


if __name__ == "__main__":
    main()
