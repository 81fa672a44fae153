"""LoRA adapters beside and apart from their base: merged as the two small products beside each layer would compute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn
from zoo import randomize, tiny_hf

from vitfold.errors import SourceError
from vitfold.sources import load_source

RANK, CLASSES = 3, 5
LAYERS = ("vit.layers.0.attention.q_proj", "vit.layers.1.attention.v_proj", "vit.layers.1.mlp.fc1")
OLD = {
    "vit.layers.0.attention.q_proj": "vit.encoder.layer.0.attention.attention.query",
    "vit.layers.1.attention.v_proj": "vit.encoder.layer.1.attention.attention.value",
    "vit.layers.1.mlp.fc1": "vit.encoder.layer.1.intermediate.dense",
}


def base_module(**options: Any) -> nn.Module:
    return randomize(tiny_hf(hf.ViTForImageClassification, hf.ViTConfig, num_labels=CLASSES, **options))


def adapter(layers: tuple[str, ...] = LAYERS, rank: int = RANK) -> dict[str, Tensor]:
    """Random small matrices, of which no product is the other one's transpose."""
    draw = torch.Generator().manual_seed(7)
    module, found = base_module(), {}
    for layer in layers:
        weight = module.get_submodule(layer).weight
        found[f"{layer}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=draw) / 4
        found[f"{layer}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=draw) / 4
    return found


def write(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "base_model_name_or_path": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def beside(module: nn.Module, tensors: dict[str, Tensor], scales: dict[str, float], image: Tensor) -> Tensor:
    """The oracle: every adapted layer gives W x + s B (A x), nothing is merged."""
    handles = []
    for layer, scale in scales.items():
        down, up = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]

        def add(_: nn.Module, given: tuple[Tensor, ...], output: Tensor, down=down, up=up, scale=scale) -> Tensor:
            return output + scale * ((given[0] @ down.T) @ up.T)

        handles.append(module.get_submodule(layer).register_forward_hook(add))
    with torch.no_grad():
        found = module(pixel_values=image).logits
    for handle in handles:
        handle.remove()
    return found


def loaded_logits(folder: Path, image: Tensor) -> Tensor:
    found = load_source(f"hf:{folder}").original
    with torch.no_grad():
        return found(pixel_values=image).logits


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, dict.fromkeys(LAYERS, 6 / RANK)),
        ({"use_rslora": True}, dict.fromkeys(LAYERS, 6 / math.sqrt(RANK))),
        ({"alpha_pattern": {"v_proj": 9}}, {LAYERS[0]: 2.0, LAYERS[1]: 3.0, LAYERS[2]: 2.0}),
        ({"alpha_pattern": {r"layers\.1\.mlp\.fc1": 3}}, {LAYERS[0]: 2.0, LAYERS[1]: 2.0, LAYERS[2]: 1.0}),
        ({"fan_in_fan_out": True, "lora_dropout": 0.3, "init_lora_weights": "gaussian"}, dict.fromkeys(LAYERS, 2.0)),
    ],
    ids=["alpha over rank", "rank-stabilized", "alpha by layer", "alpha by path", "what changes nothing"],
)
def test_an_adapter_beside_its_base_is_merged(tmp_path, image, config, scales):
    tensors = adapter()
    base_module().save_pretrained(tmp_path)
    expected = beside(base_module(), tensors, scales, image)
    with torch.no_grad():
        plain = base_module()(pixel_values=image).logits
    found = loaded_logits(write(tmp_path, tensors, **config), image)
    assert (expected - plain).abs().max() > 0.01, "the adapter changes something"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_rank_of_a_layer_is_that_of_its_matrices(tmp_path, image):
    tensors = adapter(LAYERS[:1]) | adapter(LAYERS[1:2], rank=2)
    base_module().save_pretrained(tmp_path)
    write(tmp_path, tensors, rank_pattern={"v_proj": 2})
    expected = beside(base_module(), tensors, {LAYERS[0]: 6 / 3, LAYERS[1]: 6 / 2}, image)
    torch.testing.assert_close(loaded_logits(tmp_path, image), expected, rtol=1e-5, atol=1e-5)


def test_names_of_older_checkpoints_are_known(tmp_path, image):
    tensors = adapter()
    old = {OLD[name.partition(".lora_")[0]] + name[name.index(".lora_") :]: one for name, one in tensors.items()}
    base_module().save_pretrained(tmp_path)
    expected = beside(base_module(), tensors, dict.fromkeys(LAYERS, 2.0), image)
    torch.testing.assert_close(loaded_logits(write(tmp_path, old), image), expected, rtol=1e-5, atol=1e-5)


def test_trained_biases_and_heads_replace_the_bases(tmp_path, image):
    tensors = adapter(LAYERS[:1])
    bias = torch.linspace(-1, 1, 32)
    head = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(5))
    written = tensors | {
        f"{LAYERS[0]}.base_layer.bias": bias,
        "classifier.weight": head,
        "classifier.modules_to_save.bias": torch.zeros(CLASSES),
        "classifier.original_module.bias": torch.ones(CLASSES),
    }
    base_module().save_pretrained(tmp_path)
    write(tmp_path, written, bias="all", modules_to_save=["classifier"])
    module = base_module()
    with torch.no_grad():
        module.get_submodule(LAYERS[0]).bias.copy_(bias)
        module.classifier.weight.copy_(head)
        module.classifier.bias.zero_()
    expected = beside(module, tensors, {LAYERS[0]: 2.0}, image)
    torch.testing.assert_close(loaded_logits(tmp_path, image), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_alone_finds_its_base_and_brings_its_head(tmp_path, image):
    """The base is a model without a classifier, as the ones are on which most adapters were trained."""
    base = tiny_hf(hf.ViTModel, hf.ViTConfig, model_options={"add_pooling_layer": False})
    randomize(base).save_pretrained(tmp_path / "base")
    tensors = adapter(LAYERS[:1])
    head = {"classifier.weight": torch.randn(7, 32), "classifier.bias": torch.randn(7)}
    write(tmp_path / "adapter", tensors | head, base_model_name_or_path=str(tmp_path / "base"))
    whole = hf.ViTForImageClassification(hf.ViTConfig(**{**base.config.to_dict(), "num_labels": 7})).eval()
    whole.vit.load_state_dict(base.state_dict())
    whole.classifier.load_state_dict({name.partition(".")[2]: tensor for name, tensor in head.items()})
    expected = beside(whole, tensors, {LAYERS[0]: 2.0}, image)
    loaded = load_source(f"hf:{tmp_path / 'adapter'}")
    assert (loaded.model.spec.outputs, loaded.model.spec.head) == (7, "single_label")
    with torch.no_grad():
        torch.testing.assert_close(loaded.original(pixel_values=image).logits, expected, rtol=1e-5, atol=1e-5)


def test_origins_name_both_files(tmp_path):
    base_module().save_pretrained(tmp_path)
    arguments = load_source(f"hf:{write(tmp_path, adapter())}").model.origin.arguments
    assert len(arguments["sha256"]) == len(arguments["adapter_sha256"]) == 64


def test_without_its_adapter_the_base_is_another_model(tmp_path):
    base_module().save_pretrained(tmp_path)
    alone = load_source(f"hf:{tmp_path}").model.digest()
    assert load_source(f"hf:{write(tmp_path, adapter())}").model.digest() != alone


def test_a_base_with_weights_quantized_already_is_refused(tmp_path):
    base_module().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}})
    )
    with pytest.raises(SourceError, match=r"quantized already \(quantization_config .*was quantized from"):
        load_source(f"hf:{tmp_path}")
