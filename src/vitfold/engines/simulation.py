"""The simulation of quantization and of half precision as a session: for what no engine here executes.

It is never timed: a simulation is slower than the float model, and its time says nothing about integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitfold.architectures.programs import forward, plain_program
from vitfold.artifacts.bundle import MAIN, QUANTIZERS, WEIGHTS, Bundle
from vitfold.engines.session import OPEN_AXIS, Ends
from vitfold.engines.torch import TorchSession
from vitfold.errors import BundleError, SourceError
from vitfold.model import Architecture, Array
from vitfold.model.params import check_params
from vitfold.ops.half import Half
from vitfold.ops.protocol import Port
from vitfold.ops.simulate import Simulate
from vitfold.program.queries import attentions_of
from vitfold.quantizer import Float8, Quantizer, Shifted, Uniform, load_quant_params
from vitfold.recipe import MergeRecipe
from vitfold.storage.ordinary import check_ordinary


class SimulationSession(TorchSession):
    """A model whose weights lie on their grids, with its quantizers; `reordered` as target "integer" computes.

    `half` rounds every value to FP16, as a graph of that type states it.
    """

    def __init__(
        self,
        spec: Architecture,
        params: Mapping[str, Array],
        quantizers: Mapping[str, Quantizer],
        merge: MergeRecipe,
        *,
        reordered: bool = False,
        half: bool = False,
        threads: int | None = None,
    ) -> None:
        ops = Half(params, quantizers) if half else Simulate(params, quantizers, reordered=reordered)
        ends = Ends(
            (Port(name=spec.input, shape=spec.input_shape),),
            (Port(name=spec.output, shape=(OPEN_AXIS,)),),
        )
        super().__init__({MAIN: lambda x: (forward(ops, spec, merge, x),)}, {MAIN: ends}, threads=threads)
        self._half = ops if isinstance(ops, Half) else None

    @property
    def engine(self) -> str:
        """Its name, as tables show it."""
        return "simulation (not executed)"

    def check_half(self) -> tuple[float, str] | None:
        """Return the largest number that half precision had to hold so far, and its site; None in single precision.

        Raises:
            EngineError: if a value was larger than half precision can hold.
        """
        return None if self._half is None else self._half.check()


def open_simulation(bundle: Bundle, *, threads: int | None = None) -> SimulationSession:
    """Open a bundle that holds weights and quantizers.

    Raises:
        BundleError: if they cannot be read.
        EngineError: if torch is not installed.
    """
    manifest = bundle.manifest
    weights, quantizers = _weights(bundle.path / WEIGHTS), load_quant_params(bundle.path / QUANTIZERS)
    try:
        check_params(manifest.spec, weights)
    except SourceError as error:
        raise BundleError(f"{bundle.path / WEIGHTS} does not fit the manifest: {error}") from None
    for site, quantizer in quantizers.items():
        if not _fits(site, quantizer, manifest.spec, weights):
            raise BundleError(f"{bundle.path / QUANTIZERS} does not fit the weights at {site}; make the bundle again")
    return SimulationSession(manifest.spec, weights, quantizers, manifest.recipe.merge, threads=threads)


def _fits(site: str, quantizer: Quantizer, spec: Architecture, weights: Mapping[str, Array]) -> bool:
    """Say whether a quantizer has one scale, or one per channel or head of what it rounds."""
    layer, _, operand = site.rpartition(".")
    if isinstance(quantizer, Shifted):
        axis, count = -1, len(quantizer.offset)
    elif isinstance(quantizer, Uniform | Float8) and quantizer.axis is not None:
        axis, count = quantizer.axis, len(quantizer.scale)
    else:
        axis, count = None, 0
    if operand in ("q", "k", "v", "softmax"):
        heads = {node.site: node.shapes[0][1] for node in attentions_of(plain_program(spec))}
        return axis is None or (axis == 1 and count == heads.get(layer))
    weight = weights.get(f"{layer}.weight", weights.get(f"{layer.rpartition('.')[0]}.weight"))
    if weight is None or (operand == "w" and axis not in (None, 0)) or axis == 1:
        return False
    return axis is None or count == weight.shape[0 if axis == 0 else 1]


def _weights(path: Path) -> Mapping[str, Array]:
    try:
        check_ordinary(path)
        weights: dict[str, Array] = load_file(path)
    except SafetensorError:
        raise BundleError(f"{path} is no whole file of tensors; make the bundle again") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}); make the bundle again") from None
    except (KeyError, TypeError):  # a number type that NumPy lacks
        raise BundleError(f"{path} holds weights of an unknown type; make the bundle again") from None
    return weights
