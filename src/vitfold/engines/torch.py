"""Functions of torch tensors as a session.

The reference executor of a model's parts, the simulation, bundles as torch modules, and the peer that most users run
today, eager or compiled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from vitfold.artifacts.bundle import MAIN
from vitfold.cores import check_threads
from vitfold.engines.session import OPEN_AXIS, Ends, Session
from vitfold.model import Array
from vitfold.ops.protocol import Port

Call = Callable[..., tuple[torch.Tensor, ...]]


class TorchSession(Session):
    """Functions of tensors, one per part; `shown` says how tables call them."""

    def __init__(
        self,
        calls: Mapping[str, Call],
        parts: Mapping[str, Ends],
        *,
        shown: str = "eager",
        threads: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(parts)
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        self._calls, self._shown, self.device = calls, shown, device or torch.device("cpu")
        self.reads_in_place = self.device.type == "cpu"

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"torch {torch.__version__} {self._shown}"

    def _execute(self, part: str, inputs: Sequence[Any], kept: tuple[str, ...]) -> Sequence[Any]:
        with torch.no_grad():
            outputs = self._calls[part](*inputs)
        self._wait()
        return outputs

    def _upload(self, array: Array) -> Any:
        tensor = torch.from_numpy(array).to(self.device)
        self._wait()
        return tensor

    def _download(self, value: Any) -> Array:
        array: Array = (value.float() if value.is_floating_point() else value).cpu().numpy()
        return array

    def _wait(self) -> None:
        """Return when the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def close(self) -> None:
        """Drop the functions and all tensors."""
        super().close()
        self._calls = {}


class Original(torch.nn.Module):
    """A module that gives more than a tensor, or gives it under a name, as one that gives a tensor."""

    def __init__(self, module: torch.nn.Module, first_output: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.module, self._first_output = module, first_output

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """Return the first output."""
        return self._first_output(given)


def module_session(
    module: Any, *, compiled: bool = False, narrow: bool = False, threads: int | None = None
) -> TorchSession:
    """Return a session of a module that maps images (B, 3, H, W) to one output tensor.

    With `narrow` a copy of the module is in bfloat16, and images are cast to it.
    """
    call = copy.deepcopy(module).bfloat16().eval() if narrow else module.eval()
    call = torch.compile(call) if compiled else call
    ends = Ends((Port(name="pixel_values", shape=(OPEN_AXIS,) * 3),), (Port(name="output", shape=(OPEN_AXIS,)),))
    shown = ("compile" if compiled else "eager") + (" bfloat16" if narrow else "")

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (call(x.bfloat16() if narrow else x),)

    return TorchSession({MAIN: run}, {MAIN: ends}, shown=shown, threads=threads)
