"""LoRA adapters of the package peft, merged into the module that they belong to.

What an adapter's two files mean: adapter_config.json and adapter_model.safetensors. Whatever of them is not merged
exactly is refused, with the way to let peft merge it. Needs no peft.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitfold.errors import SourceError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_PEFT = (
    "merge it with peft and give the folder that this writes: PeftModel.from_pretrained(model, ADAPTER)"
    ".merge_and_unload().save_pretrained(DIR)"
)
# What is read here, and what does not change the function of a trained adapter.
_READ = frozenset({"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
})  # fmt: skip
# Names of layers in checkpoints that transformers before 5 wrote, and what they are now.
_RENAMED = (
    (r"attention\.attention\.(query|key|value)", lambda found: f"attention.{found[1][0]}_proj"),
    (r"attention\.output\.dense", lambda _: "attention.o_proj"),
    (r"intermediate\.dense", lambda _: "mlp.fc1"),
    (r"output\.dense", lambda _: "mlp.fc2"),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """A LoRA adapter as it lies in its folder: names as at training, without the prefix of peft."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        """The model that it was trained on."""
        found = self.config.get("base_model_name_or_path")
        return str(found) if found else None

    @property
    def classes(self) -> int | None:
        """Classes of the head that was trained with it, None where there is none."""
        head = self.tensors.get("classifier.weight")
        return None if head is None else int(head.shape[0])

    def scale(self, layer: str, rank: int) -> float:
        """Return what a layer's product of both matrices is multiplied by.

        Equation: alpha / r, or alpha / sqrt(r) where the adapter was trained so.

        Source: LoRA (2106.09685), section 4.1; rsLoRA (2312.03732).
        """
        alpha = float(self.config.get("lora_alpha") or 1)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = float(value)
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter in a folder.

    Raises:
        SourceError: if its files are missing or damaged, or it is something that is not merged here.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error}); fetch the adapter again") from None
    if not isinstance(config, dict):
        raise SourceError(f"{path} holds no JSON object; fetch the adapter again")
    _check_config(path, config)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickled = (folder / PICKLE).is_file()
        cure = f"{PICKLE} may hold a pickle, which can run any code when opened; {_PEFT}" if pickled else "fetch it"
        raise SourceError(f"{weights} is missing beside {CONFIG}: {cure}")
    try:
        found = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{weights} is not a readable safetensors file ({error}); fetch it again") from None
    # With bias = "all" peft writes, beside what was trained, the head that it replaced.
    trained = {name: tensor for name, tensor in found.items() if ".original_module." not in name}
    return Adapter(folder=folder, config=config, tensors={_plain(name): tensor for name, tensor in trained.items()})


def _plain(name: str) -> str:
    """The name of a parameter without what peft wraps around its layer."""
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?)\.", ".", name.removeprefix(_PREFIX))


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{path} is an adapter of the kind {kind!r}, and vitfold merges LORA; {_PEFT}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        raise SourceError(f"{path} has init_lora_weights {start!r}, which changes the base weights as well; {_PEFT}")
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise SourceError(f"{path} has {name} = {value!r}, which is no positive number; fetch it again")
    others = sorted(name for name, value in config.items() if value and name not in _READ | _HARMLESS)
    if others:
        raise SourceError(f"{path} asks for {others[0]} = {config[others[0]]!r}, which vitfold does not merge; {_PEFT}")


def merge_adapter(module: nn.Module, adapter: Adapter) -> None:
    """Merge an adapter into a module in place: W + scale B A, and the parameters that were trained beside it.

    Raises:
        SourceError: if a part of the adapter has no place in the module, or another shape.
    """
    params = dict(module.named_parameters())
    left = dict(adapter.tensors)
    merged = 0
    with torch.no_grad():
        for layer in sorted(name.removesuffix(".lora_A.weight") for name in left if name.endswith(".lora_A.weight")):
            down, up = left.pop(f"{layer}.lora_A.weight").float(), left.pop(f"{layer}.lora_B.weight", None)
            if up is None:
                raise _misfit(adapter, f"{layer} has lora_A and no lora_B")
            weight = _place(params, f"{layer}.weight", adapter)
            delta = adapter.scale(layer, len(down)) * (up.float().flatten(1) @ down.flatten(1))
            if delta.numel() != weight.numel() or len(delta) != len(weight):
                raise _misfit(adapter, f"{layer} has the shape {tuple(delta.shape)}, the model's {tuple(weight.shape)}")
            weight.add_(delta.reshape(weight.shape))
            merged += 1
        for name, tensor in left.items():
            if ".lora_" in name:
                raise SourceError(f"{adapter.folder / WEIGHTS} holds {name}, which vitfold does not merge; {_PEFT}")
            place = _place(params, name, adapter)
            if place.shape != tensor.shape:
                raise _misfit(adapter, f"{name} has the shape {tuple(tensor.shape)}, the model's {tuple(place.shape)}")
            place.copy_(tensor)
    if not merged and not left:
        raise SourceError(f"{adapter.folder / WEIGHTS} holds no tensor of an adapter; fetch it again")


def _place(params: Mapping[str, nn.Parameter], name: str, adapter: Adapter) -> nn.Parameter:
    """Return the parameter of the module that an adapter's name stands for."""
    found = {candidate for candidate in _candidates(name) if candidate in params}
    if len(found) != 1:
        raise _misfit(adapter, f"{name} is no parameter of it")
    return params[found.pop()]


def _candidates(name: str) -> Iterator[str]:
    """Yield the names that a parameter may have today."""
    renamed = name
    for pattern, now in _RENAMED:
        renamed = re.sub(pattern, now, renamed)
    for one in (name, renamed):
        for inner in (one, re.sub(r"\bencoder\.layer\.", "layers.", one)):
            yield inner
            yield inner.removeprefix("vision_model.")
            yield f"vision_model.{inner}"


def _misfit(adapter: Adapter, what: str) -> SourceError:
    trained = f", which was {adapter.base}" if adapter.base else ""
    return SourceError(
        f"the adapter in {adapter.folder} does not fit this base model: {what}; give the base that it was trained on"
        f"{trained}"
    )
