"""PyTorch on the CPU: functions of tensors as a session.

The reference executor of a model's parts, the simulation, and the peer that most users run today, eager or
compiled.
"""

from __future__ import annotations

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
        self, calls: Mapping[str, Call], parts: Mapping[str, Ends], *, shown: str = "eager", threads: int | None = None
    ) -> None:
        super().__init__(parts)
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        self._calls, self._shown = calls, shown

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"torch {torch.__version__} {self._shown}"

    def _execute(self, part: str, inputs: Sequence[Array], kept: tuple[str, ...]) -> Sequence[Array]:
        with torch.inference_mode():
            outputs = self._calls[part](*map(torch.from_numpy, inputs))
        return [output.float().numpy() for output in outputs]

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


def module_session(module: Any, *, compiled: bool = False, threads: int | None = None) -> TorchSession:
    """Return a session of a module that maps images (B, 3, H, W) to one output tensor."""
    call = torch.compile(module.eval()) if compiled else module.eval()
    ends = Ends((Port(name="pixel_values", shape=(OPEN_AXIS,) * 3),), (Port(name="output", shape=(OPEN_AXIS,)),))
    shown = "compile" if compiled else "eager"
    return TorchSession({MAIN: lambda x: (call(x),)}, {MAIN: ends}, shown=shown, threads=threads)
