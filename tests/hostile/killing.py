"""`kill -9` at random times of optimize, sweep and search: nothing is lost, nothing half-written is visible.

    python tests/hostile/killing.py --count 210

Each command runs in a process forked from one that has imported everything, and is killed at a random time of the time
that it takes undisturbed, often near its end. Then the folder is looked at, the same command runs to its end, and its
result is compared with that of the undisturbed run. Takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[2] / "src"), str(HERE.parents[1])]

DETERMINISTIC = (
    "recipe",
    "merge",
    "quant",
    "tokens",
    "macs",
    "size_bytes",
    "top1_agreement",
    "cosine",
    "sqnr_db",
    "error",
)
LONGEST_S = 240.0


def graphs(path: Path) -> dict[str, str]:
    """Check a bundle and return the digests of its files."""
    from vitfold.artifacts.digested import check_files, read_header

    header = read_header(path)
    check_files(path, header, ["recipe.toml"] if "kind" not in header.values else [])
    return {name: entry["sha256"] for name, entry in header.values["files"].items()}


def rows(path: Path) -> list[dict[str, Any]]:
    """Return what is deterministic of a sweep's rows; each recipe has one, and its bundle is whole."""
    from vitfold.artifacts.journal import read_rows

    found = read_rows(path / "rows.jsonl")
    names = [row["recipe"] for row in found]
    assert len(names) == len(set(names)), names
    for row in found:
        graphs(path / row["bundle"])
    return sorted(({key: row[key] for key in DETERMINISTIC} for row in found), key=lambda row: row["recipe"])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A command that writes `output` in its folder, where a bundle stands before it if `former`."""

    name: str
    share: int
    arguments: tuple[str, ...]
    output: str = "out.fold"
    former: bool = False
    check: Callable[[Path], Any] = graphs
    equal: bool = True


def scenes(small: Path, photos: Path, dit: Path | None) -> list[Scene]:
    model = (str(small), "--arch", "test_vit", "--image-size", "64", "--num-classes", "10")
    images = ("--images", str(photos), "--calibration-size", "8")
    int8 = (*images, "--quant", "w8a8", "--method", "minmax")
    found = [
        Scene(name="new", share=20, arguments=("optimize", *model, *int8, "--keep-slower")),
        Scene(name="new float", share=20, arguments=("optimize", *model, "--merge", "2")),
        Scene(
            name="overwrite",
            share=30,
            arguments=("optimize", *model, *int8, "--keep-slower", "--overwrite"),
            former=True,
        ),
        Scene(name="float", share=60, arguments=("optimize", *model, "--merge", "2", "--overwrite"), former=True),
        Scene(name="race", share=20, arguments=("optimize", *model, *int8, "--overwrite"), former=True, equal=False),
        Scene(
            name="sweep",
            share=15,
            arguments=("sweep", *model, *images, "--merge", "0,2", "--quant", "none"),
            output="swept",
            check=rows,
        ),
        Scene(
            name="search",
            share=12,
            arguments=("optimize", *model, *images, "--max-drop", "60", "--search-minutes", "0.1", "--overwrite"),
            former=True,
            equal=False,
        ),
    ]
    if dit is not None:
        steps = ("optimize", f"hf:{dit}", "--reuse", "stack:2", "--steps", "4", "--overwrite")
        found.append(Scene(name="steps", share=35, arguments=steps, former=True))
    return found


def make_inputs(folder: Path) -> None:
    """Write a small model with weights that count as trained, photos, and a Diffusion Transformer."""
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=10).state_dict(), folder / "small.safetensors")
    (folder / "photos").mkdir()
    draw = np.random.default_rng(0)
    for i in range(28):
        pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02}.png")
    with contextlib.suppress(ModuleNotFoundError):
        import diffusers  # noqa: F401

        from diffusing import write_folder

        write_folder(folder / "dit")


def start(arguments: tuple[str, ...], log: Path) -> int:
    """Fork a process that runs a command; return its id, which is its group's, too."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from vitfold.cli.app import app

        app(list(arguments), standalone_mode=False)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        exit_code = getattr(error, "exit_code", None)
        if exit_code is None:
            import traceback

            traceback.print_exc()
        code = 71 if exit_code is None else int(exit_code)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def apart(work: Callable[[], None]) -> None:
    """Run in a process of its own, so that this one stays fit to be forked."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("see above")


def finish(pid: int, limit_s: float = LONGEST_S) -> int | None:
    """Wait for a process; return its exit code, None if it was killed."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None
        time.sleep(0.005)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError("it did not end")


def run(scene: Scene, folder: Path) -> float:
    """Run a command undisturbed; return the seconds that it took."""
    began = time.monotonic()
    log = folder.parent / f"{folder.name}.log"
    code = finish(start((*scene.arguments, "-o", str(folder / scene.output)), log))
    assert code == 0, f"{scene.name} left with {code}:\n{log.read_text()[-3000:]}"
    return time.monotonic() - began


def use(path: Path) -> None:
    """Open a bundle and run it."""
    from PIL import Image

    from vitfold.artifacts.bundle import holds_steps, open_bundle
    from vitfold.diffusion.opening import open_steps
    from vitfold.serve.predictor import open_predictor

    if holds_steps(path):
        open_steps(open_bundle(path, steps=True), 1).close()
        return
    with open_predictor(path, threads=1) as predictor:
        predictor(Image.new("RGB", (64, 64)))


def partial(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.endswith((".partial", ".old")))


def kill_once(scene: Scene, folder: Path, former: Path, expected: Any, takes_s: float, draw: random.Random) -> str:
    """Kill a command, look, run it again, compare; return what was found."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    output = folder / scene.output
    if scene.former:
        shutil.copytree(former, output)
    moment = takes_s * (draw.uniform(0.85, 1.02) if draw.random() < 0.4 else draw.uniform(0.0, 1.0))
    pid = start((*scene.arguments, "-o", str(output)), folder.parent / f"{folder.name}.log")
    time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    killed = finish(pid) is None
    left = partial(folder)
    visible = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if scene.output == "swept":
        state = "a part of the rows" if output.exists() else "nothing yet"
        for path in output.glob("*.fold"):
            graphs(path)
    elif scene.former or output.exists():
        found = scene.check(output)  # puts back what a kill between two renames left
        state = "the former" if scene.former and found == graphs(former) else "the new"
        if state == "the new":
            apart(lambda: use(output))
        assert state == "the former" or not scene.equal or found == expected, "neither the former nor the new one"
    else:
        state = "nothing yet"
    assert set(visible) <= {scene.output}, visible
    again = (
        scene.arguments
        if "--overwrite" in scene.arguments or scene.output == "swept"
        else (*scene.arguments, "--overwrite")
    )
    code = finish(start((*again, "-o", str(output)), folder.parent / f"{folder.name}.log"))
    assert code == 0, f"the next run left with {code}: {(folder.parent / f'{folder.name}.log').read_text()[-2000:]}"
    if scene.equal:
        assert scene.check(output) == expected, "the next run differs from an undisturbed one"
    else:
        scene.check(output)
    assert partial(folder) == [], partial(folder)
    return f"{'killed' if killed else 'was done'}, {state}{', a workshop was left' if left else ''}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=210)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="kills-") as text:
        root = Path(text)
        os.environ["VITFOLD_CACHE"] = str(root / "cache")
        apart(lambda: make_inputs(root))
        warm()
        dit = root / "dit"
        play = [
            scene
            for scene in scenes(root / "small.safetensors", root / "photos", dit if dit.exists() else None)
            if not arguments.only or scene.name in arguments.only.split(",")
        ]
        total = sum(scene.share for scene in play)
        counts: dict[str, collections.Counter[str]] = {}
        draw = random.Random(arguments.seed)
        failed = kills = 0
        for scene in play:
            counts[scene.name] = collections.Counter()
            expected, former, takes_s = rehearse(scene, root)
            print(f"{scene.name}: {takes_s:.1f} s undisturbed", flush=True)
            for _ in range(max(1, round(arguments.count * scene.share / total))):
                try:
                    found = kill_once(scene, root / "work", former, expected, takes_s, draw)
                except (AssertionError, TimeoutError) as error:
                    failed += 1
                    found = f"FAILED: {error}"
                    print(f"{scene.name}: {found}", flush=True)
                except Exception as error:
                    failed += 1
                    found = f"FAILED: {type(error).__name__}: {error}"
                    print(f"{scene.name}: {found}", flush=True)
                kills += found.startswith("killed")
                counts[scene.name][found.partition(":")[0]] += 1
            print(f"{scene.name}: {json.dumps(counts[scene.name])}", flush=True)
        from vitfold.artifacts.cache import cache_entries, clear_cache

        entries = cache_entries()
        print(f"cache: {len(entries)} entries, {sum(e.path.suffix == '.partial' for e in entries)} of them partial")
        clear_cache()
        assert cache_entries() == []
        print(f"{kills} kills, {failed} failures")
    sys.exit(1 if failed else 0)


def rehearse(scene: Scene, root: Path) -> tuple[Any, Path, float]:
    """Run a command undisturbed, twice: the second time counts, since caches are warm then."""
    former = root / "former" / "out.fold"
    if not former.exists():
        plain = Scene(name="former", share=0, arguments=(*scene_model(root), "--merge", "1"))
        former.parent.mkdir()
        run(plain, former.parent)
    steps = root / "former-steps" / "out.fold"
    if scene.name == "steps" and not steps.exists():
        steps.parent.mkdir()
        arguments = ("optimize", f"hf:{root / 'dit'}", "--reuse", "none", "--steps", "4")
        run(Scene(name="former steps", share=0, arguments=arguments), steps.parent)
    chosen = steps if scene.name == "steps" else former
    for name in ("first", "second"):
        folder = root / f"{scene.name}-{name}"
        folder.mkdir()
        if scene.former:
            shutil.copytree(chosen, folder / scene.output)
        takes_s = run(scene, folder)
    first, second = (scene.check(root / f"{scene.name}-{name}" / scene.output) for name in ("first", "second"))
    if scene.equal:
        assert first == second, f"{scene.name} is not deterministic: {first} {second}"
    return second, chosen, takes_s


def scene_model(root: Path) -> tuple[str, ...]:
    small = str(root / "small.safetensors")
    return ("optimize", small, "--arch", "test_vit", "--image-size", "64", "--num-classes", "10")


def warm() -> None:
    """Import what commands need, once, without using it."""
    import timm  # noqa: F401

    import vitfold.cli.app
    import vitfold.diffusion.search
    import vitfold.diffusion.writing
    import vitfold.engines.simulation
    import vitfold.pipeline.search
    import vitfold.pipeline.sweep
    import vitfold.sources

    with contextlib.suppress(ModuleNotFoundError):
        import diffusers  # noqa: F401

        import vitfold.sources.diffusers  # noqa: F401


if __name__ == "__main__":
    main()
