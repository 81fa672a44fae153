"""How fast and in how much memory `vitfold map` works on real files, beside what people write by hand.

    python examples/map_many.py BUNDLE FOLDER OUT.json [--threads 1] [--images 1500] [--whole]

One row for each subject: the engine alone on prepared pixels, `vitfold map`, ONNX Runtime with Pillow in a process
pool, ONNX Runtime behind a DataLoader of torch. Rounds are interleaved: in each round every subject takes the same next
images. Start-up (imports, opening the model) is not in the times of the peers, nor in the time of `map`, which is told
by the moments at which its parts appear. Beside them the processor time of an image is taken. `--whole` adds one run
over the whole folder with its memory over time, and runs of up to a million rows in which the model takes no time.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vitfold.artifacts.bundle import open_bundle
from vitfold.bench.environment import environment
from vitfold.decoding import prepared
from vitfold.model.preprocess import Preprocess
from vitfold.serve import BatchPredictor
from vitfold.serve.mapping.running import Done, computed
from vitfold.serve.predictor import open_predictor

BATCH = 8
Subject = Callable[[Sequence[Path]], float]
"""Works through images and returns the seconds that it took."""


def session(onnx: str, threads: int) -> Any:
    """Open a graph as its documentation has it."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(onnx, settings, providers=["CPUExecutionProvider"])


@functools.cache
def opened(onnx: str, threads: int) -> Any:
    """Open a graph once in a process."""
    return session(onnx, threads)


def pooled(onnx: str, preprocess: Preprocess, paths: Sequence[Path]) -> int:
    """Read, prepare and run a batch in a process of a pool."""
    graph = opened(onnx, 1)
    pixels = np.stack([prepared(path, preprocess) for path in paths])
    return len(graph.run(None, {graph.get_inputs()[0].name: pixels})[0])


class Files:
    """Prepared images, as a data set of torch."""

    def __init__(self, paths: Sequence[Path], preprocess: Preprocess) -> None:
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.paths)

    def __getitem__(self, i: int) -> Any:
        """Return one."""
        return prepared(self.paths[i], self.preprocess)


def subjects(bundle: Path, threads: int, scratch: Path) -> dict[str, Subject]:
    """Return what is timed; each is warm before its clock starts."""
    made = open_bundle(bundle)
    preprocess, onnx = made.manifest.preprocess, str(made.onnx_path)
    predictor = open_predictor(bundle, threads=threads)
    kept: dict[int, Any] = {}

    def engine(paths: Sequence[Path]) -> float:
        if not kept:
            kept[0] = np.stack([prepared(path, preprocess) for path in paths[:BATCH]])
        began = time.perf_counter()
        for _ in range(len(paths) // BATCH):
            predictor.session.named(kept[0])
        return time.perf_counter() - began

    def mapped(paths: Sequence[Path]) -> float:
        names, output = scratch / "names.csv", scratch / "out"
        names.write_text("path\n" + "".join(f"{path}\n" for path in paths))
        words = ["map", str(bundle), str(names), "-o", str(output), "--part", str(len(paths) // 4)]
        subprocess.run(
            [sys.executable, "-m", "vitfold", *words, "--threads", str(threads), "--workers", "1"], check=True
        )
        ended = sorted(path.stat().st_mtime for path in output.glob("*.parquet"))
        shutil.rmtree(output)
        # Of four parts three lie between the first and the last moment.
        return (ended[-1] - ended[0]) * 4 / 3

    pool = ProcessPoolExecutor(threads, multiprocessing.get_context("spawn"))

    def processes(paths: Sequence[Path]) -> float:
        groups = [list(paths[i : i + BATCH]) for i in range(0, len(paths), BATCH)]
        list(pool.map(functools.partial(pooled, onnx, preprocess), groups[:threads]))
        began = time.perf_counter()
        list(pool.map(functools.partial(pooled, onnx, preprocess), groups))
        return time.perf_counter() - began

    graph = session(onnx, threads)

    def loader(paths: Sequence[Path]) -> float:
        import torch

        data = torch.utils.data.DataLoader(Files(paths, preprocess), batch_size=BATCH, num_workers=2)
        batches = iter(data)
        first = next(batches)
        began = time.perf_counter()
        graph.run(None, {graph.get_inputs()[0].name: first.numpy()})
        for one in batches:
            graph.run(None, {graph.get_inputs()[0].name: one.numpy()})
        return time.perf_counter() - began

    return {
        "engine alone": engine,
        "vitfold map": mapped,
        "onnxruntime and Pillow in a process pool": processes,
        "onnxruntime behind a torch DataLoader": loader,
    }


def compared(bundle: Path, paths: Sequence[Path], threads: int, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """Time all subjects, interleaved, and return a row for each."""
    all_of_them = list(subjects(bundle, threads, scratch).items())
    count = len(paths) // rounds // (4 * BATCH) * 4 * BATCH
    rates: dict[str, list[float]] = {name: [] for name, _ in all_of_them}
    for turn in range(rounds):
        some = paths[turn * count : (turn + 1) * count]
        for i in range(len(all_of_them)):
            name, subject = all_of_them[(i + turn) % len(all_of_them)]
            rates[name].append(count / subject(some))
            print(name, f"{rates[name][-1]:.1f} images/s", flush=True)
    rows = []
    for name, found in rates.items():
        ratios = [one / alone for one, alone in zip(found, rates["engine alone"], strict=True)]
        row = {"subject": name, "images_per_s": found, "median_images_per_s": float(np.median(found))}
        rows.append(row | {"share_of_engine": ratios, "median_share_of_engine": float(np.median(ratios))})
    return rows


def cpu_times(bundle: Path, paths: Sequence[Path], threads: int) -> dict[str, float]:
    """Return the milliseconds of processor time that an image takes, which other programs hardly change."""
    predict = BatchPredictor(bundle, threads=threads, batch=BATCH, top=5)
    preprocess = predict.predictor.bundle.manifest.preprocess
    pixels = np.stack([prepared(path, preprocess) for path in paths[:BATCH]])
    work: dict[str, Callable[[], Any]] = {
        "engine alone": lambda: [predict.predictor.session.named(pixels) for _ in range(len(paths) // BATCH)],
        "decoding alone": lambda: [prepared(path, preprocess) for path in paths],
        "columns of a part": lambda: predict.columns(paths),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(3):
        for name, call in work.items():
            began = time.process_time()
            call()
            times[name].append((time.process_time() - began) / len(paths) * 1e3)
    predict.close()
    return {name: float(np.median(found)) for name, found in times.items()}


def watched(words: Sequence[str], output: Path, every_s: float) -> dict[str, Any]:
    """Run a command; return its time, and its memory and finished files over time, workers included."""
    began, curve = time.time(), []
    process = psutil.Popen([sys.executable, "-m", "vitfold", *words])
    while process.poll() is None:
        used = {}
        for one in [process, *process.children(recursive=True)]:
            try:
                used[one.pid] = one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        done = len(list(output.glob("*.parquet")))
        curve.append([round(time.time() - began, 1), round(sum(used.values()) / 2**20, 1), done])
        time.sleep(every_s)
    if process.returncode:
        raise RuntimeError(f"left with {process.returncode}")
    return {"seconds": time.time() - began, "curve": curve}


def instant(part: int) -> Done:
    """Compute nothing."""
    return Done(part=part, images=1000)


def scheduled(rows: int) -> dict[str, Any]:
    """Let Daft schedule parts of 1000 rows that take no time."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], psutil.Process().memory_info().rss / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    total = sum(one.images for one in computed(instant, range(rows // 1000), workers=1, ray=None, stop=list))
    seconds = time.perf_counter() - began
    ended.set()
    thread.join()
    return {"rows": total, "seconds": seconds, "peak_mib": peak[0]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    paths = sorted(path.absolute() for path in options.folder.rglob("*.jpg"))
    found: dict[str, Any] = {"environment": environment(), "note": options.note, "threads": options.threads}
    found |= {"files": len(paths), "bytes": sum(path.stat().st_size for path in paths), "batch": BATCH}
    found["cpu_ms_per_image"] = cpu_times(options.bundle, paths[:256], options.threads)
    with tempfile.TemporaryDirectory() as text:
        found["rows"] = compared(options.bundle, paths[: options.images], options.threads, options.rounds, Path(text))
        options.output.write_text(json.dumps(found, indent=1) + "\n")
        if options.whole:
            found["scheduler"] = [scheduled(rows) for rows in (100_000, 300_000, 1_000_000)]
            output = Path(text) / "whole"
            words = ["map", str(options.bundle), str(options.folder), "-o", str(output), "--threads"]
            found["whole"] = watched([*words, str(options.threads), "--workers", "1"], output, 5.0)
            options.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads of Daft do not outlive Python


if __name__ == "__main__":
    main()
