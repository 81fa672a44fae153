"""Times and work meet: sums are kept, rates are ratios, and the sentences carry the numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.engines.session import EngineProfile, NodeTime, take_turns
from vitfold.pipeline import count_costs
from vitfold.profile import KINDS, Ceiling, advise, ceiling_of, join, probes
from vitfold.recipe import MergeRecipe

CEILING = Ceiling(float_gmacs=10.0, integer_gmacs=40.0, copy_gbytes=8.0)
NAMES = (
    "patch_embed", "blocks.0.norm1", "blocks.0.attn.qkv", "blocks.0.attn.qk", "blocks.0.attn.softmax",
    "blocks.0.merge.x",
    "blocks.0.mlp.fc1.x", "blocks.0.mlp.fc1", "blocks.0.mlp.act", "blocks.1.attn.qkv", "blocks.1.mlp.fc2",
    "What_1", "head",
)  # fmt: skip


def measured(*nodes: NodeTime, profiled_ns: int = 10_000_000, plain_ns: int = 8_000_000) -> EngineProfile:
    return EngineProfile(nodes=nodes, profiled_ns=(profiled_ns,), plain_ns=(plain_ns,))


def node(name: str, ms: float, op: str = "", *, integer: bool = False) -> NodeTime:
    return NodeTime(name=name, op=op, latency_ns=ms * 1e6, integer=integer)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0, 1e7)), min_size=1, max_size=30), st.integers(1, 8))
def test_no_time_and_no_work_is_lost(tiny_model, found: list[tuple[str, float]], batch: int) -> None:
    costs = count_costs(tiny_model().spec, MergeRecipe(r=(3, 3)))
    nodes = [NodeTime(name=name, op="", latency_ns=ns) for name, ns in found]
    joined = join(measured(*nodes), costs, batch=batch)
    total = sum(ns for _, ns in found)
    assert np.isclose(joined.nodes_ns, total)
    assert np.isclose(sum(sum(block.latency_ns.values()) for block in joined.blocks), total)
    assert sum(one.work.macs for one in joined.kinds) == batch * sum(cost.macs for cost in costs)
    assert sum(one.nodes for one in joined.kinds) == len(found)
    assert [one.kind for one in joined.kinds] == list(KINDS)


def test_rates_and_ceiling_are_those_of_the_work(tiny_model) -> None:
    costs = count_costs(tiny_model().spec, MergeRecipe(r=()))
    linear = [cost for cost in costs if cost.kind == "linear"]
    nodes = [node(cost.site, 0.5, integer=cost.site != "patch_embed") for cost in linear]
    found = join(measured(*nodes), costs, batch=2, ceiling=CEILING).of("linear")
    macs = 2 * sum(cost.macs for cost in linear)
    embed = 2 * next(cost.macs for cost in linear if cost.site == "patch_embed")
    time = 0.5e6 * len(linear)
    assert found.gmacs_per_s == pytest.approx(macs / time)
    assert (found.work.float_macs, found.work.integer_macs) == (embed, macs - embed)
    weights = sum(cost.weight_bytes // (1 if cost.site == "patch_embed" else 4) for cost in linear)
    assert found.work.moved_bytes == 2 * sum(cost.activation_bytes for cost in linear) + weights
    least = max(embed / 10 + (macs - embed) / 40, weights / 8)
    assert found.ceiling_ratio == pytest.approx(least / time)


def test_a_ceiling_from_a_busy_moment_is_told_and_never_exceeded(tiny_model) -> None:
    costs = count_costs(tiny_model().spec, MergeRecipe(r=()))
    slow = join(measured(node("blocks.0.mlp.fc1", 6.0)), costs, batch=1, ceiling=CEILING)
    fast = join(measured(node("blocks.0.mlp.fc1", 1e-6)), costs, batch=1, ceiling=CEILING)
    assert not slow.beyond_ceiling
    assert fast.beyond_ceiling
    assert fast.to_dict()["beyond_ceiling"]
    assert fast.of("linear").ceiling_ratio == 1.0
    assert any("measured while the machine was busier" in sentence for sentence in advise(fast))
    assert not any("busier" in sentence for sentence in advise(slow))


def test_what_merging_saves_is_the_work_at_the_same_rate(tiny_model) -> None:
    spec = tiny_model().spec
    merged, unmerged = (count_costs(spec, MergeRecipe(r=r)) for r in ((4, 4), ()))
    nodes = [node("blocks.1.mlp.fc1", 2.0), node("blocks.1.mlp.fc2", 2.0), node("blocks.0.merge.x", 0.5)]
    joined = join(measured(*nodes), merged, batch=1, unmerged=unmerged)

    def linear(costs):
        return sum(cost.macs for cost in costs if cost.kind == "linear" and cost.site.startswith("blocks.1."))

    assert joined.merging_saves_ns == pytest.approx(4e6 * (linear(unmerged) / linear(merged) - 1))
    text = " ".join(advise(joined))
    assert "Merging costs 0.50 ms, 11 % of the nodes' time, in 1 nodes" in text
    assert ("it pays" in text) == (joined.merging_saves_ns > 0.5e6)
    slow = join(measured(*nodes[:2], node("blocks.0.merge.x", 50.0)), merged, batch=1, unmerged=unmerged)
    assert "does not pay" in " ".join(advise(slow))
    assert join(measured(*nodes), merged, batch=1).merging_saves_ns is None


def test_sentences_name_the_bottleneck_and_what_is_left_in_float(tiny_model) -> None:
    costs = count_costs(tiny_model().spec, MergeRecipe(r=()))
    nodes = [
        node("blocks.0.mlp.fc1", 6.0, integer=True),
        node("blocks.0.attn.softmax", 2.0),
        node("blocks.0.mlp.act", 1.0),
        node("blocks.0.mlp.fc1.x", 0.5, "QuantizeLinear"),
    ]
    joined = join(measured(*nodes), costs, batch=1, ceiling=CEILING)
    first, left, conversions = advise(joined)
    assert first.startswith("The bottleneck is linear layers: 6.00 ms, 63 % of the nodes' time, at 0 GMAC/s")
    assert "left in float is 3.00 ms, 32 %" in left
    assert "softmax 2.00 ms" in left
    assert "would still take 3.50 ms" in left
    assert conversions == "Conversions between float and integers cost 0.50 ms, 5 % of the nodes' time, in 1 nodes."
    assert joined.overhead_ratio == pytest.approx(0.25)
    assert joined.outside_ns == pytest.approx(0.5e6)
    floats = join(measured(*[replace(one, integer=False) for one in nodes[:3]]), costs, batch=1)
    assert [sentence.partition(":")[0] for sentence in advise(floats)][:1] == ["The bottleneck is linear layers"]
    assert not any("left in float" in sentence for sentence in advise(floats))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_ceiling_is_measured_in_the_engine(engine: str) -> None:
    pytest.importorskip(engine)
    with probes(engine, target="cpu", threads=1) as calls:
        turns = take_turns(lambda: None, lambda: None, calls, runs=2)
    assert {name: len(samples) for name, samples in turns.beside_ns.items()} == {"float": 2, "integer": 2, "copy": 2}
    found = ceiling_of(turns.beside_ns)
    assert found.integer_gmacs > 0
    assert found.copy_gbytes > 0
    assert found.least_ns(float_macs=found.float_gmacs, integer_macs=0, read_bytes=0) == pytest.approx(1)
    assert found.least_ns(float_macs=1, integer_macs=1, read_bytes=1e9) == pytest.approx(1e9 / found.copy_gbytes)
