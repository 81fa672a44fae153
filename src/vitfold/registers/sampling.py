"""How many images a search for remedies takes, so that it answers within minutes on this machine.

The answer is kept: an interrupted search goes on with the same images.
"""

from __future__ import annotations

import json
import time

import torch

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.artifacts.cache import keep_bytes, key_of, read_bytes
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.registers.search import LABELLED_IMAGES, PROBE_IMAGES, SCREEN_IMAGES

SECONDS = 170.0
SAMPLES = (8, 16, 32, 64, 128)
SCREENED_RUNS, PROBED_RUNS, STREAMED_RUNS = 360, 60, 25
"""Forward passes of the float model that a search costs per image: those of the wide grid on the fewest images, those
on few, and those over all."""


def estimated_seconds(count: int, seconds_per_image: float, *, labelled: bool) -> float:
    """Return about how long a search over so many images takes."""
    few = min(count, LABELLED_IMAGES if labelled else PROBE_IMAGES)
    return seconds_per_image * (SCREENED_RUNS * SCREEN_IMAGES + PROBED_RUNS * few + STREAMED_RUNS * count)


def affordable(count: int, seconds_per_image: float, *, labelled: bool) -> int:
    """Return the most images, at most `count`, that a search goes through in about three minutes; eight at least."""
    fitting = [n for n in SAMPLES if estimated_seconds(n, seconds_per_image, labelled=labelled) <= SECONDS]
    return min(count, max(fitting, default=SAMPLES[0]))


def sample_size(model: Model, images: ImageSet) -> int:
    """Return how many of the images a search on this machine goes through, as it was found the first time."""
    labelled = images.classes is not None and model.spec.head == "single_label"
    key = key_of("sample", model.digest(), images.digest(), labelled)
    kept = read_bytes("remedies", key, ".json")
    if kept is not None:
        return int(json.loads(kept))
    found = affordable(len(images.paths), _seconds_per_image(model), labelled=labelled)
    keep_bytes("remedies", key, ".json", json.dumps(found).encode())
    return found


def _seconds_per_image(model: Model, batch: int = 4) -> float:
    ops, spec = Run(model.params), model.spec
    pixels = torch.zeros(batch, spec.channels, *spec.image_size)
    taken = []
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            forward(ops, spec, UNMERGED, pixels)
            taken.append(time.perf_counter() - start)
    return min(taken) / batch
