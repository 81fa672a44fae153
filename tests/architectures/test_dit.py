"""The program of a Diffusion Transformer against diffusers' own module, and its tables against theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diffusing import ORIGIN, SCHEDULE, build_module, build_tiny_dit
from vitfold.diffusion.parts import parts
from vitfold.errors import ParityError, SourceError
from vitfold.model.dit import DiTSpec, dit_param_shapes, sincos_positions, timestep_embedding
from vitfold.ops.count import Count
from vitfold.sources.diffusers import check_dit_parity, translate


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"out_channels": 2},
        {"in_channels": 4, "out_channels": 8, "patch_size": 2},
        {"activation_fn": "gelu"},
        {"attention_bias": False},
        {"num_layers": 3, "sample_size": 20},
    ],
    ids=str,
)
def test_equals_diffusers(changed: dict[str, Any]) -> None:
    module = build_module(**changed)
    model = translate(module, SCHEDULE, origin=ORIGIN)
    assert check_dit_parity(module, model, seed=5) < 1e-5
    assert model.spec.learned_sigma == (model.spec.outputs == 2 * model.spec.channels)


def test_blocks_that_embed_the_condition_differently_are_told_apart() -> None:
    module = build_module()
    model = translate(module, SCHEDULE, origin=ORIGIN)
    first, second = (model.params[f"blocks.{i}.condition.time.fc1.weight"] for i in range(2))
    params = {**model.params, "blocks.1.condition.time.fc1.weight": first}
    assert not np.array_equal(first, second)
    broken = type(model)(spec=model.spec, params=params, schedule=SCHEDULE, labels=None, origin=ORIGIN)
    with pytest.raises(ParityError, match="differs from diffusers"):
        check_dit_parity(module, broken)


def test_tables_are_those_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(32, 6, base_size=6, output_type="pt")
    np.testing.assert_allclose(sincos_positions(6, 32)[0], theirs, atol=1e-6)
    spec = build_tiny_dit().spec
    timesteps = np.arange(0, 1000, 37)
    waves = embeddings.get_timestep_embedding(torch.from_numpy(timesteps), 256, True, 1)
    np.testing.assert_allclose(timestep_embedding(spec, timesteps), waves, atol=2e-4)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(SourceError, match="activation 'geglu'"):
        translate(build_module(activation_fn="geglu"), SCHEDULE, origin=ORIGIN)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"patch_size": 5}, "does not divide"),
        ({"num_heads": 5}, "multiple of the 5 heads"),
        ({"outputs": 3}, "as many, or twice"),
        ({"classes": 0}, "classes must be positive"),
        ({"activation": "geglu"}, "unsupported activation"),
    ],
    ids=str,
)
def test_a_half_made_spec_is_refused(wrong: dict[str, Any], said: str, without_type_checks: None) -> None:
    sound: dict[str, Any] = {
        "image_size": 16, "patch_size": 4, "channels": 1, "outputs": 1, "embed_dim": 32,
        "num_layers": 2, "num_heads": 4, "mlp_dim": 64, "classes": 3,
    }  # fmt: skip
    DiTSpec(**sound)
    with pytest.raises(SourceError, match=said):
        DiTSpec(**{**sound, **wrong})


def test_merging_equal_tokens_changes_nothing() -> None:
    """Every token stands beside its twin: merging each pair, with sizes in the attention, loses nothing."""
    import torch

    from vitfold.architectures.dit import attention
    from vitfold.ops.protocol import Port
    from vitfold.ops.run import Run
    from vitfold.program import replay, trace
    from vitfold.transforms.merging import merged_around_attention

    model = build_tiny_dit()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, model.spec.tokens // 2, model.spec.embed_dim, generator=generator).repeat_interleave(2, 1)
    given = tuple(0.3 * torch.randn(2, 1, model.spec.embed_dim, generator=generator) for _ in range(14))
    required, optional = dit_param_shapes(model.spec)
    shapes = required | optional
    vectors = tuple(Port(name=f"m{i}", shape=(1, model.spec.embed_dim)) for i in range(14))
    program = trace(
        lambda ops, x, *m: attention(ops, model.spec, 1, x, m),
        shapes,
        inputs=(Port(name="x", shape=(model.spec.tokens, model.spec.embed_dim)), *vectors),
        outputs=("y",),
    )
    (whole,) = replay(program, Run(model.params), x, *given)
    halved = merged_around_attention(program, shapes, model.spec.tokens // 2)
    (merged,) = replay(halved, Run(model.params), x, *given)
    assert halved != program
    np.testing.assert_allclose(merged, whole, atol=1e-5)


def test_a_resumed_step_multiplies_embedding_and_head_alone() -> None:
    spec = build_tiny_dit().spec
    required, optional = dit_param_shapes(spec)
    macs = {}
    for name, part in parts(spec, "stack", history=2).items():
        count = Count({**required, **optional})
        part.run(count, *((1, *port.shape) for port in part.inputs))
        macs[name] = count.macs
    patches = spec.tokens * spec.embed_dim * spec.patch_size**2 * (spec.channels + spec.outputs)
    per_block = (
        spec.tokens * (4 * spec.embed_dim**2 + 2 * spec.embed_dim * spec.mlp_dim) + 2 * spec.tokens**2 * spec.embed_dim
    )
    assert macs["resume"] == patches
    assert macs["step"] == macs["full"] == patches + spec.num_layers * per_block
