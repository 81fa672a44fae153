"""Source strings, files, seeds, origins, and messages for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from zoo import randomize, tiny_hf

from vitfold.errors import SourceError
from vitfold.sources import demo_folder, load_source
from vitfold.sources import timm as timm_source

SALIENCY = Path(__file__).parents[3] / "shared" / "fixtures" / "dinov2_small_saliency.safetensors"
ARCH = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of vit_tiny weights with 5 classes for 64-pixel images."""
    import timm

    torch.manual_seed(1)
    module = timm.create_model(ARCH, num_classes=5, img_size=64)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(module.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """A folder of a tiny ViT classifier with three named classes."""
    names = {0: "cat", 1: "dog", 2: "bird"}
    module = tiny_hf(
        hf.ViTForImageClassification, hf.ViTConfig, id2label=names, label2id={v: k for k, v in names.items()}
    )
    folder = tmp_path_factory.mktemp("hf")
    randomize(module).save_pretrained(folder)
    return folder


def test_importing_sources_imports_no_torch():
    code = "import sys, vitfold.sources; print([m for m in ('torch', 'timm', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_random_weights_depend_on_the_seed_only():
    state = torch.random.get_rng_state()
    one, two, other = (
        load_source(f"timm:{ARCH}", weights="random", seed=seed, num_classes=5, image_size=64).model
        for seed in (3, 3, 4)
    )
    assert one.digest() == two.digest() != other.digest()
    assert torch.equal(state, torch.random.get_rng_state())
    assert one.labels is None
    assert (one.spec.image_size, one.spec.outputs, one.preprocess.crop_size) == ((64, 64), 5, (64, 64))


def test_origin_loads_the_same_model_again(weights_file):
    loaded = load_source(str(weights_file), arch=ARCH)
    origin = loaded.model.origin
    arguments = {name: value for name, value in origin.arguments.items() if name != "sha256"}
    assert len(origin.arguments["sha256"]) == 64
    assert Path(origin.source).is_absolute()
    assert load_source(origin.source, **arguments).model.digest() == loaded.model.digest()
    assert json.loads(json.dumps(origin.to_dict())) == origin.to_dict()
    assert not loaded.original.training


def test_file_says_its_classes_and_image_size_itself(weights_file):
    spec = load_source(str(weights_file), arch=ARCH).model.spec
    assert (spec.outputs, spec.image_size) == (5, (64, 64))


def test_file_positions_are_resampled(weights_file):
    model = load_source(str(weights_file), arch=ARCH, image_size=96).model
    assert model.params["pos_embed"].shape == (1, 37, 192)
    saved = load_file(weights_file)["pos_embed"].numpy()
    assert np.array_equal(model.params["pos_embed"][:, 0], saved[:, 0])
    assert model.preprocess.crop_size == (96, 96)


@pytest.mark.skipif(not SALIENCY.is_file(), reason="needs ../shared/fixtures")
def test_dinov2_file_of_518_pixels_loads_at_224():
    model = load_source(str(SALIENCY), arch="vit_small_patch14_dinov2", image_size=224).model
    assert model.params["pos_embed"].shape == (1, 257, 384)
    assert model.spec.output == "image_embeds"


@pytest.mark.skipif(not (demo_folder() / "model.safetensors").is_file(), reason="needs assets/demo/model.safetensors")
def test_demo_brings_labels_and_preprocessing():
    model = load_source("demo").model
    assert model.labels is not None
    assert model.labels[:2] == ("airplane", "automobile")
    assert (model.preprocess.resize, model.preprocess.resize_size) == ("exact", (112, 112))


def test_demo_folder_can_be_moved_and_missing_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv("VITFOLD_DEMO", str(tmp_path))
    assert demo_folder() == tmp_path
    with pytest.raises(SourceError, match="VITFOLD_DEMO"):
        load_source("demo")


def test_hf_folder_brings_labels_and_digest(hf_folder):
    loaded = load_source(f"hf:{hf_folder}")
    assert loaded.model.labels == ("cat", "dog", "bird")
    assert loaded.model.origin.source == f"hf:{hf_folder}"
    assert len(loaded.model.origin.arguments["sha256"]) == 64
    assert loaded.model.preprocess.crop_size == (32, 32)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (hf.ViTForImageClassification, hf.ViTConfig),
        (hf.DeiTModel, hf.DeiTConfig),
        (hf.Dinov2Model, hf.Dinov2Config),
        (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig),
        (hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig),
        (hf.SiglipVisionModel, hf.SiglipVisionConfig),
    ],
)
def test_hf_image_size_resamples_positions(model, config, tmp_path):
    randomize(tiny_hf(model, config)).save_pretrained(tmp_path)
    loaded = load_source(f"hf:{tmp_path}", image_size=48).model
    assert loaded.spec.image_size == (48, 48)
    assert loaded.params["pos_embed"].shape[1] == loaded.spec.tokens
    assert loaded.preprocess.crop_size == (48, 48)


def test_hf_checkpoint_without_the_head_is_refused(tmp_path):
    tiny_hf(hf.ViTModel, hf.ViTConfig).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["ViTForImageClassification"]}))
    with pytest.raises(SourceError, match=r"lack .*classifier"):
        load_source(f"hf:{tmp_path}")


def test_hf_random_weights_need_a_config_only(tmp_path):
    tiny_hf(hf.Dinov2ForImageClassification, hf.Dinov2Config).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Dinov2ForImageClassification"]}))
    model = load_source(f"hf:{tmp_path}", weights="random", num_classes=7).model
    assert (model.spec.outputs, model.spec.pool, model.labels) == (7, "token_avg", None)


def test_torchvision_random_head_is_not_zero():
    model = load_source("torchvision:vit_b_32", weights="random", image_size=64, num_classes=4).model
    assert model.params["head.weight"].any()
    assert (model.preprocess.resize_size, model.preprocess.crop_size) == ((73, 73), (64, 64))


BAD = {
    "unknown prefix": ("tim:vit_tiny_patch16_224", {}, "did you mean timm"),
    "no prefix": ("vit_tiny_patch16_224", {}, "timm:vit_tiny_patch16_224"),
    "no name": ("timm:", {}, "names no model"),
    "unknown timm": ("timm:vit_tiny_patch16_223", {}, "did you mean .*vit_tiny_patch16_224"),
    "unknown timm weights": (f"timm:{ARCH}.augreg_in1", {}, "did you mean .*augreg"),
    "unknown torchvision": ("torchvision:vit_b_17", {}, "did you mean .*vit_b_16"),
    "unknown torchvision weights": ("torchvision:vit_b_16/V9", {}, "IMAGENET1K_V1"),
    "unknown open_clip": ("open_clip:ViT-B-31", {}, "did you mean .*ViT-B-32"),
    "unknown open_clip weights": ("open_clip:ViT-B-32/openaj", {}, "did you mean openai"),
    "many open_clip weights": ("open_clip:ViT-B-32", {}, "open_clip:ViT-B-32/openai"),
    "no classes": ("open_clip:ViT-B-32", {"num_classes": 3}, "no classifier"),
    "new head": (f"timm:{ARCH}", {"num_classes": 3}, "would be random"),
    "new torchvision head": ("torchvision:vit_b_16", {"num_classes": 3}, "would be random"),
    "missing file": ("/nowhere/model.safetensors", {"arch": ARCH}, "no file /nowhere"),
    "missing folder": ("hf:/nowhere", {}, "no folder /nowhere"),
    "pickle": ("/nowhere/model.pth", {}, "pickle"),
    "random file": ("model.safetensors", {"weights": "random"}, "does not go with the file"),
    "arch with zoo": (f"timm:{ARCH}", {"arch": ARCH}, "leave it out"),
    "negative size": (f"timm:{ARCH}", {"image_size": 0}, "HEIGHTxWIDTH"),
    "odd size": (f"timm:{ARCH}", {"image_size": 100, "weights": "random"}, "multiple of the patch size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_cure(name):
    source, options, match = BAD[name]
    with pytest.raises(SourceError, match=match):
        load_source(source, **options)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(SourceError, match="hf:"):
        load_source(str(tmp_path))


def test_damaged_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(SourceError, match="not a readable safetensors file"):
        load_source(str(path), arch=ARCH)


def test_file_without_arch(weights_file):
    with pytest.raises(SourceError, match="--arch"):
        load_source(str(weights_file))


def test_wrong_keys_are_named(weights_file, tmp_path):
    state = load_file(weights_file)
    state["blocks.0.attn.wrong"] = state.pop("blocks.0.attn.qkv.bias")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match=r"missing \['blocks\.0\.attn\.qkv\.bias'\].*unexpected.*attn\.wrong"):
        load_source(str(tmp_path / "w.safetensors"), arch=ARCH)


def test_wrong_head_suggests_num_classes(weights_file):
    with pytest.raises(SourceError, match=r"head.* \(5.*--num-classes"):
        load_source(str(weights_file), arch=ARCH, num_classes=6)


def test_wrong_arch_is_explained(weights_file):
    with pytest.raises(SourceError, match="check --arch vit_small"):
        load_source(str(weights_file), arch="vit_small_patch16_224")


def test_nan_in_a_file_is_named(weights_file, tmp_path):
    state = load_file(weights_file)
    state["blocks.3.norm1.weight"][2] = float("nan")
    save_file(state, tmp_path / "n.safetensors")
    with pytest.raises(SourceError, match=r"blocks\.3\.norm1\.weight holds 1 values"):
        load_source(str(tmp_path / "n.safetensors"), arch=ARCH)


def test_sidecar_keys_are_checked(weights_file, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_bytes(weights_file.read_bytes())
    path.with_suffix(".json").write_text('{"arhc": "x"}')
    with pytest.raises(SourceError, match="did you mean arch"):
        load_source(str(path))
    path.with_suffix(".json").write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        load_source(str(path))


def test_no_network_says_what_to_do_instead(monkeypatch):
    import timm

    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("cannot reach the hub")
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(SourceError, match=r"cannot reach the hub.*--arch.*--weights random") as caught:
        timm_source.build(ARCH, num_classes=None, image_size=None, pretrained=True)
    assert isinstance(caught.value.__cause__, OSError)


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SourceError, match=r"vitfold\[torchvision\]"):
        load_source("torchvision:vit_b_16")
