"""Second moments of every layer's input, exact and rounded, and the weights that fit them best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.record import Record
from vitfold.ops.simulate import fake_quantize
from vitfold.progress import Advance, Say
from vitfold.quant.collect import ordinary_rows
from vitfold.quant.methods import QuantMethod
from vitfold.quant.network import Examples, Network
from vitfold.quant.rounding import ROUNDINGS, ridge_weight
from vitfold.quantizer import Quantizer, Uniform

DAMPING = 0.01


@dataclass(slots=True, eq=False)
class Moments:
    """Sums over rows: of the exact input, of the rounded one, of their products, and how many rows."""

    count: int
    exact: Float[Tensor, " I"]
    rounded: Float[Tensor, " I"]
    square: Float[Tensor, "I I"]
    cross: Float[Tensor, "I I"]


def collect_moments(
    network: Network,
    examples: Examples,
    quantizers: Mapping[str, Quantizer],
    *,
    batch: int = 8,
    advance: Advance | None = None,
) -> dict[str, Moments]:
    """Run the float network once more; each layer's input is rounded by its own quantizer, on the float stream."""
    found: dict[str, Moments] = {}

    def see(site: str, value: Tensor) -> None:
        if not site.endswith(".x") or site not in quantizers:
            return
        x = value.reshape(-1, value.shape[-1])[ordinary_rows(value, network.leave_out)]
        x_hat = fake_quantize(x, quantizers[site])
        width = x.shape[1]
        if site not in found:
            found[site] = Moments(
                0, torch.zeros(width), torch.zeros(width), torch.zeros(width, width), torch.zeros(width, width)
            )
        one = found[site]
        one.count += len(x)
        one.exact += x.sum(0)
        one.rounded += x_hat.sum(0)
        one.square.addmm_(x_hat.T, x_hat)
        one.cross.addmm_(x.T, x_hat)

    ops = Record(network.params, see)
    with torch.inference_mode():
        for group in examples.batches(batch):
            network.run(ops, group.inputs)
            if advance is not None:
                advance(group.size)
    return found


def round_weights(
    params: Mapping[str, Array],
    quantizers: Mapping[str, Quantizer],
    moments: Mapping[str, Moments],
    method: QuantMethod,
    *,
    step: Say = lambda _: None,
) -> dict[str, Array]:
    """Return weights on their grids and corrected biases of all quantized layers.

    b' = b + W E[x] - W' E[xq]: what is left of the mean error goes to the bias, exactly.
    """
    changed: dict[str, Array] = {}
    for number, (site, quantizer) in enumerate(quantizers.items(), start=1):
        layer = site.removesuffix(".w")
        if layer == site or not isinstance(quantizer, Uniform):
            continue
        step(f"rounding weights: {layer} {number}/{len(quantizers)}")
        one = moments[f"{layer}.x"]
        weight = torch.from_numpy(params[f"{layer}.weight"])
        mean, mean_hat = one.exact / one.count, one.rounded / one.count
        square = one.square / one.count - torch.outer(mean_hat, mean_hat)
        cross = one.cross / one.count - torch.outer(mean, mean_hat)
        target = weight
        if method.correct:
            target = ridge_weight(weight, square.double(), cross.double(), damping=DAMPING)
        if method.rounding == "nearest":
            final = fake_quantize(target, quantizer)
        else:
            final = ROUNDINGS[method.rounding](target, quantizer, square, damping=DAMPING)
        bias = params.get(f"{layer}.bias", np.zeros(len(weight), np.float32))
        changed[f"{layer}.weight"] = final.numpy()
        changed[f"{layer}.bias"] = (torch.from_numpy(bias) + weight @ mean - final @ mean_hat).numpy()
    return changed
