"""The grids on which codes are handed from product to product, where nothing between them is to be a float.

Queries, keys and values are written as their attention reads them, the output of a layer in front of an activation
function on a grid of its own, and the residual stream in wide integers.

Source: operand reordering (2504.18547), its chain of low-bit operations, drawn through what lies between products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.ops.run import Run
from vitfold.program import Node, Ref
from vitfold.program.queries import attentions_of, linears_of, makers, readers
from vitfold.quant.linear import LinearProblem
from vitfold.quant.network import Examples, Network
from vitfold.quant.ranges import rounded
from vitfold.quantizer import EXPONENTS, NARROW_BITS, STREAM_BITS, STREAM_LIMIT, Quantizer, Uniform

_CODES = 256
_SHARES = tuple(n / 20 for n in range(21))
"""Of the extremes, where the ends of a grid are tried."""
_LEAST = 2.0**-8
"""The magnitude of a stream from which on its steps get finer: eps of a norm, in squared steps, has to fit integers."""
_IMAGES = 32
"""Examples that the largest magnitude of a stream is taken from."""


def hand_on(
    network: Network,
    problems: Mapping[str, LinearProblem],
    quantizers: Mapping[str, Quantizer],
    examples: Examples,
) -> dict[str, Quantizer]:
    """Return the quantizers of `{layer}.out`, `{attention}.logits` and `{norm}.x`, where codes can go on."""
    found = dict(_attended(network, quantizers))
    found |= _activated(network, problems, quantizers)
    return found | _streams(network, quantizers, examples)


def _attended(network: Network, quantizers: Mapping[str, Quantizer]) -> Iterator[tuple[str, Quantizer]]:
    """Yield the grids of queries, keys and values, one behind the other, and of logits."""
    made_by = makers(network.program)
    for node in attentions_of(network.program):
        q, k, v, softmax = (_narrow(quantizers, f"{node.site}.{name}") for name in ("q", "k", "v", "softmax"))
        if q is None or k is None:
            continue
        yield f"{node.site}.logits", EXPONENTS
        operands = tuple(node.operand(name) for name in ("q", "k", "v"))
        maker = made_by.get(operands[0])
        if v is None or softmax is None or maker is None or maker.op != "heads" or maker.outputs != operands:
            continue
        if _narrow(quantizers, f"{maker.site}.x") is not None:
            width = len(network.params[f"{maker.site}.weight"]) // 3
            yield f"{maker.site}.out", _side_by_side((q, k, v), width)


def _side_by_side(grids: tuple[Uniform, ...], width: int) -> Uniform:
    """Grids of neighbouring channels, `width` each, as one."""
    scale = np.repeat([one.scale for one in grids], width)
    zero_point = np.repeat([one.zero_point - one.low for one in grids], width)
    return Uniform(scale=scale, zero_point=zero_point, low=0, high=_CODES - 1, axis=-1)


def _activated(
    network: Network, problems: Mapping[str, LinearProblem], quantizers: Mapping[str, Quantizer]
) -> dict[str, Quantizer]:
    """Return the grids of what activation functions between two products of integers read."""
    made_by, read_by, found = makers(network.program), readers(network.program), dict[str, Quantizer]()
    for node in network.program.nodes:
        maker = made_by.get(node.source) if node.op == "activation" else None
        if maker is None or maker.op != "linear" or maker.attributes.get("rows") or read_by[node.source] != (node,):
            continue
        following, layer = read_by[node.outputs[0]], maker.site
        inputs, weight = _narrow(quantizers, f"{layer}.x"), quantizers.get(f"{layer}.w")
        if inputs is None or weight is None or not following or layer not in problems:
            continue
        if all(one.op == "linear" and _narrow(quantizers, f"{one.site}.x") is not None for one in following):
            problem = problems[layer]
            raw = rounded(problem.samples.x, inputs) @ rounded(problem.weight, weight).T
            bias = network.params.get(f"{layer}.bias")
            raw = raw if bias is None else raw + torch.from_numpy(bias)
            found[f"{layer}.out"] = _search(raw, problem.samples.share, node)
    return found


def _search(raw: Float[Tensor, "R O"], share: Float[Tensor, "R 1"], node: Node) -> Uniform:
    """Return the grid of 256 codes with the least squared error behind the activation function, end by end."""
    ops, kind = Run({}), str(node.attributes["kind"])
    wanted = ops.activation(kind, raw, node.site)
    least, most = min(float(raw.min()), 0.0), max(float(raw.max()), 0.0)

    def error(candidate: Uniform) -> float:
        given = ops.activation(kind, rounded(raw, candidate), node.site)
        return float((given - wanted).square_().mul_(share).mean())

    low = min(_SHARES, key=lambda one: error(_affine(one * least, most))) * least
    return min((_affine(low, one * most) for one in _SHARES[1:]), key=error)


def _affine(low: float, high: float) -> Uniform:
    """The codes 0..255 from `low` to `high`, zero among them."""
    scale = max((high - low) / (_CODES - 1), 1e-12)
    return Uniform(scale=np.array(scale), zero_point=np.array(round(-low / scale)), low=0, high=_CODES - 1)


def _streams(network: Network, quantizers: Mapping[str, Quantizer], examples: Examples) -> dict[str, Quantizer]:
    """Return the grid of the residual stream for every norm that only products of integers read, and every writer."""
    program, read_by = network.program, readers(network.program)
    norms = [node for node in program.nodes if node.op == "layer_norm" and _taken(read_by, node.outputs[0], quantizers)]
    if not norms:
        return {}
    largest = _largest(network, {node.site for node in norms}, examples)
    step = 2.0 ** (math.ceil(math.log2(max(largest, _LEAST))) - STREAM_BITS)
    grid = Uniform(scale=np.array(step), zero_point=np.array(0), low=-STREAM_LIMIT, high=STREAM_LIMIT - 1)
    found: dict[str, Quantizer] = {f"{node.site}.x": grid for node in norms}
    for node in linears_of(program):
        following = read_by[node.outputs[0]] if node.op == "linear" else ()
        added = len(following) == 1 and following[0].op == "add" and following[0].shapes == node.shapes
        if added and not node.attributes.get("rows") and _narrow(quantizers, f"{node.site}.x") is not None:
            found[f"{node.site}.out"] = grid
    return found


def _taken(read_by: Mapping[Ref, tuple[Node, ...]], value: Ref, quantizers: Mapping[str, Quantizer]) -> bool:
    """Say whether all that reads a value, or rows of it, are layers that take its codes."""
    return bool(read_by[value]) and all(
        _taken(read_by, one.outputs[0], quantizers)
        if one.op in ("slice", "reshape")
        else one.op in ("linear", "heads") and _narrow(quantizers, f"{one.site}.x") is not None
        for one in read_by[value]
    )


def _largest(network: Network, norms: set[str], examples: Examples) -> float:
    """Return the largest magnitude that reaches these norms."""
    seen = _Inputs(network, norms)
    taken = 0
    with torch.inference_mode():
        for group in examples.batches(8):
            network.run(seen, group.inputs)
            taken += group.size
            if taken >= _IMAGES:
                break
    return seen.largest


class _Inputs(Run):
    """`Run` that remembers the largest magnitude in front of some norms."""

    def __init__(self, network: Network, norms: set[str]) -> None:
        super().__init__(network.params)
        self._norms, self.largest = norms, 0.0

    def layer_norm(self, layer: str, x: Float[Tensor, "*B D"], eps: float) -> Float[Tensor, "*B D"]:
        """LayerNorm; seen: its input."""
        if layer in self._norms:
            self.largest = max(self.largest, float(x.abs().max()))
        return super().layer_norm(layer, x, eps)


def _narrow(quantizers: Mapping[str, Quantizer], site: str) -> Uniform | None:
    """The quantizer of a site whose codes are of 8 bits, with one scale; None where it has another."""
    found = quantizers.get(site)
    if not isinstance(found, Uniform) or found.axis is not None or found.bits > NARROW_BITS:
        return None
    return found if found.high - found.low == _CODES - 1 else None
