"""Sources under other names, in wrappers or half there: loaded where that is exact, else refused with the cure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from requests import Response
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diffusing import write_folder
from vitfold.errors import SourceError, nearest
from vitfold.sources import adapt, load_source
from vitfold.sources.dit import load_dit
from vitfold.sources.failures import load_error

ARCH = "test_vit"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
State = dict[str, Tensor]


def spread(module: nn.Module) -> nn.Module:
    """Weights away from their neutral values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator) + (tensor.ndim == 1))
    return module.eval()


@pytest.fixture(scope="module")
def state() -> State:
    return spread(timm.create_model(ARCH, num_classes=4)).state_dict()


def prefixed(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {"".join(prefixes) + name: tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class Names:
    id: str
    change: Callable[[State], State]


LOADED = (
    Names("DataParallel", prefixed("module.")),
    Names("Lightning", prefixed("model.")),
    Names("a backbone", prefixed("backbone.")),
    Names("torch.compile", prefixed("_orig_mod.")),
    Names("compiled in DataParallel", prefixed("module.", "_orig_mod.")),
    Names("Lightning, compiled", prefixed("model.", "_orig_mod.")),
    Names("a teacher alone", prefixed("teacher.backbone.")),
    Names("a teacher beside its student", lambda s: {**prefixed("teacher.backbone.")(s),
          **prefixed("student.backbone.")(s), "teacher.dino_head.w": torch.ones(2)}),
    Names("an encoder", prefixed("encoder.")),
    Names("a moving average", prefixed("model_ema.", "module.")),
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LOADED, ids=lambda case: case.id)
def test_names_with_prefixes_are_the_same_weights(case, state, tmp_path):
    save_file(state, tmp_path / "plain.safetensors")
    save_file({k: v.clone() for k, v in case.change(state).items()}, tmp_path / "other.safetensors")
    options = {"arch": ARCH, "num_classes": 4}
    expected = load_source(str(tmp_path / "plain.safetensors"), **options).model
    found = load_source(str(tmp_path / "other.safetensors"), **options).model
    assert found.digest() == expected.digest()


def without_registers(module: VisionTransformer) -> State:
    return {**module.state_dict(), "mask_token": torch.zeros(1, 384)}


def in_chunks(module: VisionTransformer) -> State:
    def name(of: str) -> str:
        _, block, rest = [*of.split(".", 2), "", ""][:3]
        return f"blocks.{int(block) // 6}.{block}.{rest}" if of.startswith("blocks.") else of

    return {name(of): tensor for of, tensor in without_registers(module).items()}


def with_registers(module: VisionTransformer) -> State:
    """Its own names; the class token has a position of its own there."""
    state = dict(module.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    first = torch.full((1, 1, 384), 0.25)
    state["cls_token"] = state["cls_token"] - first
    state["pos_embed"] = torch.cat((first, state["pos_embed"]), 1)
    return {**state, "mask_token": torch.zeros(1, 384)}


@pytest.mark.parametrize(
    ("arch", "rename"),
    [
        ("vit_small_patch14_dinov2", without_registers),
        ("vit_small_patch14_dinov2", in_chunks),
        ("vit_small_patch14_reg4_dinov2", with_registers),
    ],
)
def test_dinov2s_own_names_are_read_as_timm_reads_them(arch, rename, tmp_path):
    module = spread(timm.create_model(arch, num_classes=0, img_size=28))
    save_file({name: tensor.clone() for name, tensor in rename(module).items()}, tmp_path / "dino.safetensors")
    found = load_source(str(tmp_path / "dino.safetensors"), arch=arch).model
    expected = adapt(module)
    assert found.spec == expected.spec
    for name, array in expected.params.items():
        np.testing.assert_allclose(found.params[name], array, atol=1e-6)


@dataclass(frozen=True)
class Refused:
    id: str
    names: tuple[str, ...]
    said: tuple[str, ...]


OTHERS = (
    Refused("transformers", ("vit.embeddings.patch_embeddings.projection.weight",), ("names of transformers", "hf:")),
    Refused("transformers' CLIP", ("vision_model.embeddings.patch_embedding.weight",), ("names of transformers",)),
    Refused("transformers in a wrapper", ("module.embeddings.patch_embeddings.projection.bias",), ("config.json",)),
    Refused("diffusers", ("transformer_blocks.0.attn1.to_q.weight",), ("names of diffusers", "hf:FOLDER")),
    Refused("DiT", ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight"), ("Diffusion", "vitfold diffusion sample")),
    Refused("torchvision", ("encoder.layers.encoder_layer_0.ln_1.weight", "conv_proj.bias"), ("torchvision", "adapt")),
    Refused("open_clip", ("visual.transformer.resblocks.0.ln_1.weight",), ("open_clip", "model.visual")),
    Refused("open_clip's tower", ("conv1.weight", "transformer.resblocks.0.ln_1.weight"), ("open_clip",)),
    Refused("an adapter", ("base_model.model.vit.lora_A.weight",), ("LoRA adapter alone", "adapter_config.json")),
    Refused("a network of another kind", ("layer1.0.conv1.weight",), ("missing", "unexpected", "check --arch")),
    Refused("nothing", (), ("holds no tensor",)),
)


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.id)
def test_names_of_other_repositories_are_refused_with_the_way_in(case, tmp_path):
    save_file({name: torch.ones(2) for name in case.names}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError) as caught:
        load_source(str(tmp_path / "other.safetensors"), arch=ARCH)
    for words in case.said:
        assert words in str(caught.value)
    assert "network;" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    config = hf.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)
    spread(hf.ViTForImageClassification(config)).save_pretrained(folder)
    return folder


def rewritten(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.unlink()
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@dataclass(frozen=True)
class Folder:
    id: str
    spoil: Callable[[Path], object]
    said: tuple[str, ...]


FOLDERS = (
    Folder("another width", lambda f: rewritten(f, hidden_size=48), ("shapes", "config.json")),
    Folder("more classes", lambda f: rewritten(f, id2label={str(i): str(i) for i in range(9)}), ("shapes",)),
    Folder("no weights", lambda f: (f / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
    Folder("a graph alone", lambda f: (f / "model.safetensors").rename(f / "model.onnx"), ("ONNX graph (model.onnx)",)),
    Folder("no config", lambda f: (f / "config.json").unlink(), ("config.json",)),
    Folder("no model type", lambda f: rewritten(f, model_type=None), ("model_type",)),
    Folder("weights cut short", lambda f: ((f / "model.safetensors").unlink(),
           (f / "model.safetensors").write_bytes(b"\x08\0\0\0")), ("damaged",)),
    Folder("a config cut short", lambda f: ((f / "config.json").unlink(), (f / "config.json").write_text("{")),
           ("JSON", "fetch the folder again")),
    Folder("masked images", lambda f: rewritten(f, architectures=["ViTForMaskedImageModeling"]),
           ("its body is read as ViTModel or ViTForImageClassification",)),
    Folder("a network without a neighbour", lambda f: rewritten(f, architectures=["ConvNextForImageClassification"]),
           ("ConvNextForImageClassification, which vitfold does not run; supported: ViTModel",)),
    Folder("a language model", lambda f: rewritten(f, architectures=["BertModel"]), ("run; supported: ViTModel",)),
    Folder("no architectures, no weights", lambda f: (rewritten(f, architectures=None),
           (f / "model.safetensors").rename(f / "pytorch_model.bin")), ('"architectures": ["ViTForImage',)),
)  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.id)
def test_folders_that_cannot_be_loaded_say_what_is_wrong_in_them(case, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    case.spoil(tmp_path)
    with pytest.raises(SourceError) as caught:
        load_source(f"hf:{tmp_path}", graph=False)
    for words in case.said:
        assert words in str(caught.value)
    assert "network;" not in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_config_without_architectures_is_read_by_its_weights(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    expected = load_source(f"hf:{folder}").model
    rewritten(tmp_path, architectures=None)
    assert load_source(f"hf:{tmp_path}").model.digest() == expected.digest()
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name.removeprefix("vit."): one for name, one in weights.items() if not name.startswith("classifier.")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_source(f"hf:{tmp_path}").model.spec.output == "image_embeds"


def test_a_clip_whose_widths_differ_inside_takes_the_outer_one(tmp_path):
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 8, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 512}
    whole = spread(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)))
    whole.save_pretrained(tmp_path)
    model = load_source(f"hf:{tmp_path}").model
    assert model.spec.outputs == 24
    np.testing.assert_array_equal(model.params["head.weight"], whole.visual_projection.weight.detach())


def test_a_folder_of_timm_is_read_by_timm(state, tmp_path):
    module = timm.create_model(ARCH, num_classes=4)
    config = {**module.pretrained_cfg, "num_classes": 4}
    kept = {name: config[name] for name in ("input_size", "mean", "std", "interpolation", "crop_pct", "num_classes")}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": ARCH, "num_classes": 4, "pretrained_cfg": {**kept, "label_names": list("abcd")}})
    )
    save_file(state, tmp_path / "model.safetensors")
    found = load_source(f"hf:{tmp_path}").model
    assert found.labels == tuple("abcd")
    save_file(state, tmp_path / "alone.safetensors")
    alone = load_source(str(tmp_path / "alone.safetensors"), arch=ARCH).model
    assert found.spec.outputs == alone.spec.outputs == 4
    np.testing.assert_array_equal(found.params["head.weight"], alone.params["head.weight"])
    with pytest.raises(SourceError, match="has 4 classes, 7 were asked for"):
        load_source(f"hf:{tmp_path}", num_classes=7)


def test_a_repository_of_timm_is_timms():
    with pytest.raises(SourceError, match="timm has no model 'vit_tiny_patch16_223'; did you mean"):
        load_source("hf:timm/vit_tiny_patch16_223.augreg_in21k")
    random = {"weights": "random", "image_size": 32, "num_classes": 3}
    found = load_source(f"hf:timm/{ARCH}", **random).model
    assert found.spec == load_source(f"timm:{ARCH}", **random).model.spec


@dataclass(frozen=True)
class Failure:
    id: str
    error: Exception
    said: str
    network: bool = False


def response(status: int) -> Response:
    found = Response()
    found.status_code = status
    return found


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


FAILURES = (
    Failure("no connection", OSError("We couldn't connect to 'https://huggingface.co' to load"), "be fetched", True),
    Failure("refused", ConnectionRefusedError(111, "Connection refused"), "be fetched", True),
    Failure("not in the cache, offline", LocalEntryNotFoundError("offline"), "be fetched", True),
    Failure("behind another error", caused(OSError("no file"), TimeoutError("timed out")), "be fetched", True),
    Failure("no such repository", OSError("x/y is not a local folder and is not a valid model identifier"), "there is"),
    Failure("a mismatch", RuntimeError("size mismatch for head.weight: [3, 4] against [5, 4]"), "shapes"),
    Failure("no model type", ValueError("Should have a `model_type` key in its config.json"), "timm:hf_hub:x/y"),
    Failure("something else", KeyError("blocks"), "holds nothing that this loader reads"),
)


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case.id)
def test_the_network_is_named_where_it_failed_and_nowhere_else(case):
    said = str(load_error("hf:x/y", case.error))
    assert case.said in said
    assert ("check the network" in said) == case.network


@pytest.mark.parametrize(("kind", "said"), [(RepositoryNotFoundError, "there is no"), (GatedRepoError, "login")])
def test_a_repository_that_is_shut_or_absent_is_no_matter_of_the_network(kind, said):
    error = kind.__new__(kind)
    Exception.__init__(error, "404 or 403")
    text = str(load_error("hf:x/y", error))
    assert said in text
    assert "hf auth login" in text
    assert "network" not in text


UNLIKE = (("resnet", ("vit_base", "deit_small")), ("zebra", ("cat", "dog")), ("int4", ("cpu", "openvino")), ("x", ()))


@pytest.mark.parametrize(("name", "known"), UNLIKE)
def test_a_name_without_a_neighbour_gets_none(name, known):
    said = nearest(name, known)
    assert "did you mean" not in said
    assert all(one in said for one in known)


def test_case_is_no_difference():
    assert nearest("VIT_BASE", ["vit_base", "cat"]) == "did you mean vit_base?"


class Renamed(VisionTransformer):
    def training_step(self) -> None:
        """Something of the trainer's."""


class Doubled(VisionTransformer):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return 2 * super().forward_head(x, pre_logits)


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = spread(VisionTransformer(**TINY))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).softmax(-1)


def with_head(*layers: nn.Module) -> VisionTransformer:
    module = VisionTransformer(**TINY)
    module.head = nn.Sequential(*layers)
    return spread(module)


EXACT = {
    "compiled": lambda: torch.compile(spread(VisionTransformer(**TINY))),
    "DataParallel": lambda: nn.DataParallel(spread(VisionTransformer(**TINY))),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(spread(VisionTransformer(**TINY))),
    "compiled in DataParallel": lambda: nn.DataParallel(torch.compile(spread(VisionTransformer(**TINY)))),
    "a subclass": lambda: spread(Renamed(**TINY)),
    "a dropout before the head": lambda: with_head(nn.Dropout(0.5), nn.Linear(32, 5)),
    "a nested head": lambda: with_head(nn.Identity(), nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 5))),
}


@pytest.mark.parametrize("name", EXACT)
def test_wrappers_are_taken_off_where_that_is_exact(name):
    module = EXACT[name]()
    kind = type(module)
    found = adapt(module)
    assert type(module) is kind
    assert found.spec.outputs == 5
    if "head" not in name:
        assert found.digest() == adapt(spread(VisionTransformer(**TINY))).digest()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: spread(Doubled(**TINY)), ("its own forward_head", "into a VisionTransformer")),
        (Wrapped, ("beside the model within", "attribute net")),
        (lambda: with_head(nn.Linear(32, 8), nn.Linear(8, 5)), ("several layers (torch.Linear, torch.Linear)",)),
        (lambda: with_head(nn.Dropout(), nn.GELU(), nn.Linear(32, 5)), ("several layers", "head")),
        (lambda: timm.create_model("eva_giant_patch14_224", depth=1, embed_dim=32, num_heads=2), ("EVA's own blocks",)),
    ],
)
def test_wrappers_that_compute_something_are_refused_with_the_cure(make, said):
    with pytest.raises(SourceError) as caught:
        adapt(make(), graph=False)
    for words in said:
        assert words in str(caught.value)
    assert "rotary" not in str(caught.value)


@dataclass(frozen=True)
class Checkpoint:
    id: str
    around: Callable[[State], object]
    said: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Unsafe:
    """Something that a pickle could run."""


CHECKPOINTS = (
    Checkpoint("DiT's trainer", lambda s: {"model": {}, "ema": s, "opt": {}, "args": argparse.Namespace(lr=1e-4)}),
    Checkpoint("without an average", lambda s: {"model": s, "opt": {"state": {}}, "args": argparse.Namespace(a=[1])}),
    Checkpoint("DataParallel", lambda s: {"ema": {f"module.{name}": one for name, one in s.items()}}),
    Checkpoint("code beside the weights", lambda s: {"ema": s, "args": Unsafe()}, said="weights alone"),
    Checkpoint("no weights", lambda s: {"args": argparse.Namespace()}, said="is no state dict"),
)


@pytest.fixture(scope="module")
def dit_state() -> State:
    generator = torch.Generator().manual_seed(0)
    width, rows = 16, {"weight": 0, "bias": 1}

    def linear(name: str, inner: int, outer: int) -> State:
        shapes = {"weight": (outer, inner), "bias": (outer,)}
        return {f"{name}.{end}": torch.randn(shapes[end], generator=generator) for end in rows}

    found = {
        "pos_embed": torch.zeros(1, 16, width), "x_embedder.proj.weight": torch.zeros(width, 3, 2, 2),
        "x_embedder.proj.bias": torch.zeros(width), "y_embedder.embedding_table.weight": torch.zeros(4, width),
        **linear("t_embedder.mlp.0", 256, width), **linear("t_embedder.mlp.2", width, width),
        **linear("final_layer.adaLN_modulation.1", width, 2 * width), **linear("final_layer.linear", width, 24),
        **linear("blocks.0.adaLN_modulation.1", width, 6 * width), **linear("blocks.0.attn.qkv", width, 3 * width),
        **linear("blocks.0.attn.proj", width, width), **linear("blocks.0.mlp.fc1", width, 64),
        **linear("blocks.0.mlp.fc2", 64, width),
    }  # fmt: skip
    return {name: one.contiguous() for name, one in found.items()}


@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.id)
def test_checkpoints_of_dits_trainer_load_and_run_no_code(case, dit_state, tmp_path):
    torch.save(case.around(dit_state), tmp_path / "ckpt.pt")
    if case.said is None:
        assert load_dit(str(tmp_path / "ckpt.pt"), heads=2).spec.num_layers == 1
        return
    with pytest.raises(SourceError, match=case.said):
        load_dit(str(tmp_path / "ckpt.pt"), heads=2)


def test_a_dit_by_its_old_class_loads_as_diffusers_loads_it(tmp_path):
    folder = write_folder(tmp_path / "dit")
    expected = load_dit(f"hf:{folder}")
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"}))
    found = load_dit(f"hf:{folder}")
    assert found.digest() == expected.digest()
    config.write_text(json.dumps({**values, "_class_name": "Transformer2DModel", "norm_type": "layer_norm"}))
    with pytest.raises(SourceError, match="Transformer2DModel"):
        load_dit(f"hf:{folder}")
    with pytest.raises(SourceError, match="diffusion model of diffusers"):
        load_source(f"hf:{folder / 'transformer'}")
