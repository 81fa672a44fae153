"""From files to labels: images decoded ahead, copied as bytes and normalized on the device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitfold.cores import usable_cores
from vitfold.gpu.report import Ready, Report, loaded, wait
from vitfold.gpu.speed import BASELINES, ratios_of
from vitfold.gpu.study import need_study
from vitfold.images import find_images, prepared_ahead
from vitfold.model import Preprocess
from vitfold.sources import demo_folder

PHOTO = (500, 375)
"""Width and height of the files that are decoded, about the median of ImageNet."""


class Arrival:
    """Images from the host to labels on the host: bytes copied from pinned memory, normalized on the device.

    The next batch is copied while the device works on this one, and labels are read a batch later, so that the host
    never waits for what it has just asked for.
    """

    def __init__(self, report: Report, preprocess: Preprocess) -> None:
        self._device, self._shape = report.device, preprocess.crop_size
        mean, std = (
            torch.tensor(values, device=report.device).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std)
        )
        self._factor, self._offset = 1 / (255 * std), -mean / std
        self._on_gpu = report.device.type == "cuda"
        cuda: Any = torch.cuda
        self._copies = cuda.Stream(report.device) if self._on_gpu else None

    def through(self, held: Iterable[torch.Tensor], ready: Ready) -> float:
        """Return the seconds from now until all labels of batches (B, H, W, 3) of bytes are on the host."""
        labels: list[tuple[torch.Tensor, Any]] = []
        wait(self._device)
        began = time.perf_counter_ns()
        with torch.no_grad():
            for one in held:
                made = ready.module(self._normalized(self._copied(one), getattr(torch, ready.subject.dtype)))
                made = made[0] if isinstance(made, tuple) else made
                labels.append((made.argmax(1).to("cpu", non_blocking=True), self._event()))
                if len(labels) > 1 and self._on_gpu:
                    labels[-2][1].synchronize()
        wait(self._device)
        return (time.perf_counter_ns() - began) / 1e9

    def _copied(self, held: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return held
        with torch.cuda.stream(self._copies):
            x = held.to(self._device, non_blocking=True)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._copies)
        x.record_stream(here)
        return x

    def _event(self) -> Any:
        if not self._on_gpu:
            return None
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _normalized(self, held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Images (B, 3, H, W) in the subject's type; those of another size are resized, near to how Pillow does."""
        x = held.permute(0, 3, 1, 2).float()
        if tuple(x.shape[2:]) != tuple(self._shape):
            x = torch.nn.functional.interpolate(x.contiguous(), self._shape, mode="bicubic", antialias=True)
            x = x.round_().clamp_(0, 255)
        return torch.addcmul(self._offset, x, self._factor).to(dtype, memory_format=torch.contiguous_format)


def photos_of(report: Report) -> list[Path]:
    """Write JPEG files of the size of photos, made of the demo's images and noise, and return their paths."""
    few = find_images(demo_folder() / "images").sample(4 if report.small else 64, seed=0)
    noise = np.random.default_rng(0).normal(0, 12, (*PHOTO[::-1], 3))
    folder = report.work / "photos"
    folder.mkdir(exist_ok=True)

    def write(place: int, path: Path) -> Path:
        image = np.asarray(Image.open(path).convert("RGB").resize(PHOTO, Image.Resampling.BICUBIC))
        noisy = np.clip(image + np.roll(noise, 7 * place, 1), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{place}.jpg", quality=90)
        return folder / f"{place}.jpg"

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(write, range(len(few.paths)), few.paths))


def held_bytes(report: Report, paths: Sequence[Path], size: tuple[int, int] | None) -> torch.Tensor:
    """Decode a batch, resized by Pillow to `size` (width, height) unless it is none: (B, H, W, 3) of pinned bytes."""
    images = [Image.open(path).convert("RGB") for path in paths]
    if size is not None:
        images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    held = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return held.pin_memory() if report.device.type == "cuda" else held


def end_to_end(report: Report) -> None:
    """Files to labels, of the baselines and of ours, each in its own type; rounds take turns.

    First of images decoded ahead: resized by Pillow, and, in a second row of each, on the device, which is near to
    Pillow's and not equal (docs/gpu.md). Then as a stream, in which threads decode while the device works.
    """
    study = need_study(report)
    batch, ready = study.batch, study.ready
    preprocess, paths, workers = loaded(study.source).model.preprocess, photos_of(report), usable_cores()
    size, count = preprocess.crop_size[::-1], batch * (2 if report.small else 8)
    files = [paths[i % len(paths)] for i in range(count)]
    groups = [files[start : start + batch] for start in range(0, count, batch)]
    arrival, wanted = Arrival(report, preprocess), ends_of(report, ready)
    rows: list[dict[str, Any]] = []

    def prepared(to: tuple[int, int] | None) -> Iterator[torch.Tensor]:
        return prepared_ahead(groups, lambda group: held_bytes(report, group, to), workers=workers)

    for suffix, to in {"": size, ", resized on the device": None}.items():
        held = list(prepared(to))
        add_ends(report, rows, suffix, {name: ready[name] for name in wanted}, arrival, partial(iter, held))
    with report.quiet():
        began = time.perf_counter()
        rate = sum(len(held) for held in prepared(size)) / (time.perf_counter() - began)
    rows.append({"name": "decoding alone", "batch": batch, "workers": workers, "images_per_second": rate})
    few = {name: ready[name] for name in wanted[:4]}
    add_ends(report, rows, ", stream", few, arrival, lambda: prepared(size))


def ends_of(report: Report, ready: Mapping[str, Ready]) -> list[str]:
    """Return the baselines, then ours, the most merged first."""
    ours = sorted((name for name in ready if "torch" not in name), key=lambda name: ("3x48" not in name, "r0" in name))
    found = [name for name in BASELINES if name in ready] + ours
    return found[:3] if report.small else found


def add_ends(
    report: Report,
    rows: list[dict[str, Any]],
    suffix: str,
    ready: Mapping[str, Ready],
    arrival: Arrival,
    held: Callable[[], Iterable[torch.Tensor]],
) -> None:
    """Add a row per subject, `suffix` behind its name: three rounds through all batches that `held` gives."""
    first = list(itertools.islice(held(), 1))
    seconds: dict[str, list[float]] = {}
    for name, one in ready.items():
        try:
            arrival.through(first * 3, one)
            seconds[name] = []
        except Exception as error:  # the others are measured
            rows.append({"name": name + suffix, "error": f"{type(error).__name__}: {error}"[:500]})
    for place in range(1 if report.small else 3):
        if place and report.over():
            break
        with report.quiet():
            for name, taken in seconds.items():
                taken.append(arrival.through(held(), ready[name]))
    images = sum(len(one) for one in held())
    for name, taken in seconds.items():
        rate = images / float(np.median(taken))
        row = {"name": name + suffix, "batch": len(first[0]), "images": images, "images_per_second": rate}
        rows.append({**row, **ratios_of(seconds, name), "seconds": taken})
        report.say(f"end to end: {name + suffix} {rate:.0f} images/s")
    note = (
        f"JPEG files of {PHOTO[0]} x {PHOTO[1]}. Timed: copy, normalization, network and labels; in a stream decoding, "
        "too, by threads ahead. Ratios are least, median and largest of rounds"
    )
    report.write("end-to-end", rows, note=note)
