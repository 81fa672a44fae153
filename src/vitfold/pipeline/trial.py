"""Plans run for a moment, to be timed side by side before any bundle is written."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from vitfold.bench.comparison import DecodedAhead, stop_decoding
from vitfold.bench.measurement import Measurement, Scope
from vitfold.bench.timing import Protocol, interleave
from vitfold.engines import Session, open_graph
from vitfold.errors import EngineError
from vitfold.images import ImageSet
from vitfold.model import Architecture, Preprocess
from vitfold.model.spec import noise
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.writing import write_graph
from vitfold.products import products_of_recipe

SHORT = Protocol(trials=7, seconds=2.0)
MOST_SECONDS = "VITFOLD_RACE_SECONDS"
"""The environment variable that bounds how long a race, a search or a sweep times one subject."""


@contextmanager
def opened(folded: Plan, open_file: Callable[..., Session] = open_graph) -> Iterator[Session]:
    """Write the graph of a plan to a temporary folder and open it in the engine of its target."""
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        path = Path(folder) / "model.onnx"
        write_graph(folded, path)
        with open_file(
            path,
            folded.target.engine,
            products=products_of_recipe(folded.target.to_dict(), folded.recipe.quant),
            batch=folded.batch,
        ) as session:
            yield session


def timed(sessions: Mapping[str, Session], spec: Architecture, *, protocol: Protocol = SHORT) -> dict[str, Measurement]:
    """Time sessions on the same random images (B, channels, height, width), interleaved, engine only.

    Raises:
        EngineError: if $VITFOLD_RACE_SECONDS is no number of seconds.
    """
    pixels = noise(spec, protocol.batch)
    for session in sessions.values():
        session.bind({session.input: pixels})
    return _measured(sessions, {name: session.run for name, session in sessions.items()}, "engine", protocol)


def timed_ahead(
    sessions: Mapping[str, Session], preprocess: Preprocess, images: ImageSet, *, protocol: Protocol
) -> dict[str, Measurement]:
    """Time sessions on images from file to label, interleaved, while threads decode the next ones.

    Raises:
        ImageError: if an image cannot be read.
    """
    calls = {name: DecodedAhead(one, preprocess, protocol.batch, images) for name, one in sessions.items()}
    return _measured(sessions, calls, "decoded_ahead", protocol)


def _measured(
    sessions: Mapping[str, Session], calls: Mapping[str, Callable[[], None]], scope: Scope, protocol: Protocol
) -> dict[str, Measurement]:
    samples = interleave(
        calls,
        trials=protocol.trials,
        seconds=min(protocol.seconds, _most_seconds()),
        warmup=protocol.warmup,
        iterations=protocol.iterations,
        between=partial(stop_decoding, list(calls.values())),
    )
    return {
        name: Measurement(
            subject=name, engine=session.engine, batch=protocol.batch, scope=scope, trials_ns=samples[name]
        )
        for name, session in sessions.items()
    }


def _most_seconds() -> float:
    text = os.environ.get(MOST_SECONDS, "").strip()
    try:
        seconds = float(text) if text else math.inf
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise EngineError(f"{MOST_SECONDS}={text!r} is no number of seconds; give one such as 0.5, or leave it out")
    return seconds
