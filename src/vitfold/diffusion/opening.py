"""The parts of a Diffusion Transformer made ready to run: a predictor trained, graphs written and opened."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vitfold.artifacts.bundle import Bundle, graph_name
from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.artifacts.steps import Steps
from vitfold.cores import check_threads
from vitfold.diffusion import ReuseMethod, find_method
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.denoiser_parts import denoiser_ends, denoiser_parts
from vitfold.diffusion.eager import eager, ends_of
from vitfold.diffusion.parts import Part, parts
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.solving import SEED
from vitfold.diffusion.token_predictor import TokenPredictor, settle_counts, share_budget, train_predictor
from vitfold.diffusion.token_refresh import predictor_shapes
from vitfold.engines import DEFAULT, ENGINES, Session, check_ends, open_graph, open_session, quantized_target
from vitfold.errors import EngineError, TargetError
from vitfold.model import Array, DenoiserModel, DenoiserSpec, DiTModel, DiTSpec
from vitfold.model.dit import dit_param_shapes
from vitfold.ops.count import Count
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.quantizer import Quantizer
from vitfold.target import TARGETS, Target, find_target

EXECUTORS = tuple(row.name for row in ENGINES.values() if row.several_parts)
_PREDICTOR_FORMAT = 2
"""Counted up where training changes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenPlan:
    """What a method with a budget of tokens needs besides the model: tokens to renew per block, a predictor's weights.

    Scores by chance or by norms have no weights.
    """

    counts: tuple[int, ...]
    params: Mapping[str, Array]


def prepare_tokens(
    model: DiTModel, method: ReuseMethod, steps: int, say: Callable[[str], None] = lambda _: None
) -> TokenPlan | None:
    """Return how a method spends its budget of tokens, with a predictor of as many steps; None where it has none."""
    if method.ratio is None:
        return None
    spec, choice = model.spec, method.choice
    even = () if choice is None else (choice.renewed_tokens(spec, method.ratio),) * spec.num_layers
    if choice is not None and choice.scoring != "predictor":
        return TokenPlan(counts=even, params={})
    predictor = prepare_predictor(model, steps, say)
    counts = even or settle_counts(share_budget(predictor.ranked, method.ratio), spec.tokens)
    return TokenPlan(counts=counts, params=predictor.params)


def prepare_predictor(model: DiTModel, steps: int, say: Callable[[str], None] = lambda _: None) -> TokenPredictor:
    """Train the network that scores tokens, along as many steps as will be drawn; kept for the next run."""
    key = key_of(_PREDICTOR_FORMAT, model.digest(), steps)
    kept = read_arrays("predictors", key)
    if kept is not None and set(kept) == {*predictor_shapes(model.spec), "ranked", "losses"}:
        ranked, (first, last) = kept.pop("ranked"), kept.pop("losses")
        return TokenPredictor(params=kept, ranked=ranked, losses=(float(first), float(last)))
    scheduler = build_scheduler("ddim", model.schedule, steps)
    found = train_predictor(model, scheduler, seed=SEED, say=say)
    keep_arrays("predictors", key, {**found.params, "ranked": found.ranked, "losses": np.array(found.losses)})
    return found


@contextlib.contextmanager
def open_parts(
    model: DiTModel,
    method: ReuseMethod,
    *,
    compression: Compression | None = None,
    tokens: TokenPlan | None = None,
    engine: str = "onnxruntime",
    threads: int | None = None,
) -> Iterator[Session]:
    """Make the parts that a method needs ready to run: as graphs in a temporary folder, or eagerly in torch.

    Raises:
        EngineError: if the engine is unknown or refuses a graph.
    """
    if (method.ratio is not None) != (tokens is not None):
        raise ValueError(f"{method.text} goes with a plan of its tokens, and no other method does")
    compression = compression or Compression()
    found = plan_parts(model.spec, method, () if tokens is None else tokens.counts, compression.r)
    params = step_params(model, compression, tokens)
    if engine == "torch":
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        yield eager(found, Simulate(params, compression.quantizers) if compression.quantizers else Run(params))
        return
    if engine not in EXECUTORS:
        raise EngineError(f"diffusion runs on {' or '.join(EXECUTORS)}, found {engine!r}")
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        write_parts(found, params, Path(folder), compression.quantizers)
        with open_graphs(found, Path(folder), threads, engine=engine) as session:
            yield session


def plan_parts(spec: DiTSpec, method: ReuseMethod, counts: tuple[int, ...], r: int) -> dict[str, Part]:
    """Return the parts that a method runs."""
    scoring = "predictor" if method.choice is None else method.choice.scoring
    found = dict(parts(spec, method.cut, history=method.history, counts=counts, scoring=scoring, r=r))
    if method.cut != "whole":
        del found["step"]
    return found


def parts_of(
    model: DiTModel | DenoiserModel, method: ReuseMethod, counts: tuple[int, ...] = (), r: int = 0
) -> dict[str, Part]:
    """Return the parts of a model that a method runs.

    Raises:
        RecipeError: if the model cannot be cut as the method wants it.
    """
    if isinstance(model, DenoiserModel):
        return denoiser_parts(model, method)
    return plan_parts(model.spec, method, counts, r)


def reused_work(
    spec: DiTSpec | DenoiserSpec, method: ReuseMethod, counts: tuple[int, ...] = (), r: int = 0
) -> float | None:
    """Return the multiply-accumulates of a step that reuses as a share of one in full.

    None where none reuses, or the program is not at hand.
    """
    if not method.reuses or isinstance(spec, DenoiserSpec):
        return None
    if method.guidance:
        return 0.5
    required, optional = dit_param_shapes(spec)
    macs = {}
    for name, part in plan_parts(spec, method, counts, r).items():
        count = Count({**required, **optional, **predictor_shapes(spec)})
        part.run(count, *((1, *port.shape) for port in part.inputs))
        macs[name] = count.macs
    if method.choice is not None:
        share = method.choice.reused_blocks(spec.num_layers) / spec.num_layers
        each = [(1 - share) * macs[f"whole.{b}"] + share * macs[f"renew.{b}"] for b in range(spec.num_layers)]
        return (macs["front"] + sum(each)) / macs["full"]
    full = sum(macs[name] for name in ("full", "front", "rest") if name in macs)
    return sum(macs[name] for name in ("front", "resume", "refresh") if name in macs) / full


def step_params(
    model: DiTModel | DenoiserModel, compression: Compression, tokens: TokenPlan | None
) -> dict[str, Array]:
    """Return all weights that the parts read."""
    return {**(compression.params or model.params), **(tokens.params if tokens is not None else {})}


def write_parts(
    found: Mapping[str, Part],
    params: Mapping[str, Array],
    folder: Path,
    quantizers: Mapping[str, Quantizer] | None = None,
    target: Target | None = None,
) -> None:
    """Write parts as ONNX graphs, by default for ONNX Runtime on this processor, their weights once for all.

    Raises:
        TargetError: naming the site whose quantizer the target cannot execute.
    """
    from vitfold.ops.emit import emit_ports, write_together

    target = target or step_target(quantized=quantizers is not None)
    graphs = {
        name: emit_ports(
            part.run,
            params,
            target,
            quantizers,
            inputs=part.inputs,
            outputs=[port.name for port in part.outputs],
        )
        for name, part in found.items()
    }
    write_together(graphs, folder)


def open_graphs(
    found: Mapping[str, Part], folder: Path, threads: int | None, *, engine: str = DEFAULT, literal: bool = False
) -> Session:
    """Open the graphs of parts that were written to a folder; `literal` ones were written for another engine.

    Raises:
        EngineError: if the engine refuses one.
    """
    return open_graph({name: folder / graph_name(name) for name in found}, engine, threads=threads, literal=literal)


def method_of(steps: Steps) -> ReuseMethod:
    """Return the method of a bundle.

    Raises:
        RecipeError: if this vitfold does not know it.
    """
    method = find_method(steps.plan.reuse)
    return replace(method, mask=steps.mask or None, rows=steps.weights or (), rescale=steps.rescale or ())


def open_steps(bundle: Bundle, threads: int | None = None, *, engine: str | None = None) -> Session:
    """Open the graphs of a bundle, in the engine that they were written for unless another one is named.

    Raises:
        RecipeError: if this vitfold does not know its method.
        BundleError: if a graph is not that of its part.
        EngineError: if the engine refuses a graph, or would compute it wrongly on this processor.
    """
    steps = bundle.manifest.steps
    method = method_of(steps)
    if isinstance(steps.spec, DenoiserSpec):
        ends = denoiser_ends(steps.spec, method)
    else:
        ends = ends_of(plan_parts(steps.spec, method, steps.counts, steps.plan.merge))
    made_for = ENGINES[str(bundle.manifest.target["engine"])]
    if engine is None and made_for.gpu:
        raise EngineError(
            f"{bundle.path} is made for {made_for.name}, which runs one graph at a time here; build "
            f"{' and '.join(f'{graph_name(part)}' for part in steps.parts)} by trtexec or look at them by vitfold "
            "audit, and to draw on this machine make a bundle without --target"
        )
    session = open_session(bundle, threads=threads, engine=engine)
    check_ends(session, ends, bundle.graphs)
    return session


def find_step_target(name: str) -> Target:
    """Return a target that graphs of steps can be written for.

    Raises:
        TargetError: if there is no such target, or its engine runs no steps.
    """
    able = {one.name for one in TARGETS.values() if one.engine in (DEFAULT, "tensorrt") and one.implied_quant != "fp8"}
    target = find_target(name)
    if name.partition(":")[0] not in able:
        raise TargetError(f"steps are not written for {name}; they are for {', '.join(sorted(able))}")
    return target


def step_target(*, quantized: bool) -> Target:
    """Return what graphs of steps are written for: this processor, where they hold integers."""
    return quantized_target(DEFAULT) if quantized else find_target("cpu")
