"""What limits a profiled bundle, in sentences with numbers.

The arguments: the largest kind, what is left in float, what conversions cost, what merging costs and saves.
"""

from __future__ import annotations

from vitfold.profile.joining import KindTime, Profile

_NAMES = {
    "linear": "linear layers",
    "attention": "the products of attention",
    "softmax": "softmax",
    "normalization": "normalization",
    "activation": "the activation",
    "quantize": "quantizing and dequantizing",
    "layout": "moving data (transposes, reshapes, slices)",
    "merging": "merging",
    "other": "everything else (residual additions, the engine's own nodes)",
}
_ELEMENTWISE = ("softmax", "normalization", "activation", "layout", "other")


def advise(profile: Profile) -> tuple[str, ...]:
    """Return one sentence per argument, the bottleneck first.

    Source: the questions are those of the bottleneck analysis of INT8 with token merging: operations left in float
    (Amdahl's law), conversions between types, and work that merging adds.
    """
    found = (
        _bottleneck(profile),
        _too_low(profile),
        _left_in_float(profile),
        _conversions(profile),
        _merging(profile),
        _outside(profile),
    )
    return tuple(sentence for sentence in found if sentence is not None)


def _bottleneck(profile: Profile) -> str:
    largest = max(profile.kinds, key=lambda one: one.latency_ns)
    text = f"The bottleneck is {_NAMES[largest.kind]}: {_share(profile, largest.latency_ns)}"
    rate = largest.gmacs_per_s
    if rate is not None:
        text += f", at {rate:.0f} GMAC/s"
    if largest.ceiling_ratio is not None:
        text += f", {_reached(largest.ceiling_ratio)}"
        if largest.kind in ("linear", "attention"):
            text += "; " + _outlook(profile, largest)
    return text + "."


def _too_low(profile: Profile) -> str | None:
    """The bundle's own products were faster than what the machine was seen to reach."""
    if not profile.beyond_ceiling:
        return None
    return (
        'Products ran faster than the ceiling, which was measured while the machine was busier: read "100 % of the '
        'ceiling" as "at least near it", and profile again on a quiet machine.'
    )


def _reached(ratio: float) -> str:
    return f"{100 * ratio:.0f} % of what this machine reaches" if ratio < 0.95 else "the most that this machine reaches"


def _outlook(profile: Profile, largest: KindTime) -> str:
    """What there is to gain in the largest kind."""
    assert largest.ceiling_ratio is not None
    saved = largest.latency_ns * (1 - min(1.0, largest.ceiling_ratio))
    if saved > 0.1 * profile.nodes_ns:
        return f"at the ceiling the model would take {_ms(profile.nodes_ns - saved)} instead of {_ms(profile.nodes_ns)}"
    if largest.kind == "linear" and not largest.work.integer_macs:
        return "only less work makes it faster: integers or fewer tokens"
    return "only less work makes it faster: fewer tokens or fewer bits"


def _left_in_float(profile: Profile) -> str | None:
    """Amdahl's limit of a bundle whose products run in integers."""
    integer = sum(one.work.integer_macs for one in profile.kinds)
    if not integer:
        return None
    macs = sum(one.work.macs for one in profile.kinds)
    float_kinds = [
        one for one in profile.kinds if one.kind in _ELEMENTWISE or (one.kind == "attention" and one.work.float_macs)
    ]
    float_ns = sum(one.latency_ns for one in float_kinds)
    rest_ns = profile.nodes_ns - profile.of("linear").latency_ns
    largest = sorted(float_kinds, key=lambda one: -one.latency_ns)[:3]
    named = ", ".join(f"{_NAMES[one.kind].partition(' (')[0]} {_ms(one.latency_ns)}" for one in largest)
    return (
        f"{100 * integer / macs:.0f} % of the MACs are integer; "
        f"left in float is {_share(profile, float_ns)} ({named}): "
        f"with linear layers for nothing the nodes would still take {_ms(rest_ns)}."
    )


def _conversions(profile: Profile) -> str | None:
    one = profile.of("quantize")
    if not one.nodes:
        return None
    return f"Conversions between float and integers cost {_share(profile, one.latency_ns)}, in {one.nodes} nodes."


def _merging(profile: Profile) -> str | None:
    """Time of the merging nodes against the work that the merged tokens would have been."""
    one = profile.of("merging")
    saved = profile.merging_saves_ns
    if saved is None:
        return None
    verdict = "it pays" if saved > one.latency_ns else "it does not pay here: merge in fewer blocks, or not at all"
    return (
        f"Merging costs {_share(profile, one.latency_ns)}, in {one.nodes} nodes, and saves about {_ms(saved)}, the "
        f"work of the merged tokens at the rates measured here: {verdict}."
    )


def _outside(profile: Profile) -> str | None:
    """What the engine spends between nodes."""
    if profile.outside_ns < 0.1 * profile.fastest_ns:
        return None
    return (
        f"{_ms(profile.outside_ns)} of the fastest profiled {_ms(profile.fastest_ns)} lie between nodes: the engine's "
        "dispatch, its profiler and, on a busy machine, other programs; fewer, larger operations cost less there."
    )


def _share(profile: Profile, ns: float) -> str:
    return f"{_ms(ns)}, {100 * ns / profile.nodes_ns:.0f} % of the nodes' time"


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.2f} ms" if ns < 1e7 else f"{ns / 1e6:.1f} ms"
