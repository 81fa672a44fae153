"""On a processor that looks as if it ended at AVX2: what is chosen there, and that its integer products are exact.

Where integer products of pairs saturate, an engine that is told to multiply 8-bit weights computes wrong values.
The kernels that run here are those of such a processor (see avx2.c).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "avx2.c"
IMAGES = Path(__file__).parents[2] / "assets" / "demo" / "images"
CANNOT_TRAP = 97


@pytest.fixture(scope="module")
def avx2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which programs see AVX2 only, with a cache of its own."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        pytest.skip("needs Linux on x86-64 and a C compiler")
    folder = tmp_path_factory.mktemp("avx2")
    library = folder / "avx2.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True, timeout=60)
    own = {"VITFOLD_CACHE": str(folder / "cache"), "VITFOLD_RACE_SECONDS": "0.01"}
    environment = {**os.environ, "LD_PRELOAD": str(library), **own}
    if subprocess.run([sys.executable, "-c", ""], check=False, env=environment, timeout=60).returncode == CANNOT_TRAP:
        pytest.skip("this machine cannot trap CPUID")
    return environment


def run(code: str, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_wider_instructions_are_seen_and_the_name_says_so(avx2: dict[str, str]) -> None:
    found = run("import json; from vitfold.processor import processor; print(json.dumps(processor()))", avx2)
    sets = found["instruction_sets"]
    assert isinstance(sets, list)
    assert not [name for name in sets if name.startswith(("avx512", "avx_vnni", "amx"))]
    assert str(found["name"]).endswith("AVX-512, VNNI and AMX hidden")


def test_a_fault_of_a_program_is_still_its_end(avx2: dict[str, str]) -> None:
    for options in ([], ["-X", "faulthandler"]):
        code = "import ctypes; ctypes.string_at(8)"
        done = subprocess.run(
            [sys.executable, *options, "-c", code], check=False, env=avx2, capture_output=True, timeout=60
        )
        assert done.returncode == -11
        assert (b"Segmentation fault" in done.stderr) == bool(options)


def test_products_of_8_bit_weights_saturate_there_and_7_bit_ones_are_exact(avx2: dict[str, str]) -> None:
    """The probes run in the kernels that MLAS has for AVX2, and what is chosen is exact by them."""
    code = """
import json
from vitfold.engines import quantized_target
from vitfold.engines.exactness import is_exact
from vitfold.products import products_of
from vitfold.target import find_target
found = {}
for name in ("cpu-vnni", "cpu-avx2"):
    target = find_target(name)
    products = products_of(target.to_dict(), weight_bits=8, attention=True)
    found[name] = all(is_exact("onnxruntime", one) for one in products)
found["chosen"] = quantized_target("onnxruntime").name
print(json.dumps(found))
"""
    assert run(code, avx2) == {"cpu-vnni": False, "cpu-avx2": True, "chosen": "cpu-avx2"}


@pytest.mark.slow
def test_a_bundle_that_is_made_there_keeps_its_answers_there(avx2: dict[str, str], tmp_path: Path) -> None:
    """`verify` runs the bundle's graph beside the outputs that were kept when it was made."""

    def vitfold(*arguments: object) -> str:
        command = [sys.executable, "-m", "vitfold", *map(str, arguments)]
        done = subprocess.run(command, check=False, env=avx2, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    bundle = tmp_path / "a.fold"
    quantized = ("--quant", "w8a8", "--method", "minmax", "--calibration-size", 8, "--images", IMAGES)
    vitfold("optimize", "demo", *quantized, "--keep-slower", "-o", bundle)
    assert json.loads(vitfold("inspect", bundle, "--json"))["target"]["name"] == "cpu-avx2"
    vitfold("verify", bundle)
