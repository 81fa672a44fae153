"""Modules of classes that no reader knows are read as graphs, by what they compute for an image."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as hf
from torch import nn
from zoo import randomize

import vitfold
from vitfold.errors import RecipeError, SourceError
from vitfold.model import GraphSpec
from vitfold.sources import load_source

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 32, "patch_size": 8}


class Mine(nn.Module):
    """A backbone in somebody's class, with two heads."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.backbone = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
        )
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, image):
        x = self.backbone(image)
        return {"logits": self.head(x), "features": x, "note": "not a tensor"}


@pytest.fixture(scope="module")
def mine():
    torch.manual_seed(0)
    return Mine()


def test_a_module_of_ones_own_becomes_a_bundle_with_all_its_outputs(mine, tmp_path):
    model = vitfold.adapt(mine, image_size=(32, 32), labels=["a", "b", "c"])
    assert mine.training, "the module is left as it is"
    assert isinstance(model.spec, GraphSpec)
    assert (model.spec.output_names, model.spec.head, model.labels) == (
        ("logits", "features"),
        "single_label",
        ("a", "b", "c"),
    )
    bundle = vitfold.save(vitfold.optimize(model, merge=3), tmp_path / "mine.fold")
    assert bundle.manifest.tokens == (17, 14, 11)
    image = torch.randn(2, 3, 32, 32)
    plain = vitfold.save(vitfold.optimize(model), tmp_path / "plain.fold")
    session = onnxruntime.InferenceSession(plain.path / "model.onnx")
    with torch.inference_mode():
        expected = mine.eval()(image)
    for name, found in zip(("logits", "features"), session.run(None, {"pixel_values": image.numpy()}), strict=True):
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=1e-4, atol=1e-5)


def test_outputs_are_chosen_by_name(mine):
    model = vitfold.adapt(mine, image_size=(32, 32), outputs=["features"])
    assert (model.spec.output_names, model.spec.head, model.spec.output_width) == (("features",), "features", 32)
    with pytest.raises(SourceError, match="features"):
        vitfold.adapt(mine, image_size=(32, 32), outputs=["boxes"])


def test_of_a_model_of_images_and_text_the_part_of_images_is_taken():
    text = {**SMALL, "vocab_size": 40, "num_hidden_layers": 1, "encoder_hidden_size": 32}
    whole = hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config={**SMALL, **IMAGE}))
    model = vitfold.adapt(randomize(whole))
    assert (model.spec.prefix, model.spec.grid) == (1, (4, 4))
    assert model.spec.output_names[0] == "pooler_output"


def test_a_folder_of_an_unknown_class_is_read_as_a_graph(tmp_path):
    module = randomize(hf.IJepaModel(hf.IJepaConfig(**SMALL, **IMAGE)))
    module.save_pretrained(tmp_path)
    loaded = load_source(f"hf:{tmp_path}")
    assert isinstance(loaded.model.spec, GraphSpec)
    assert (loaded.model.spec.num_layers, loaded.model.spec.prefix) == (2, 0)
    assert loaded.model.spec.dense
    with pytest.raises(SourceError, match="IJepa"):
        load_source(f"hf:{tmp_path}", graph=False)


def test_turned_positions_registers_and_scales_are_found_by_what_they_do():
    import timm

    torch.manual_seed(0)
    module = timm.create_model("vit_small_patch16_dinov3", img_size=32, depth=1)
    spec = vitfold.adapt(module).spec
    assert (spec.prefix, spec.grid, spec.num_heads, spec.foreign) == (5, (2, 2), 6, ())


class TwoImages(nn.Module):
    def forward(self, a, b):
        return a + b


def test_what_cannot_be_read_says_why(mine):
    with pytest.raises(SourceError, match="image_size"):
        vitfold.adapt(mine)
    with pytest.raises(SourceError, match="one input"):
        vitfold.adapt(TwoImages(), image_size=(32, 32))
    with pytest.raises(SourceError, match="no attention"):
        vitfold.adapt(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), image_size=(32, 32))
    with pytest.raises(SourceError, match="does not run"):
        vitfold.adapt(mine, image_size=(30, 30))


def test_registers_need_a_model_by_name(mine, tmp_path):
    model = vitfold.adapt(mine, image_size=(32, 32))
    with pytest.raises(vitfold.VitfoldError, match="graph"):
        vitfold.save(vitfold.optimize(model, registers="delete", quant="w8a8"), tmp_path / "r.fold")


CODE = """
import torch
from torch import nn

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, 16, 8, 8), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

def build():
    return Tower()

def nothing():
    return 7
"""


def test_code_that_builds_a_module_is_a_source(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    loaded = load_source(f"{tmp_path}/mine.py:build", image_size=32, seed=3)
    assert (loaded.model.spec.num_layers, loaded.model.spec.grid, loaded.model.spec.output_width) == (1, (4, 4), 4)
    assert load_source(f"{tmp_path}/mine.py:build", image_size=32, seed=3).model.digest() == loaded.model.digest()
    for source, said in (("mine.py:absent", "absent"), ("mine.py:nothing", "int"), ("gone.py:build", "no file")):
        with pytest.raises(SourceError, match=said):
            load_source(f"{tmp_path}/{source}", image_size=32)
    (tmp_path / "broken.py").write_text("import no_such_package")
    with pytest.raises(SourceError, match="no_such_package"):
        load_source(f"{tmp_path}/broken.py:build", image_size=32)


def test_what_torch_export_saved_is_a_source(tmp_path):
    scope: dict[str, object] = {}
    exec(CODE, scope)
    module = scope["Tower"]().eval()  # type: ignore[operator]
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(
        torch.export.export(module, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},)), tmp_path / "m.pt2"
    )
    loaded = load_source(str(tmp_path / "m.pt2"), image_size=32)
    assert loaded.model.spec.num_layers == 1
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(SourceError, match="torch.export"):
        load_source(str(tmp_path / "bad.pt2"), image_size=32)


class Gated(nn.Module):
    """An attention whose scores are changed by a rule of its own, as positions of pairs that depend on the queries."""

    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.patch, self.qkv, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 48), nn.Linear(16, 3)
        self.attends = attends

    def forward(self, image):
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        if not self.attends:
            return self.head((q + k + v).mean(1))
        scores = q @ k.transpose(1, 2)
        scores = scores * torch.sigmoid(q.sum(-1, keepdim=True))
        return self.head((scores.softmax(-1) @ v + q).mean(1))


def test_an_attention_of_a_form_of_its_own_is_read_too():
    torch.manual_seed(0)
    model = vitfold.adapt(Gated(attends=True).eval(), image_size=(32, 32))
    assert model.spec.num_layers == 0
    assert model.spec.unmergeable
    plan = vitfold.optimize(model, quant="w8a8")
    assert plan.needs_calibration
    for merge in (8, "8", "8:-1", "align", "1,1"):
        with pytest.raises(RecipeError, match="cannot merge"):
            vitfold.optimize(model, merge=merge)
    assert vitfold.optimize(model, merge=0).recipe.merge.r == ()
    with pytest.raises(SourceError, match="no attention"):
        vitfold.adapt(Gated(attends=False).eval(), image_size=(32, 32))
