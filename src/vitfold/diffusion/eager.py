"""The reference executor: parts run by torch. Graphs are compared with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from vitfold.diffusion.parts import Part
from vitfold.engines import Ends
from vitfold.engines.torch import TorchSession
from vitfold.ops.run import Run


def eager(parts: Mapping[str, Part], ops: Run) -> TorchSession:
    """Return a session of parts over `Run` or what is built on it."""
    calls = {name: functools.partial(part.run, ops) for name, part in parts.items()}
    return TorchSession(calls, ends_of(parts))


def ends_of(parts: Mapping[str, Part]) -> dict[str, Ends]:
    """Return the inputs and outputs of parts."""
    return {name: Ends(part.inputs, part.outputs) for name, part in parts.items()}
