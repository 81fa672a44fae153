"""`vitfold forecast --lengths` and `--measured`: numbers of tokens on GPUs that are not here; no compiler is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from invoking import error, run, run_json, saved_vit


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A model of 17 tokens in a file."""
    return saved_vit(tmp_path_factory.mktemp("larger") / "larger.safetensors", image_size=64)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """What the report on a GPU writes, with times that grow by the tokens."""
    rows: list[dict[str, Any]] = [
        {"tokens": n, "batch": 128, "ms": {"qkv-fp16": 0.001 * n, "attention-fp16": 0.0005 * n}} for n in (197, 128)
    ]
    environment = {"device": "cuda", "gpu": "NVIDIA A100-SXM4-80GB", "multiprocessors": 108}
    path = tmp_path / "gpu-lengths.json"
    path.write_text(json.dumps({"environment": environment, "width": 768, "heads": 12, "rows": rows}))
    return path


def test_lengths_are_modelled_for_every_gpu_and_batch(larger: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--lengths", "17,13,16", "--gpus", "A100,L4", "--batches", "1,64")
    found = run_json("forecast", *larger, *options, "-o", tmp_path / "lengths.json")
    assert found == json.loads((tmp_path / "lengths.json").read_text())
    assert found["prediction"].endswith("not a measurement")
    assert list(found["model"]["gpus"]) == ["A100", "L4"]
    rows = found["lengths"]
    assert [(row["gpu"], row["batch"], row["tokens"]) for row in rows] == [
        (gpu, batch, tokens) for gpu in ("A100", "L4") for batch in (1, 64) for tokens in (17, 16, 13)
    ]
    for row in rows:
        assert 0 < row["work_ratio"] <= 1
        assert 0 < row["ratio"] <= 1
        assert [product["name"] for product in row["products"]] == [
            "attn.qkv", "attn", "attn.proj", "mlp.fc1", "mlp.fc2",
        ]  # fmt: skip
    printed = run("forecast", *larger, *options).stdout
    assert "17 tokens" in " ".join(printed.split())
    assert "not a measurement" in printed


def test_one_length_shows_its_tiles(larger: tuple[str, ...]) -> None:
    printed = run("forecast", *larger, "--lengths", "17", "--gpus", "H100", "--batches", 1).stdout
    assert "132 multiprocessors" in printed
    assert "17x192x64" in printed


def test_measured_times_stand_beside_the_model(measured: Path) -> None:
    found = run_json("forecast", "--measured", measured)
    assert found["gpu"] == "A100"
    assert [(row["product"], row["tokens"]) for row in found["measured"]] == [
        ("qkv-fp16", 197), ("qkv-fp16", 128), ("attention-fp16", 197), ("attention-fp16", 128),
    ]  # fmt: skip
    printed = " ".join(run("forecast", "--measured", measured).stdout.split())
    assert "measured on NVIDIA A100-SXM4-80GB" in printed
    assert "0.650" in printed, "128 of 197 tokens"


def test_a_processor_is_no_gpu(measured: Path) -> None:
    document = json.loads(measured.read_text())
    document["environment"] = {"device": "cpu", "processor": "any"}
    measured.write_text(json.dumps(document))
    assert "measured on cpu: the model's constants are of GPUs" in error("forecast", "--measured", measured)


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        ((), "give --images DIR, or --lengths", 2),
        (("--lengths", "a:b"), "takes A:B, as 176:196", 1),
        (("--lengths", "5,18"), "numbers of tokens from 1 to 17", 1),
        (("--lengths", "5:4"), "numbers of tokens from 1 to 17", 1),
        (("--lengths", "5", "--gpus", "A101"), "no peaks are known of the GPU 'A101'", 1),
        (("--lengths", "5", "--gpus", ","), "name GPUs", 2),
        (("--lengths", "5", "--batches", "x"), "give batches as a list", 2),
        (("--lengths", "5", "--target", "cpu"), "times on GPUs need a target of TensorRT", 1),
        (("--lengths", "5", "--target", "tensorrt-fp8", "--gpus", "A100"), "none of A100 runs tensorrt-fp8", 1),
        (("--measured", "none.json"), "give no SOURCE, --images", 2),
        (("--lengths", "5", "--images", "."), "lengths need no images", 2),
    ],
)
def test_what_cannot_be_is_said(larger: tuple[str, ...], arguments: tuple[str, ...], told: str, code: int) -> None:
    assert told in error("forecast", *larger, *arguments, code=code)


def test_a_source_or_a_file_is_needed(tmp_path: Path) -> None:
    assert "give a model, or --measured FILE" in error("forecast", code=2)
    assert "cannot read" in error("forecast", "--measured", tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"environment": {"gpu": "NVIDIA H200"}}')
    assert "nothing in this file to compare with" in error("forecast", "--measured", tmp_path / "other.json")
