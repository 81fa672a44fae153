"""Side files that change what a model computes: followed exactly, or refused with the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file

from vitfold.errors import SourceError
from vitfold.sources import load_source
from vitfold.sources.transformers_preprocess import preprocess_from_processor

Q = "vit.layers.0.attention.q_proj"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 32), f"{Q}.lora_B.weight": torch.ones(32, 2)}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    config = hf.ViTConfig(**SMALL, image_size=32, patch_size=8, num_labels=3)
    hf.ViTForImageClassification(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Adapter:
    """Changes to a sound adapter; None leaves a key or a tensor out."""

    id: str
    said: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    spoil: Callable[[Path], object] = lambda _: None


ADAPTERS = (
    Adapter("DoRA", ("use_dora = True", "merge_and_unload()"), {"use_dora": True}),
    Adapter("another kind", ("kind 'IA3'", "merge_and_unload()"), {"peft_type": "IA3"}),
    Adapter("no kind", ("kind None",), {"peft_type": None}),
    Adapter("LoHa", ("'LOHA'", "merges LORA"), {"peft_type": "LOHA"}),
    Adapter("PiSSA", ("'pissa'", "changes the base weights"), {"init_lora_weights": "pissa"}),
    Adapter("OLoRA", ("'olora'", "changes the base weights"), {"init_lora_weights": "olora"}),
    Adapter("LoftQ", ("'loftq'",), {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    Adapter("repeated layers", ("layer_replication",), {"layer_replication": [[0, 2], [1, 2]]}),
    Adapter("parameters as targets", ("target_parameters",), {"target_parameters": ["experts.w"]}),
    Adapter("trained tokens", ("trainable_token_indices",), {"trainable_token_indices": [3]}),
    Adapter("activated by a token", ("alora_invocation_tokens",), {"alora_invocation_tokens": [1]}),
    Adapter("a bias of its own", ("lora_bias",), {"lora_bias": True}),
    Adapter("what comes tomorrow", ("use_newlora = True", "does not merge"), {"use_newlora": True}),
    Adapter("a rank of zero", ("r = 0",), {"r": 0}),
    Adapter("a rank in words", ("r = 'two'",), {"r": "two"}),
    Adapter("no alpha", ("lora_alpha = None",), {"lora_alpha": None}),
    Adapter("half a pair", ("lora_A and no lora_B",), tensors={f"{Q}.lora_B.weight": None}),
    Adapter("the other half", ("lora_B.weight", "does not merge"), tensors={f"{Q}.lora_A.weight": None}),
    Adapter("a layer elsewhere", ("vit.layers.7.attention", "no parameter of it", "trained on"),
            tensors={"vit.layers.7.attention.q_proj.lora_A.weight": torch.ones(2, 32),
                     "vit.layers.7.attention.q_proj.lora_B.weight": torch.ones(32, 2)}),
    Adapter("a wider base", ("shape (64, 32)", "(32, 32)"), tensors={f"{Q}.lora_B.weight": torch.ones(64, 2)}),
    Adapter("a magnitude", ("lora_magnitude_vector",), tensors={f"{Q}.lora_magnitude_vector": torch.ones(32)}),
    Adapter("an embedding", ("lora_embedding_A",), tensors={"vit.x.lora_embedding_A": torch.ones(2, 3)}),
    Adapter("a head of another width", ("classifier.weight",),
            tensors={"classifier.weight": torch.ones(3, 48), "classifier.bias": torch.ones(3)}),
    Adapter("no tensors", ("holds no tensor",), tensors=dict.fromkeys(PAIR)),
    Adapter("no weights", ("adapter_model.safetensors is missing",),
            spoil=lambda f: (f / "adapter_model.safetensors").unlink()),
    Adapter("weights in a pickle", ("adapter_model.bin may hold a pickle", "merge_and_unload()"),
            spoil=lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin")),
    Adapter("weights cut short", ("not a readable safetensors file",),
            spoil=lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0")),
    Adapter("a config that is no JSON", ("cannot be read as JSON",),
            spoil=lambda f: (f / "adapter_config.json").write_text("{")),
    Adapter("a config that is a list", ("holds no JSON object",),
            spoil=lambda f: (f / "adapter_config.json").write_text("[]")),
    Adapter("a base that is gone", ("there is no such folder", "beside the adapter"),
            {"base_model_name_or_path": "/nowhere/base"}, spoil=lambda f: (f / "config.json").unlink()),
    Adapter("a base that nobody names", ("names no base model", "beside it"),
            spoil=lambda f: (f / "config.json").unlink()),
)  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.id)
def test_adapters_that_are_not_merged_exactly_are_refused(base, tmp_path, case):
    for path in base.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = {name: value for name, value in {**LORA, **case.config}.items() if value is not None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: one for name, one in {**PAIR, **case.tensors}.items() if one is not None}
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    case.spoil(tmp_path)
    with pytest.raises(SourceError) as caught:
        load_source(f"hf:{tmp_path}")
    for words in case.said:
        assert words in str(caught.value)


@dataclass(frozen=True)
class Processor:
    id: str
    changed: dict[str, Any]
    said: tuple[str, ...]


PROCESSORS = (
    Processor("another order of colours", {"do_flip_channel_order": True}, ("do_flip_channel_order = True", "false")),
    Processor("crops by share", {"crop_pct": 0.9}, ("crop_pct = 0.9",)),
    Processor("offset by one", {"rescale_offset": True}, ("rescale_offset",)),
    Processor("grey", {"do_grayscale": True}, ("do_grayscale",)),
    Processor("thumbnails", {"do_thumbnail": True}, ("do_thumbnail",)),
    Processor("turned", {"do_align_long_axis": True}, ("do_align_long_axis",)),
    Processor("multiples", {"size_divisor": 32}, ("size_divisor = 32",)),
    Processor("tiles", {"do_image_splitting": True}, ("do_image_splitting",)),
    Processor("what comes tomorrow", {"do_something_new": True}, ("do_something_new", "preprocessor_config.json")),
    Processor("code of its own", {"auto_map": {"AutoImageProcessor": "my.P"}}, ("auto_map",)),
    Processor("a processor that flips", {"image_processor_type": "MobileViTImageProcessor"}, ("MobileViT", "one of")),
    Processor("a processor of its own size", {"image_processor_type": "LevitImageProcessor"}, ("LevitImageProcessor",)),
    Processor("nobody's processor", {"image_processor_type": "MyImageProcessor"}, ("MyImageProcessor",)),
    Processor("pads", {"do_pad": True}, ("pads",)),
    Processor("does not rescale", {"do_rescale": False}, ("rescales by 1",)),
    Processor("rescales otherwise", {"rescale_factor": 1 / 127.5}, ("rescales by",)),
)


@pytest.mark.parametrize("case", PROCESSORS, ids=lambda case: case.id)
def test_processors_that_do_more_are_refused_and_not_half_followed(case):
    sound = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}
    assert preprocess_from_processor(sound, None).crop_size == (32, 32)
    off = {name: None if not isinstance(value, bool) else False for name, value in case.changed.items()}
    if "processor" not in case.id and "rescale" not in case.id:
        assert preprocess_from_processor({**sound, **off}, None) == preprocess_from_processor(sound, None)
    with pytest.raises(SourceError) as caught:
        preprocess_from_processor({**sound, **case.changed}, None)
    for words in case.said:
        assert words in str(caught.value)
