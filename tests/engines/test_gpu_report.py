"""The report on a GPU, on the CPU: whatever does not need one to fail is found here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = "openvino diffusers open_clip nncf onnxscript tensorrt tensorrt_rtx cuda plotly torchao"


@pytest.mark.slow
def test_every_section_writes_its_file_on_a_bare_machine(tmp_path: Path) -> None:
    """With what a machine with a GPU has: other packages cannot be imported."""
    (tmp_path / "site").mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT.split())]
    (tmp_path / "site" / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "examples" / "gpu_report.py"), "--device", "cpu", "--seconds", "1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "results")],
        env={**os.environ, "PYTHONPATH": path, "VITFOLD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("gpu-*.json")}
    sections = ["accuracy", "contract", "dit", "end-to-end", "lengths", "profile", "vit-b16"]
    assert sorted(found) == [f"gpu-{name}" for name in sections]
    assert all(document["rows"] for document in found.values())
    assert found["gpu-contract"]["rows"][0]["passed"]
    assert found["gpu-accuracy"]["rows"][0]["from_cpu"] < 1e-4
    ends = {row["name"]: row for row in found["gpu-end-to-end"]["rows"]}
    subjects = ["torch-fp32", "torch-compile-fp16", "fp16-r0"]
    assert list(ends) == [
        *subjects,
        *(f"{name}, resized on the device" for name in subjects),
        "decoding alone",
        *(f"{name}, stream" for name in subjects),
    ]
    assert not [row for row in ends.values() if "error" in row]
    assert all(row["faster_than_torch-fp32"] for name, row in ends.items() if name != "decoding alone")
    timed = {row["name"]: row for row in found["gpu-vit-b16"]["rows"]}
    assert not [row for row in timed.values() if "error" in row]
    assert {"torch-compile-fp16", "fp16-r0", "int8-r0"} <= set(timed)
    assert set(found["gpu-vit-b16"]["blocks"]["schedules"]) == {"r0", "r8"}, "for `vitfold forecast --measured`"
