"""Peers of what came as a graph: an ONNX file itself, and modules that give more than a tensor."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import vitfold
from vitfold.artifacts.bundle import Bundle
from vitfold.bench.peers import load_original, open_peer
from vitfold.errors import EngineError, SourceError
from vitfold.sources import load_source

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("file") / "model.onnx"
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    names: Any = {"input_names": ["img"], "output_names": ["scores"]}
    axes = {"img": {0: "n"}, "scores": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, 3, 32, 32),), path, dynamo=False, dynamic_axes=axes, **names)
    return path


@pytest.fixture(scope="module")
def pixels() -> Any:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)


def saved(source: str, folder: Path, **options: Any) -> Bundle:
    return vitfold.save(vitfold.optimize(load_source(source, **options).model), folder / "a.fold")


def assert_peer_gives_the_same(bundle: Bundle, name: str, pixels: Any, folder: Path) -> None:
    manifest = bundle.manifest
    original = load_original(manifest.origin, manifest.spec.output)
    with vitfold.open(bundle.path) as fold, open_peer(name, original, (3, 32, 32), folder).session as session:
        np.testing.assert_allclose(session(pixels), fold.session(pixels), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_file_is_its_own_peer(name: str, file: Path, pixels: Any, tmp_path: Path) -> None:
    pytest.importorskip(name)
    assert_peer_gives_the_same(saved(str(file), tmp_path), name, pixels, tmp_path)


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "DINOv3ViTModel"])
def test_modules_that_give_more_than_a_tensor(name: str, kind: str, pixels: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig if kind.startswith("ViT") else transformers.DINOv3ViTConfig
    getattr(transformers, kind)(config(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path / "model")
    assert_peer_gives_the_same(saved(f"hf:{tmp_path / 'model'}", tmp_path), name, pixels, tmp_path)


def test_what_cannot_be_compared_is_refused(file: Path, tmp_path: Path) -> None:
    bundle = saved(str(file), tmp_path)
    origin, output = bundle.manifest.origin, bundle.manifest.spec.output
    with pytest.raises(EngineError, match="no module for the peer torch"):
        open_peer("torch", load_original(origin, output), (3, 32, 32), tmp_path)
    with pytest.raises(SourceError, match="gives first"):
        load_original(origin, "last_hidden_state")
    tokens = saved("timm:test_vit", tmp_path / "tokens", weights="random", outputs="tokens").manifest
    with pytest.raises(SourceError, match="gives first"):
        load_original(tokens.origin, tokens.spec.output)
    moved = {**origin, "source": str(tmp_path / "gone.onnx")}
    with pytest.raises(SourceError, match="is gone"):
        load_original(moved, output)
    changed = tmp_path / "changed.onnx"
    changed.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(SourceError, match="not the file any more"):
        load_original({**origin, "source": str(changed)}, output)
