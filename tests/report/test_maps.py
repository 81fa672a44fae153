"""Maps: how they are judged, which outputs are some, and their pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import vitfold
from vitfold.bench.fidelity import measure_fidelity, overlap
from vitfold.cli.app import app
from vitfold.errors import VitfoldError
from vitfold.report.tables import columns, fidelity_lines
from vitfold.serve.predictor import Prediction

pytest.importorskip("plotly")
from vitfold.report.maps import Mapped, map_strips

SIDE, CLASSES = 32, 3


class Dense(nn.Module):
    """A convolution, an attention, and a map as large as the image."""

    def __init__(self, channels: int, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.head, self.name = nn.Conv2d(16, channels, 1), name

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = (x + self.proj(y)).transpose(1, 2).unflatten(2, (SIDE // 8, SIDE // 8))
        return {self.name: nn.functional.interpolate(self.head(x), scale_factor=8.0)}


def adapted(channels: int, name: str, **options: Any) -> vitfold.Model:
    return vitfold.adapt(Dense(channels, name).eval(), image_size=(SIDE, SIDE), **options)


@pytest.mark.parametrize(
    ("channels", "name", "head"),
    [(1, "depth", "map"), (CLASSES, "logits", "segmentation"), (CLASSES, "feature_map", "features")],
)
def test_outputs_that_are_maps_are_known_by_shape_and_name(channels: int, name: str, head: str) -> None:
    assert adapted(channels, name).spec.head == head


def test_the_user_may_say_it() -> None:
    assert adapted(CLASSES, "feature_map", problem="segmentation").spec.head == "segmentation"
    with pytest.raises(VitfoldError, match="an output of a graph"):
        vitfold.load("timm:test_vit", weights="random", problem="map")


def test_overlap_by_hand() -> None:
    expected, found = np.zeros((1, 3, 1, 4)), np.zeros((1, 3, 1, 4))
    for place, kind in enumerate((0, 0, 1, 1)):
        expected[0, kind, 0, place] = 1
    for place, kind in enumerate((0, 1, 1, 2)):
        found[0, kind, 0, place] = 1
    # Class 0: one pixel of two in common. Class 1: one of three. Class 2 is none of the reference's.
    assert overlap(found, expected) == pytest.approx((0.5, (1 / 2 + 1 / 3) / 2))


def test_what_is_measured_of_maps() -> None:
    draw = np.random.default_rng(0)
    expected = draw.standard_normal((2, CLASSES, 8, 8))
    kinds = {
        head: measure_fidelity(
            expected * 1.1, targets=None, reference=expected, reference_name="original", head=head
        ).to_dict()
        for head in ("map", "segmentation")
    }
    assert kinds["map"]["relative_error"] == pytest.approx(0.1)
    assert kinds["map"]["agreement"] is None
    assert (kinds["segmentation"]["agreement"], kinds["segmentation"]["miou"]) == (1.0, 1.0)
    assert [name for name, _ in fidelity_lines(kinds["map"], head="map")] == ["error", "cosine", "SQNR"]
    shown = [name for name, _ in fidelity_lines(kinds["segmentation"], head="segmentation")]
    assert shown == ["agreement", "mIoU", "cosine", "SQNR"]
    assert "mIoU %" in columns([{"fidelity": kinds["segmentation"]}])
    assert "error %" in columns([{"fidelity": kinds["map"]}])


def picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_pictures_show_where_maps_differ() -> None:
    expected = np.tile(np.linspace(0, 1, SIDE), (1, SIDE, 1))
    found = expected.copy()
    found[0, : SIDE // 2] = 1 - found[0, : SIDE // 2]
    photos = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    (strip,) = map_strips(
        Mapped(title="a", names=("x.png",), photos=photos, expected=expected, found=found, head="map")
    )
    photo, theirs, ours, apart = (picture(tile.url).astype(int) for tile in strip.tiles)
    half = len(photo) // 2
    assert np.abs(theirs[half + 8 :] - ours[half + 8 :]).max() < 12, "JPEG alone"
    assert np.abs(theirs[: half - 8, :8] - ours[: half - 8, :8]).max() > 60
    assert apart[: half - 8, :8].sum() > apart[half + 8 :, :8].sum() * 1.5, "bright where they differ"
    assert any("error" in line for line in strip.tiles[2].lines)


def test_classes_of_pixels_by_their_share() -> None:
    output = np.zeros((CLASSES, 2, 2))
    output[2, :, 0] = output[1, 0, 1] = output[0, 1, 1] = 1
    prediction = Prediction(output=output, labels=("sky", "road", "car"), head="segmentation")
    assert prediction.shares() == [("car", 0.5), ("sky", 0.25), ("road", 0.25)]
    with pytest.raises(VitfoldError, match="map of classes"):
        prediction.top()
    with pytest.raises(VitfoldError, match="no segmentation"):
        Prediction(output=output, labels=None, head="map").shares()


@pytest.mark.parametrize(("channels", "name"), [(1, "depth"), (CLASSES, "logits")], ids=["map", "segmentation"])
def test_commands_show_them(channels: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path(__file__).read_text(encoding="utf-8")
    (tmp_path / "dense.py").write_text(
        "import torch\nfrom torch import nn\nSIDE = 32\n"
        + lines[lines.index("class Dense") : lines.index("def adapted")]
        + f"\ndef build():\n    return Dense({channels}, {name!r}).eval()\n"
    )
    photos = tmp_path / "photos"
    photos.mkdir()
    draw = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return done.output

    run("optimize", "dense.py:build", "--image-size", str(SIDE), "--quant", "w8a8", "--keep-slower",
        "--images", "photos", "-o", "a.fold")  # fmt: skip
    assert ("mIoU" if channels > 1 else "error") in run("evaluate", "a.fold", "--images", "photos")
    assert ("%" if channels > 1 else "from") in run("predict", "a.fold", "photos/0.png")
    run("bench", "a.fold", "--images", "photos", "--trials", "1", "--seconds", "0.1", "-o", "results/b.json")
    run("report", "results", "-o", "page.html", "--pictures", "a.fold", "--images", "photos", "--photos", "2")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Maps: a" in page
    assert page.count("data:image/jpeg") == 8
