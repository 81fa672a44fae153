"""PyTorch on the CPU, eager or compiled: the peer that most users run today.

Owns nothing but the wrapping of a module as a session. Bundles never need it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float

from vitfold.engines.session import Session, check_threads
from vitfold.errors import EngineError


class TorchSession(Session):
    """A module that maps images (B, 3, H, W) to one output tensor."""

    def __init__(self, module: torch.nn.Module, *, compiled: bool = False, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        self._compiled = compiled
        self._call = torch.compile(module.eval()) if compiled else module.eval()
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    @property
    def engine(self) -> str:
        """Name and version."""
        return f"torch {torch.__version__}{' compile' if self._compiled else ' eager'}"

    def bind(self, pixel_values: Float[np.ndarray, "B 3 H W"]) -> None:
        """Share the array's memory."""
        self._input = torch.from_numpy(np.ascontiguousarray(pixel_values, np.float32))

    def run(self) -> None:
        """Execute without gradients."""
        if self._input is None:
            raise EngineError("nothing is bound; call bind before run")
        with torch.inference_mode():
            self._output = self._call(self._input)

    def fetch(self) -> Float[np.ndarray, "B ..."]:
        """Copy the output."""
        if self._output is None:
            raise EngineError("nothing has run; call run before fetch")
        return self._output.float().numpy().copy()

    def close(self) -> None:
        """Drop input and output; the module belongs to the caller."""
        self._input = self._output = None
