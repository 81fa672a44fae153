"""Does a similarity threshold per image beat a fixed schedule of the same mean work? Measured on the demo model.

    python examples/adaptive_merging.py IMAGES OUT.json [COUNT]

At batch 1 the number of tokens that merge could depend on the image: in every block all pairs above a threshold, so
that easy images cost less. Thresholds are calibrated so that r tokens merge on average; accuracy is compared with that
of static schedules at the same mean work, linear between constant r. No time is measured: a graph with lengths of its
own per image can only be slower than a static one of the same mean, so accuracy at equal work decides.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vitfold import find_images, load
from vitfold.architectures.tokens import Tokens
from vitfold.architectures.vit import embed, head, pool, transformer_block
from vitfold.bench.classes import class_targets
from vitfold.bench.environment import environment
from vitfold.bench.statistics import paired_drop
from vitfold.images import batches
from vitfold.model import Model, ViTSpec
from vitfold.ops.run import Run
from vitfold.pipeline import count_costs
from vitfold.recipe import MergeRecipe, largest_r

BUDGETS = (2, 3, 4, 5, 6)
CONSTANTS = (0, 1, 2, 3, 4, 5, 6, 8)
CALIBRATION = 64
Choose = Callable[[int, np.ndarray], int]


def run_image(ops: Run, spec: ViTSpec, image: torch.Tensor, choose: Choose) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return the output for one image, and how many tokens each block merged: `choose(block, similarities)`."""
    recipe = MergeRecipe(r=(0,) * spec.num_layers)
    tokens, counts = embed(ops, spec, image), []
    for block in range(spec.num_layers):
        best = best_similarities(ops, spec, block, tokens)
        r = min(choose(block, best), largest_r(tokens.count, tokens.prefix), len(best))
        tokens = transformer_block(ops, spec, block, tokens, r=r, recipe=recipe, trace=False)
        counts.append(r)
    return head(ops, spec, pool(ops, spec, tokens, recipe)), tuple(counts)


def best_similarities(ops: Run, spec: ViTSpec, block: int, tokens: Tokens[torch.Tensor]) -> np.ndarray:
    """The similarity of every token of A to its nearest of B; the keys are computed twice here."""
    x = ops.layer_norm(f"blocks.{block}.norm1", tokens.x, spec.norm_eps)
    k = ops.heads(f"blocks.{block}.attn.qkv", x, 3, spec.num_heads)[1].mean(1)
    prefix, count = tokens.prefix, tokens.count
    a, b = range(prefix + prefix % 2, count, 2), range(prefix + 1 - prefix % 2, count, 2)
    if min(len(a), len(b)) == 0:
        return np.zeros(0)
    return ops.similarity("", k, a, b).amax(-1).flatten().numpy()


def calibrate(ops: Run, spec: ViTSpec, images: list[torch.Tensor], budget: int) -> list[float]:
    """Thresholds, block by block, above which `budget` pairs lie on average, given those of the blocks before."""
    thresholds: list[float] = []
    for block in range(spec.num_layers):
        seen: list[np.ndarray] = []

        def choose(at: int, best: np.ndarray, block: int = block, seen: list[np.ndarray] = seen) -> int:
            if at == block:
                seen.append(best)
            return int((best > thresholds[at]).sum()) if at < block else 0

        for image in images:
            run_image(ops, spec, image, choose)
        found = np.sort(np.concatenate(seen))[::-1]
        wanted = budget * len(images)
        thresholds.append(float(found[wanted]) if wanted < len(found) else -1.0)
    return thresholds


def measure(model: Model, images: str, count: int) -> list[dict[str, object]]:
    """Run every budget and every constant schedule over the images."""
    spec, ops, work = model.spec, Run(model.params), {}
    everything = find_images(images)
    calibration = everything.sample(CALIBRATION, seed=0)
    others = everything.without(calibration)
    assert others is not None
    chosen = others.first(count)
    targets = class_targets(chosen, model.labels, spec.outputs)

    def macs(r: tuple[int, ...]) -> int:
        if r not in work:
            work[r] = sum(cost.macs for cost in count_costs(spec, MergeRecipe(r=r)))
        return work[r]

    pixels = [torch.from_numpy(g.pixel_values) for g in batches(calibration, model.preprocess, batch=1)]
    thresholds = {budget: calibrate(ops, spec, pixels, budget) for budget in BUDGETS}
    ways: dict[tuple[str, int], Choose] = {("constant", r): lambda _block, _best, r=r: r for r in CONSTANTS}
    ways |= {("adaptive", r): lambda block, best, t=t: int((best > t[block]).sum()) for r, t in thresholds.items()}
    right: dict[tuple[str, int], list[bool]] = {way: [] for way in ways}
    spent: dict[tuple[str, int], list[int]] = {way: [] for way in ways}
    for group in batches(chosen, model.preprocess, batch=1):
        image = torch.from_numpy(group.pixel_values)
        for way, choose in ways.items():
            y, r = run_image(ops, spec, image, choose)
            right[way].append(int(y.argmax()) == targets[group.index[0]])
            spent[way].append(macs(r))
    static = sorted((float(np.mean(spent[way])), float(np.mean(right[way]))) for way in ways if way[0] == "constant")
    return [
        {
            "kind": kind,
            "r": r,
            "images": len(right[kind, r]),
            "top1": float(np.mean(right[kind, r])),
            "mean_macs": float(np.mean(spent[kind, r])),
            "std_macs": float(np.std(spent[kind, r])),
            "static_top1_at_equal_macs": float(np.interp(np.mean(spent[kind, r]), *zip(*static, strict=True))),
            "drop": paired_drop(np.array(right["constant", 0]), np.array(right[kind, r])).to_dict(),
        }
        for kind, r in ways
    ]


def main(images: str, output: str, count: int = 1000) -> None:
    """Measure, write the JSON and print a line per schedule."""
    with torch.inference_mode():
        rows = measure(load("demo"), images, count)
    document = {"model": "demo", "environment": environment(), "rows": rows}
    Path(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['kind']} {row['r']}: {row['mean_macs'] / 1e9:.3f} ± {row['std_macs'] / 1e9:.3f} GMACs, "
            f"{100 * row['top1']:.2f} %, static at equal work {100 * row['static_top1_at_equal_macs']:.2f} %"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3], *(int(value) for value in sys.argv[3:4]))
