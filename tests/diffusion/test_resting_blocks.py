"""Blocks that rest: found by structure, bit-equal where all are computed, really skipped where they are not."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pipelining import FAMILIES, B, Family
from vitfold.diffusion.pipelines.choosing import solve
from vitfold.diffusion.pipelines.recording import Recorder
from vitfold.diffusion.pipelines.stacks import Stack, StackFinder
from vitfold.diffusion.pipelines.stepping import Steps, rest
from vitfold.errors import UnsupportedError

STEPS = 6
Call = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def scheduler() -> Any:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)


def draw(
    family: Family, module: Any, sampler: Any, dtype: torch.dtype = torch.float32, call: Call | None = None
) -> Any:
    """Draw as a pipeline does: timesteps, then the transformer and a step of the scheduler in turn."""
    x = torch.randn(family.latent, generator=torch.Generator().manual_seed(1)).to(dtype)
    sampler.set_timesteps(STEPS)
    with torch.no_grad():
        for t in sampler.timesteps:
            x = sampler.step((call or family.call)(module, x, t), t, x, return_dict=False)[0].to(dtype)
    return x


def stack_of(family: Family, module: Any) -> Stack:
    finder = StackFinder(module)
    with torch.no_grad():
        family.call(module, torch.zeros(family.latent), torch.tensor(500.0))
    assert finder.stack is not None
    return finder.stack


def count_calls(module: Any, stack: Stack) -> list[int]:
    counts = [0] * len(stack.blocks(module))
    for i, (block, _) in enumerate(stack.blocks(module)):
        former = block.forward

        def counted(*args: Any, i: int = i, former: Any = former, **kwargs: Any) -> Any:
            counts[i] += 1
            return former(*args, **kwargs)

        block.forward = counted
    return counts


@pytest.fixture(params=sorted(FAMILIES))
def family(request: Any) -> Family:
    return FAMILIES[request.param]


def test_blocks_are_found_by_structure(family: Family) -> None:
    stack = stack_of(family, family.build())
    assert tuple(part.name for part in stack.parts) == family.blocks
    assert tuple(part.streams for part in stack.parts) == family.streams
    assert sum(part.count for part in stack.parts) == family.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_steps_in_full_are_bit_equal_and_reused_ones_skip_the_blocks(family: Family, dtype: torch.dtype) -> None:
    module, sampler = family.build(), scheduler()
    stack = stack_of(family, module)
    module = module.to(dtype)
    plain = draw(family, module, sampler, dtype)
    counts = count_calls(module, stack)
    for full, calls in ((frozenset(range(STEPS)), STEPS), (frozenset({0, 1, 3, 5}), 4)):
        counts[:] = [0] * family.count
        steps = Steps(scheduler=sampler, full=full, position="sigma")
        steps.install()
        rest(steps, module, stack)
        found = draw(family, module, sampler, dtype)
        steps.remove()
        assert counts == [calls] * family.count
        assert torch.equal(found, plain) == (calls == STEPS)
        assert torch.isfinite(found).all()
    assert torch.equal(draw(family, module, sampler, dtype), plain)


def test_a_forecast_is_the_line_through_what_the_blocks_added(family: Family) -> None:
    module, sampler = family.build(), scheduler()
    stack = stack_of(family, module)
    last = stack.blocks(module)[-1][0]
    seen: dict[int, torch.Tensor] = {}
    steps = Steps(scheduler=sampler, full=frozenset({0, 1, 3, 5}), position="sigma")
    entered: list[torch.Tensor] = []
    steps.install()

    def note(block: Any, args: Any, kwargs: Any) -> None:
        entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def note_out(block: Any, args: Any, output: Any) -> None:
        image = output if isinstance(output, torch.Tensor) else output[stack.parts[-1].streams.index("image")]
        seen[steps.step] = image - entered[-1]

    hooks = [stack.blocks(module)[0][0].register_forward_pre_hook(note, with_kwargs=True)]
    hooks.append(last.register_forward_hook(note_out))
    rest(steps, module, stack)
    draw(family, module, sampler)
    steps.remove()
    for hook in hooks:
        hook.remove()
    at = steps.places["sigma"]
    slope = (at[2] - at[1]) / (at[1] - at[0])
    torch.testing.assert_close(seen[2], seen[1] + slope * (seen[1] - seen[0]), rtol=1e-4, atol=1e-4)


def test_passes_keep_their_own_residuals_apart_or_in_one_batch() -> None:
    family = FAMILIES["dit"]
    module, sampler = family.build(), scheduler()
    stack = stack_of(family, module)

    def labelled(rows: torch.Tensor, t: torch.Tensor, labels: list[int]) -> torch.Tensor:
        at = t.reshape(1).expand(len(rows))
        return module(rows, timestep=at, class_labels=torch.tensor(labels), return_dict=False)[0]

    def apart(_: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without = labelled(x, t, [10] * B)
        return without + 3 * (labelled(x, t, [1, 2]) - without)

    def together(_: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without, with_class = labelled(torch.cat([x, x]), t, [10] * B + [1, 2]).chunk(2)
        return without + 3 * (with_class - without)

    found = []
    for call in (apart, together):
        steps = Steps(scheduler=sampler, full=frozenset({0, 1, 3, 5}))
        steps.install()
        rest(steps, module, stack)
        found.append(draw(family, module, sampler, call=call))
        steps.remove()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_signatures_that_pipelines_ask_for_stay_and_copies_do_not_count() -> None:
    sampler = scheduler()
    before = [inspect.signature(one) for one in (sampler.step, sampler.set_timesteps)]
    steps = Steps(scheduler=sampler)
    steps.install()
    assert [inspect.signature(one) for one in (sampler.step, sampler.set_timesteps)] == before
    sampler.set_timesteps(3)
    other = copy.deepcopy(sampler)
    other.step(torch.zeros(1), other.timesteps[0], torch.zeros(1))
    assert (steps.step, sampler.step_index, other.step_index) == (0, None, 1)
    with pytest.raises(UnsupportedError, match="call vitfold.restore"):
        Steps(scheduler=sampler).install()


def test_no_blocks_of_one_shape() -> None:
    class Funnel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    module = Funnel()
    StackFinder(module)
    with pytest.raises(UnsupportedError, match="no list of blocks was found in Funnel"):
        module(torch.zeros(1, 4))


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ],
)
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
def test_schedulers_of_all_kinds_are_counted_and_weighed(name: str, first: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    family = FAMILIES["dit"]
    module, sampler = family.build(), getattr(diffusers, name)()
    stack = stack_of(family, module)
    recorder = Recorder(scheduler=sampler, transformers={"transformer": module}, stacks={"transformer": stack})
    x = torch.randn(1, *family.latent[1:], generator=torch.Generator().manual_seed(0))
    sampler.set_timesteps(8)
    if first and hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first)
    taken = sampler.timesteps[first:]
    with torch.no_grad():
        for t in taken:
            at = t.reshape(1).expand(1)
            entering = sampler.scale_model_input(x, t) if hasattr(sampler, "scale_model_input") else x
            found = module(entering, timestep=at, class_labels=torch.tensor([3]), return_dict=False)[0]
            x = sampler.step(found, t, x, return_dict=False)[0]
    recorder.close()
    trace = recorder.trace()
    assert "step" not in vars(sampler)
    assert (trace.first, len(trace.gram), trace.timesteps) == (first, len(taken), len(sampler.timesteps))
    assert (trace.weights >= 0).all()
    assert trace.weights.sum() > 0
    assert np.isfinite(trace.gram).all()
    assert "step" in trace.places
    solved = solve(trace)
    assert all(len(full) == count for count, (_, full) in solved.items())
