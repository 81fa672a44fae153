"""`vitfold diffusion sample` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoking import DEMO, error, run, run_json
from PIL import Image

from diffusing import write_folder
from vitfold.model import Array

QUICK = ("--steps", "5", "--trials", "1", "--classes", "2,0,1", "--batch", "2")
MANY = ("--steps", "4", "--trials", "1", "--classes", "2,0,1", "--count", "30", "--batch", "10")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"hf:{write_folder(tmp_path_factory.mktemp('dit'))}"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty demo images, the least that a distance is taken of."""
    made = tmp_path_factory.mktemp("real")
    for i, path in enumerate(sorted((DEMO / "images").glob("*/*"))[::7][:30]):
        shutil.copy(path, made / f"{i:02}{path.suffix}")
    return made


def pixels_of(path: Path) -> Array:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_images_a_sheet_and_a_table(source: str, tmp_path: Path) -> None:
    found = run_json("diffusion", "sample", source, *QUICK, "--reuse", "taylor:2:1", "-o", tmp_path / "images")
    assert [row["name"] for row in found["rows"]] == ["none", "taylor:2:1", "none, 4 steps"]
    row: dict[str, Any] = found["rows"][1]
    assert row["seconds_per_image"] > 0
    assert row["speedup"] > 0
    assert row["reused_step_ratio"] > 0
    assert 0 < row["reused_work_ratio"] < 0.2
    assert found["rows"][0]["reused_work_ratio"] is None
    assert 0 < row["ssim"] < 1
    assert row["psnr_db"] > 0
    assert (row["frechet"], row["full_steps"], row["reused_steps"]) == (None, 4, 1)
    assert (row["frechet_noise"], row["frechet_rise"], row["class_accuracy_interval"]) == (None, None, None)
    assert len(found["measurements"][1]["trials_ns"][0]) == 1
    names = sorted(path.name for path in (tmp_path / "images" / "taylor-2-1").iterdir())
    assert names == ["0000-class-2.png", "0001-class-0.png", "0002-class-1.png"]
    pixels = pixels_of(tmp_path / "images" / "none" / names[0])
    assert pixels.shape == (16, 16)
    assert np.ptp(pixels) > 0
    assert pixels_of(tmp_path / "images" / "sheet.png").shape[1] > 3 * 64
    assert json.loads((tmp_path / "images" / "diffuse.json").read_text(encoding="utf-8")) == found
    again = run(
        "diffusion", "sample", source, *QUICK, "--reuse", "stack", "--engine", "torch", "-o", tmp_path / "again"
    )
    assert "stack:2" in again.stdout
    first, second = (tmp_path / folder / "none" / names[1] for folder in ("images", "again"))
    np.testing.assert_allclose(pixels_of(first), pixels_of(second), atol=2)


def test_compressed_steps_stand_beside_plain_ones(source: str) -> None:
    arguments = ("--classes", "1", "--reuse", "stack:2", "--merge", "4", "--quant", "w8a8")
    found = run_json("diffusion", "sample", source, *QUICK, *arguments)
    names = ["none", "none, r=4, w8a8", "stack:2, r=4, w8a8", "none, 4 steps"]
    assert [row["name"] for row in found["rows"]] == names
    assert (found["merge"], found["quant"]) == (4, "w8a8")


def test_a_distance_to_real_images_by_a_model_of_choice(source: str, real: Path) -> None:
    found = run_json(
        "diffuse", source, *MANY, "--engine", "torch", "--reuse", "stack:2", "--real", real, "--features", "demo"
    )
    row = found["rows"][0]
    assert row["frechet"] > 0
    assert row["frechet_reason"] is None
    assert row["class_accuracy"] is None
    assert row["class_accuracy_interval"] is None
    assert row["frechet_noise"] > 0
    assert row["frechet_rise"] == {"rise": 0, "low": 0, "high": 0}
    fewer = found["rows"][1]
    assert fewer["frechet_rise"]["rise"] == pytest.approx(fewer["frechet"] - row["frechet"])
    assert fewer["frechet_rise"]["low"] < fewer["frechet_rise"]["rise"] < fewer["frechet_rise"]["high"]
    assert found["features"] == "demo"
    assert "give both --real DIR and --features" in error("diffusion", "sample", source, "--real", real, code=2)


def write_judge(folder: Path) -> Path:
    """A random classifier of as many classes as the generator has, as timm reads it."""
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"architecture": "test_vit", "num_classes": 3, "model_args": {"img_size": 32}}
    pixels = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 3}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pixels}), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", num_classes=3, img_size=32).state_dict(), folder / "model.safetensors")
    return folder


def test_a_judge_beside_the_weights_is_taken_by_itself(source: str, real: Path, tmp_path: Path) -> None:
    for name in ("transformer", "scheduler"):
        (tmp_path / name).symlink_to(Path(source.partition(":")[2]) / name)
    judge = write_judge(tmp_path / "judge")
    torch_engine, features = (*MANY, "--engine", "torch"), ("--features", f"timm:local-dir:{judge}")
    given = run_json("diffusion", "sample", source, *torch_engine, *features, "--real", real, "-o", tmp_path / "out")
    assert "no such folder" in error("diffusion", "sample", f"hf:{tmp_path}", *torch_engine)
    (tmp_path / "out" / "real.safetensors").rename(judge / "real.safetensors")
    found = run_json("diffusion", "sample", f"hf:{tmp_path}", *torch_engine, "-o", tmp_path / "again")
    assert found["features"] == f"hf:{tmp_path}/judge"
    assert not (tmp_path / "again" / "real.safetensors").exists()
    for key in ("frechet", "frechet_noise", "class_accuracy", "class_accuracy_interval"):
        assert found["rows"][0][key] == given["rows"][0][key] is not None
    assert "class %" in run("diffusion", "sample", f"hf:{tmp_path}", *torch_engine).stdout
    other = run_json("diffusion", "sample", f"hf:{tmp_path}", *torch_engine, "--real", real)
    assert other["rows"][0]["frechet"] == given["rows"][0]["frechet"]
    assert "features by another model than demo" in error(
        "diffusion", "sample", f"hf:{tmp_path}", *QUICK, "--features", "demo"
    )
    alone = run_json("diffusion", "sample", f"hf:{tmp_path}", *QUICK, "--classes", "1", "--engine", "torch")
    assert alone["rows"][0]["frechet"] is None
    assert "at least 30 real images and 30 drawn" in alone["rows"][0]["frechet_reason"]
    assert alone["rows"][0]["class_accuracy"] in (0, 1)


def test_auto_names_what_it_chose(source: str) -> None:
    found = run_json("diffusion", "sample", source, *QUICK, "--classes", "1", "--engine", "torch", "--reuse", "auto")
    assert found["chosen"] in {row["reuse"] for row in found["rows"]}


def test_latents_without_their_vae(source: str, tmp_path: Path) -> None:
    folder = Path(source.partition(":")[2])
    for name in ("transformer", "scheduler"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}', encoding="utf-8")
    assert "makes latents, and the VAE" in error("diffusion", "sample", f"hf:{tmp_path}", *QUICK)
    found = run_json(
        "diffusion", "sample", f"hf:{tmp_path}", *QUICK, "--latents", "-o", tmp_path / "out", "--engine", "torch"
    )
    assert found["rows"][0]["ssim"] is None
    with np.load(tmp_path / "out" / "latents.npz") as held:
        assert held["none"].shape == (3, 1, 16, 16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_latents_become_images_by_the_vae(source: str, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = Path(source.partition(":")[2])
    for name in ("transformer", "scheduler"):
        (tmp_path / name).symlink_to(folder / name)
    tiny = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 1, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    diffusers.AutoencoderKL(**tiny, **blocks).save_pretrained(tmp_path / "vae")
    run("diffusion", "sample", f"hf:{tmp_path}", *QUICK, "-o", tmp_path / "out", "--engine", "torch")
    assert pixels_of(tmp_path / "out" / "none" / "0000-class-2.png").shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (("--reuse", "tailor"), "did you mean taylor", 1),
        (("--steps", "0"), "--steps 0 is out of range", 1),
        (("--classes", "3"), "class 3 is out of range; this model has 3 classes", 1),
        (("--classes", "shirt"), "--classes are numbers, names or all, found 'shirt'; this model has no names", 1),
        (("--sampler", "euler"), "unknown sampler", 1),
        (("--merge", "99"), "16 tokens can merge 0 to 8", 1),
        (("--quant", "w4a4"), "w4a4 does not run: integer kernels take activations of 8 bits", 1),
        (("--engine", "openvino"), "'openvino' is not one of", 2),
        (("--heads", "2"), "--heads 2 belongs to a file", 1),
    ],
    ids=str,
)
def test_what_is_refused(source: str, arguments: tuple[str, ...], said: str, code: int) -> None:
    assert said in error("diffusion", "sample", source, *arguments, code=code)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no folder" in error("diffusion", "sample", f"hf:{tmp_path}/nowhere")
