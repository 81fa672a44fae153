"""Mutations of bundle files, opened and run in child processes: what comes back is a VitfoldError, or it still works.

    python tests/hostile/mutating.py --count 20000

A case is a number: it chooses the bundle, the kind of mutation and every byte of it. Children open thousands of bundles
each; a parent notices signals, hangs and exceptions that no user should see.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[2] / "src"), str(HERE.parents[1])]

MEMORY_BYTES = 6 * 2**30
HANG_S = 30.0
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**18, 0.5, -0.0, 1e308, 1e-320, "", "x", "\0", "é" * 50),
    *(
        "x" * 100_000,
        "../../etc/passwd",
        "/dev/zero",
        "nan",
        [],
        {},
        [[]],
        [None],
        [1, 2, 3],
        {"": ""},
        {"a": {"b": {}}},
    ),
    *([0] * 5000, ["x"] * 5000, "C:\\a", "[red]x", "\x1b[31m", "\u202e", 255, 65536, 3.0),
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "[" * 3000 + "]" * 3000,
    '"\\ud800"',
    '{"a":1,"a":2}',
    "00",
    "'a'",
)


# --- what is mutated: bundles of every kind, of tiny models


def build_seeds(folder: Path, tiny: Callable[[], Any]) -> None:
    """Write one bundle of each kind of a tiny model."""
    import numpy as np
    from PIL import Image

    from vitfold import pipeline
    from vitfold.images import find_images
    from vitfold.recipe import quant_from_scheme

    photos = folder / "photos"
    photos.mkdir(parents=True)
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
    images = find_images(photos)
    model = replace(tiny(), labels=tuple("abcdefghij"))
    pipeline.save(pipeline.optimize(model, merge=2), folder / "float.fold")
    for name, scheme, target in (
        ("int8", "w8a8", "cpu"),
        ("portable", "w8a8", "portable"),
        ("simulated", "w4a4", "cpu"),
    ):
        quant = quant_from_scheme(scheme)
        assert quant is not None
        folded = pipeline.optimize(
            model, merge=2, quant=replace(quant, method="minmax", calibration_size=4), target=target
        )
        pipeline.save(pipeline.calibrate_plan(folded, images), folder / f"{name}.fold")
    pipeline.save(pipeline.optimize(model, target="tensorrt-fp16"), folder / "half.fold")
    with contextlib.suppress(ModuleNotFoundError):
        build_steps(folder / "steps.fold")


def build_steps(path: Path) -> None:
    import diffusers  # noqa: F401

    from diffusing import build_tiny_dit
    from vitfold.artifacts.steps import SamplingPlan
    from vitfold.diffusion import find_method
    from vitfold.diffusion.compression import compress
    from vitfold.diffusion.writing import save_steps

    model = build_tiny_dit()
    plan = SamplingPlan(reuse="stack:2", steps=4, sampler="ddim", guidance=1.5)
    save_steps(model, plan, find_method("stack:2"), compress(model), path)


# --- mutations


def mutate(case: int, seeds: Path, work: Path) -> str:
    """Write the bundle of a case at `work`; return what was done to it, in words."""
    draw = random.Random(case)
    bundles = sorted(seeds.glob("*.fold"))
    seed = bundles[case % len(bundles)]
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(seed, work)
    kind = draw.choices(
        (values_of_manifest, text_of_manifest, plain_damage, hostile_graph, hostile_bytes, swapped, hostile_tensors),
        (6, 3, 1, 6, 3, 2, 3),
    )[0]
    return f"{seed.stem}: {kind.__name__}: {kind(draw, work, bundles)}"


def manifest_of(work: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((work / "manifest.json").read_text())
    return values


def seal_again(work: Path, values: dict[str, Any] | None = None) -> None:
    """State the digests that files have by now: a hostile bundle, not a damaged one."""
    values = manifest_of(work) if values is None else values
    for name in values["files"]:
        path = work / name
        if path.is_file():
            content = path.read_bytes()
            values["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    (work / "manifest.json").write_text(json.dumps(values))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*at, key)
        yield from places(one, (*at, key))


def values_of_manifest(draw: random.Random, work: Path, _: list[Path]) -> str:
    """Change one to three values, keys or entries of the manifest."""
    values = manifest_of(work)
    done = []
    for _i in range(draw.choice((1, 1, 1, 2, 3))):
        found = [place for place in places(values) if draw.random() < 0.9 or place[0] != "files"]
        *above, key = draw.choice(found)
        owner: Any = values
        for step in above:
            owner = owner[step]
        action = draw.choices(("nasty", "remove", "rename", "number", "other", "twice"), (6, 2, 1, 3, 2, 1))[0]
        if action == "remove":
            del owner[key]
        elif action == "rename" and isinstance(owner, dict):
            owner[f"{key}x"] = owner.pop(key)
        elif action == "number" and isinstance(owner[key], (int, float)) and not isinstance(owner[key], bool):
            owner[key] = draw.choice(
                (owner[key] + 1, owner[key] * 2, -owner[key], owner[key] * 10**6, 0, owner[key] / 3)
            )
        elif action == "other":
            other: Any = values
            for step in draw.choice(found):
                other = other[step] if not isinstance(other, list) or step < len(other) else None
                if other is None:
                    break
            owner[key] = json.loads(json.dumps(other))
        elif action == "twice" and isinstance(owner[key], (list, str)):
            owner[key] = owner[key] * 2
        else:
            owner[key] = draw.choice(NASTY)
        done.append(f"{action} {'.'.join(map(str, (*above, key)))}")
        found = list(places(values))
        if not found:
            break
    (work / "manifest.json").write_text(json.dumps(values))
    return ", ".join(done)


def text_of_manifest(draw: random.Random, work: Path, _: list[Path]) -> str:
    path = work / "manifest.json"
    if draw.random() < 0.5:
        text = path.read_text()
        at = draw.randrange(len(text))
        raw = draw.choice(RAW)
        colon = text.find(": ", at)
        end = text.find(",\n", colon)
        if 0 <= colon < end:
            path.write_text(f"{text[: colon + 2]}{raw}{text[end:]}")
        return f"{raw[:20]} at {at}"
    path.write_bytes(bytes_changed(draw, path.read_bytes()))
    return "bytes"


def plain_damage(draw: random.Random, work: Path, _: list[Path]) -> str:
    path = draw.choice(sorted(work.iterdir()))
    path.write_bytes(bytes_changed(draw, path.read_bytes()))
    return path.name


def bytes_changed(draw: random.Random, content: bytes) -> bytes:
    """Flip, cut, splice, repeat, empty or overwrite."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        if not data:
            break
        at = draw.randrange(len(data))
        length = draw.choice((1, 2, 4, 8, 64, 1024))
        action = draw.randrange(7)
        if action == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif action == 1:
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = draw.randbytes(length)
        elif action == 4:
            other = draw.randrange(len(data))
            data[at : at + length] = data[other : other + length]
        elif action == 5:
            data[at : at + 8] = struct.pack("<Q", draw.choice((0, 2**63, 2**64 - 1, 2**31, 10**12)))
        elif draw.random() < 0.1:
            del data[at:]
    return bytes(data)


def hostile_bytes(draw: random.Random, work: Path, _: list[Path]) -> str:
    """Change a file, and state its new digest."""
    path = draw.choice([path for path in sorted(work.iterdir()) if path.name != "manifest.json"])
    choice = draw.random()
    if choice < 0.1:
        path.write_bytes(b"")
    elif choice < 0.2:
        path.write_bytes(
            draw.choice((b"\xff\xd8\xff\xe0" + draw.randbytes(500), b"PK\x03\x04" + draw.randbytes(99), b"\0" * 999))
        )
    else:
        path.write_bytes(bytes_changed(draw, path.read_bytes()))
    seal_again(work)
    return path.name


def swapped(draw: random.Random, work: Path, bundles: list[Path]) -> str:
    """Take a file or the manifest of another bundle, with right digests."""
    other = draw.choice(bundles)
    source = draw.choice(sorted(other.iterdir()))
    target = draw.choice([path for path in sorted(work.iterdir()) if path.name != "manifest.json"])
    if source.name == "manifest.json":
        values = json.loads(source.read_text())
        own = manifest_of(work)
        for key in draw.sample(sorted(set(values) & set(own)), 3):
            own[key] = values[key]
        (work / "manifest.json").write_text(json.dumps(own))
        with contextlib.suppress(KeyError, AttributeError):
            seal_again(work)
        return f"three sections of {other.stem}"
    shutil.copyfile(source, target)
    seal_again(work)
    return f"{target.name} is {other.stem}/{source.name}"


def hostile_graph(draw: random.Random, work: Path, _: list[Path]) -> str:
    """Change the fields of an ONNX graph and keep it a well-formed protocol buffer."""
    graphs = sorted(work.glob("*.onnx"))
    if not graphs:
        return hostile_tensors(draw, work, [])
    path = draw.choice(graphs)
    content = path.read_bytes()
    with contextlib.suppress(ValueError, IndexError):
        for _i in range(draw.choice((1, 1, 2, 4))):
            content = message_changed(draw, content, depth=draw.choice((1, 2, 3, 3, 4, 5)))
    path.write_bytes(content)
    seal_again(work)
    return path.name


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("too long")


def encoded(value: int) -> bytes:
    out = bytearray()
    value &= 2**64 - 1
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def fields_of(data: bytes) -> list[tuple[int, int, Any]]:
    found: list[tuple[int, int, Any]] = []
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value: Any
            value, at = varint(data, at)
        elif wire == 2:
            length, at = varint(data, at)
            if at + length > len(data):
                raise ValueError("cut")
            value, at = data[at : at + length], at + length
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("group")
        found.append((number, wire, value))
    return found


def joined(fields: list[tuple[int, int, Any]]) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += encoded(number << 3 | wire)
        out += encoded(value) if wire == 0 else encoded(len(value)) + value if wire == 2 else value
    return bytes(out)


def message_changed(draw: random.Random, data: bytes, depth: int) -> bytes:
    """Go down some levels, then change, repeat, remove or move one field."""
    fields = fields_of(data)
    if not fields:
        return data
    inner = [i for i, (_, wire, value) in enumerate(fields) if wire == 2 and value]
    if depth > 0 and inner:
        # Weights are most of the bytes, and the least interesting.
        at = draw.choice(sorted(inner, key=lambda i: len(fields[i][2]))[-40:] if draw.random() < 0.5 else inner)
        try:
            below = message_changed(draw, fields[at][2], depth - 1)
        except (ValueError, IndexError):
            pass
        else:
            fields[at] = (fields[at][0], 2, below)
            return joined(fields)
    at = draw.randrange(len(fields))
    number, wire, value = fields[at]
    action = draw.choices(("value", "remove", "repeat", "move", "number"), (6, 2, 1, 1, 1))[0]
    if action == "remove":
        del fields[at]
    elif action == "repeat":
        fields += [fields[at]] * draw.choice((1, 2, 500))
    elif action == "move":
        fields.insert(draw.randrange(len(fields)), fields.pop(at))
    elif action == "number":
        fields[at] = (draw.choice((number + 1, number - 1 or 1, draw.randrange(1, 40))), wire, value)
    elif wire == 0:
        fields[at] = (number, 0, draw.choice((0, 1, 2, 3, 7, 16, 2**31, 2**32, 2**63, 2**64 - 1, value + 1, value * 2)))
    elif wire == 2:
        texts = (b"", b"x", b"\xff\xfe", b"../../x", b"Loop", b"If", b"MatMul", b"Reshape", b"com.microsoft", value * 2)
        fields[at] = (number, 2, draw.choice((*texts, bytes_changed(draw, value), bytes_changed(draw, value))))
    else:
        fields[at] = (number, wire, draw.randbytes(len(value)))
    return joined(fields)


def hostile_tensors(draw: random.Random, work: Path, _: list[Path]) -> str:
    """Change the header of a safetensors file and keep its length right."""
    files = sorted(work.glob("*.safetensors"))
    if not files:
        return hostile_bytes(draw, work, [])
    path = draw.choice(files)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    inner = (
        json.loads(header["__metadata__"]["quantizers"]) if "__metadata__" in header and draw.random() < 0.7 else None
    )
    values = header if inner is None else inner
    *above, key = draw.choice(list(places(values)))
    owner: Any = values
    for step in above:
        owner = owner[step]
    action = draw.randrange(4)
    if action == 0:
        del owner[key]
    elif action == 1:
        types = ("F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "I4", "C64")
        owner[key] = draw.choice(types) if key == "dtype" else draw.choice(NASTY)
    elif action == 2 and isinstance(owner[key], list):
        draw.shuffle(owner[key])
    else:
        owner[key] = draw.choice((0, 1, -1, 2**40, "uniform", "twin", "log", "shifted", "float8", [0, 0], [1, 1], None))
    if inner is not None:
        header["__metadata__"]["quantizers"] = json.dumps(inner)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    seal_again(work)
    return f"{path.name}: {'.'.join(map(str, (*above, key)))[:60]}"


# --- what a user does with a bundle


def use(path: Path) -> None:
    """Open a bundle, run it once, print what it is."""
    from vitfold.artifacts.bundle import holds_steps

    if holds_steps(path):
        use_steps(path)
        return
    import numpy as np
    from PIL import Image

    from vitfold.artifacts.bundle import open_bundle
    from vitfold.engines import open_session
    from vitfold.errors import EngineError
    from vitfold.serve.predictor import Predictor

    bundle = open_bundle(path)
    if bundle.manifest.target["engine"] == "tensorrt":  # there is no GPU: what is checked is that it says so
        with contextlib.suppress(EngineError), open_session(bundle, threads=1):
            pass
        engine: str | None = "onnxruntime"
    else:
        engine = None
    height, width = bundle.manifest.spec.image_size
    if height * width > 10**6 or bundle.manifest.preprocess.resize_size[0] > 4096:
        return  # believable, and no fault; but thousands of them would take long
    with Predictor(bundle, engine=engine, threads=1) as predictor:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
        for prediction in predictor([image, image]):
            prediction.top(3)


def use_steps(path: Path) -> None:
    from vitfold.artifacts.bundle import open_bundle
    from vitfold.diffusion.compare import SamplingConfig, check_asked, draw
    from vitfold.diffusion.opening import method_of, open_steps

    bundle = open_bundle(path, steps=True)
    manifest = bundle.manifest.steps
    plan = manifest.plan
    asked = SamplingConfig(labels=(0,), seed=0, steps=plan.steps, sampler=plan.sampler, guidance=plan.guidance, batch=1)
    check_asked(manifest, asked)
    method = method_of(manifest)
    with open_steps(bundle, 1) as executor:
        if plan.steps <= 16:
            draw(manifest, executor, method, asked)


# --- children


def child(seeds: Path, orders: int, answers: int) -> None:
    """Answer each case with one line: "works", "refused KIND", or "BUG" and a traceback."""
    from vitfold.errors import VitfoldError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, os.fdopen(orders) as lines:
        work = Path(folder) / "case.fold"
        for line in lines:
            done = "?"
            try:
                done = mutate(int(line), seeds, work)
                use(work)
                answer = f"works\t{done}"
            except VitfoldError as error:
                answer = f"refused {type(error).__name__}\t{done}\t{strange(str(error))}"
            except BaseException:
                answer = f"BUG\t{done}\t{traceback.format_exc()[-1500:]}"
            os.write(answers, (json.dumps(answer) + "\n").encode())


SIGNS = ("Error(", "Exception(", "Traceback", "object at 0x", "<class '", "UnicodeDecodeError", "NoneType")


def strange(message: str) -> str:
    """Return a message that no user should read: a Python repr, nothing, or pages."""
    found = [sign for sign in SIGNS if sign in message]
    return message[:400] if found or not message or len(message) > 3000 else ""


class Child:
    """A process that opens bundles one after the other."""

    def __init__(self, seeds: Path) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=self._run, args=(seeds, orders, answers), daemon=True)
        self._process.start()
        os.close(orders)
        os.close(answers)
        self._rest = b""

    def _run(self, seeds: Path, orders: int, answers: int) -> None:
        os.close(self._orders)
        os.close(self._answers)
        child(seeds, orders, answers)

    def ask(self, case: int) -> str | None:
        """Return the answer, None if the process died or hung: it is gone then."""
        os.write(self._orders, f"{case}\n".encode())
        ends = time.monotonic() + HANG_S
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                os.kill(self._process.pid or 0, signal.SIGKILL)
                self._process.join()
                self.close()
                return "HANG"
            content = os.read(self._answers, 65536)
            if not content:
                self._process.join()
                self.close()
                return None
            self._rest += content
        line, _, self._rest = self._rest.partition(b"\n")
        answer: str = json.loads(line)
        return answer

    @property
    def exitcode(self) -> int | None:
        return self._process.exitcode

    def close(self) -> None:
        for descriptor in (self._orders, self._answers):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._process.join()


def run(cases: range, seeds: Path, say: Callable[[str], None] = lambda _: None) -> collections.Counter[str]:
    """Open the bundles of all cases; return how often each answer came. Bugs are said as they come."""
    counts: collections.Counter[str] = collections.Counter()
    worker = Child(seeds)
    for number, case in enumerate(cases):
        answer = worker.ask(case)
        if answer is None or answer == "HANG":
            kind = "HANG" if answer else f"SIGNAL {-(worker.exitcode or 0)}"
            with tempfile.TemporaryDirectory() as folder:
                say(f"{kind}: case {case}: {mutate(case, seeds, Path(folder) / 'case.fold')}")
            counts[kind] += 1
            worker = Child(seeds)
            continue
        kind, _, rest = answer.partition("\t")
        if kind == "BUG":
            say(f"BUG: case {case}: {rest}")
        elif kind.startswith("refused") and rest.rpartition("\t")[2]:
            say(f"STRANGE: case {case}: {rest}")
            kind = "STRANGE"
        counts[kind] += 1
        if number % 1000 == 999:
            say(f"{number + 1} cases: {dict(counts)}")
    worker.close()
    return counts


def build_seeds_alone(folder: Path) -> None:
    from conftest import build_tiny_model

    build_seeds(folder, build_tiny_model)


def make_seeds(folder: Path) -> None:
    """Build the bundles in a process of its own: a parent of children must not have used a runtime."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=build_seeds_alone, args=(folder,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError("the bundles to mutate could not be made")


def warm() -> None:
    """Import what children need, once."""
    import vitfold.diffusion.bench
    import vitfold.diffusion.opening
    import vitfold.engines.simulation
    import vitfold.serve.predictor  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seeds", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="seeds-") as folder:
        seeds = arguments.seeds or Path(folder) / "seeds"
        if not seeds.exists():
            make_seeds(seeds)
        warm()
        began = time.monotonic()
        cases = range(arguments.start, arguments.start + arguments.count)
        counts = run(cases, seeds, lambda text: print(text, flush=True))
        print(f"{arguments.count} mutations in {time.monotonic() - began:.0f} s: {json.dumps(counts)}")
    sys.exit(1 if any(kind.startswith(("BUG", "HANG", "SIGNAL", "STRANGE")) for kind in counts) else 0)


if __name__ == "__main__":
    main()
