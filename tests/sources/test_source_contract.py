"""One suite for every supported architecture: parity, each weight used once, shared memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from zoo import CONTRACT, randomize

from vitfold.architectures.programs import forward
from vitfold.errors import ParityError, SourceError
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe
from vitfold.sources import adapt
from vitfold.sources import open_clip as clip_source
from vitfold.sources import timm as timm_source
from vitfold.sources.modules import find_translator
from vitfold.sources.parity import TOLERANCE, check_parity
from vitfold.sources.reader import Translation


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize(CONTRACT[name]())


def translated(module: torch.nn.Module) -> Translation:
    return find_translator(module)[0].translate(module)


@pytest.mark.parametrize("name", CONTRACT)
def test_program_computes_what_the_original_computes(name):
    module = build(name)
    model = adapt(module)
    error = check_parity(translated(module).forward, model)
    assert error <= TOLERANCE
    assert model.origin.loader.split()[0] in ("timm", "transformers", "torchvision", "open_clip")


class Reads(TorchFunctionMode):
    """Counts how often the values of a tensor are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.detach:
            self.found[id(args[0])] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONTRACT)
def test_every_parameter_is_used_exactly_once(name):
    module = build(name)
    with Reads() as reads:
        translated(module)
    visual = clip_source.tower(module) if name.startswith("open_clip") else module
    unused = ("mask_token",) if name.startswith("hf") else ()
    if name == "hf SigLIP classifier":
        unused = ("vision_model.head",)
    wanted = {n for n, _ in visual.named_parameters() if not any(part in n for part in unused)}
    taken = {n: reads.found[id(parameter)] for n, parameter in visual.named_parameters()}
    assert {n for n, count in taken.items() if count} == wanted
    assert {taken[n] for n in wanted} == {1}


AUDIBLE = (
    "timm dist token",
    "timm QK norm",
    "timm map with prefix",
    "hf DINOv2 registers classifier",
    "open_clip CLIP",
)
# Softmax ignores what shifts all scores of a query alike: mathematically these change nothing.
INAUDIBLE = ("pool.q.bias", "k_norm.bias")


@pytest.mark.parametrize("name", AUDIBLE)
def test_every_weight_reaches_the_output(name):
    """A wrong weight would be noticed by the parity check, whichever it is."""
    module = build(name)
    model = adapt(module)
    image = torch.randn(2, 3, *model.spec.image_size, generator=torch.Generator().manual_seed(0))

    def run(params: Any) -> torch.Tensor:
        with torch.inference_mode():
            return forward(Run(params), model.spec, MergeRecipe(r=()), image)

    expected = run(model.params)
    silent = []
    for key, array in model.params.items():
        noise = np.random.default_rng(0).standard_normal(array.shape)
        actual = run({**model.params, key: (array + 0.05 * noise).astype(np.float32)})
        if (actual - expected).abs().max() <= TOLERANCE * expected.abs().max():
            silent.append(key)
    assert [key for key in silent if not key.endswith(INAUDIBLE)] == []


def test_weights_share_memory_with_the_module():
    module = build("timm cls token")
    params = adapt(module).params
    pointers = {tensor.data_ptr() for tensor in module.parameters()}
    assert all(array.__array_interface__["data"][0] in pointers for array in params.values())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_become_float32_and_the_module_stays_as_it_is(kind):
    module = build("timm cls token").to(kind).train()
    model = adapt(module)
    assert {array.dtype for array in model.params.values()} == {np.dtype(np.float32)}
    assert next(module.parameters()).dtype == kind
    assert all(part.training for part in module.modules())


def test_parameters_are_contiguous():
    for name in ("timm SwiGLU gate last", "open_clip ViT", "hf ViT classifier", "hf SigLIP"):
        params = adapt(build(name)).params
        assert all(array.flags.c_contiguous for array in params.values()), name


def test_parity_names_the_first_block_that_differs():
    module = build("timm cls token")
    model = adapt(module)
    found = timm_source.translate(module)
    for key, where in (
        ("pos_embed", "the embedding"),
        ("blocks.0.mlp.fc1.bias", "block 0"),
        ("blocks.1.attn.qkv.weight", "block 1"),
        ("head.bias", "behind the last block"),
    ):
        changed = {**model.params, key: model.params[key] * np.float32(1.5)}
        with pytest.raises(ParityError, match=where):
            check_parity(found.forward, model.with_params(model.spec, changed), blocks=found.blocks)


def test_parity_notices_a_hook_that_changes_the_forward():
    module = build("timm cls token")
    handle = module.blocks[1].mlp.register_forward_hook(lambda *a: a[2] * 1.01)
    with pytest.raises(ParityError, match="block 1"):
        adapt(module)
    handle.remove()
    assert adapt(module).spec.num_layers == 2


def test_parity_refuses_an_original_that_is_not_finite():
    module = build("timm cls token")
    model = adapt(module)
    with pytest.raises(ParityError, match="not finite"):
        check_parity(lambda x: module(x) * float("nan"), model)


def test_nan_weights_are_named():
    module = build("timm cls token")
    with torch.no_grad():
        module.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    with pytest.raises(SourceError, match=r"blocks\.1\.mlp\.fc1\.weight holds 1 values that are NaN"):
        adapt(module)
