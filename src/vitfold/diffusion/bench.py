"""Bundles of steps side by side: each by its own plan, every step in full, and plainly fewer steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from vitfold.artifacts.bundle import Bundle
from vitfold.diffusion import every_step
from vitfold.diffusion.compare import SamplerRow, SamplingConfig, Variant, add_fewer_steps, check_asked, compare
from vitfold.diffusion.judge import Judge
from vitfold.diffusion.opening import method_of, open_steps, reused_work
from vitfold.diffusion.peers import open_peers
from vitfold.engines import DEFAULT
from vitfold.errors import BundleError
from vitfold.model import Array
from vitfold.progress import Say


def bench_steps(
    bundles: Sequence[Bundle],
    asked: SamplingConfig,
    *,
    threads: int | None = None,
    trials: int = 3,
    decode: Callable[[Array], Array] | None = None,
    judge: Judge | None = None,
    peers: Sequence[str] = (),
    say: Say = lambda _: None,
) -> list[SamplerRow]:
    """Draw by every bundle; the first one with all steps in full is what the others are compared with.

    `asked.steps` are those of the first bundle; others take as many as their own plans say. `peers` draw in torch,
    image by image, in the same steps; cache-dit also in the full steps of the first bundle.

    Raises:
        BundleError: if the bundles are not of one model, or two have one name.
        RecipeError: if what is asked for is out of range.
        EngineError: if ONNX Runtime refuses a graph.
    """
    first, digest = bundles[0].manifest.steps, bundles[0].manifest.model_digest
    for other in bundles[1:]:
        if other.manifest.model_digest != digest:
            raise BundleError(
                f"{other.path} draws by another model than {bundles[0].path}, so that images at equal seeds say "
                "nothing; compare bundles of one model"
            )
        if other.manifest.steps.plan.sampler != asked.sampler and method_of(other.manifest.steps).reuses:
            raise BundleError(
                f"the plan of {other.path} was chosen for the sampler {other.manifest.steps.plan.sampler}, that of "
                f"{bundles[0].path} for {asked.sampler}; compare bundles of one sampler"
            )
    if len({bundle.name for bundle in bundles}) < len(bundles):
        raise BundleError("two bundles have the same name; rename one of the folders")
    check_asked(first, asked)
    with contextlib.ExitStack() as stack:
        ways: list[Variant] = []
        for bundle in bundles:
            say(f"opening {bundle.name}")
            executor = stack.enter_context(open_steps(bundle, threads))
            steps = bundle.manifest.steps
            plan, method = steps.plan, method_of(steps)
            own = asked if bundle is bundles[0] else replace(asked, steps=plan.steps)
            if not ways and method.reuses:
                ways.append(
                    Variant(name=f"{bundle.name}, every step", method=every_step(method), executor=executor, asked=own)
                )
            work = reused_work(first.spec, method, steps.counts, plan.merge)
            ways.append(Variant(name=bundle.name, method=method, executor=executor, asked=own, reused_work=work))
            add_fewer_steps(first, ways)
        opened = open_peers(peers, first, method_of(first), steps=asked.steps, sampler=asked.sampler) if peers else []
        ways += [replace(ways[0], name=one.name, asked=asked, peer=one, reused_work=None) for one in opened]
        return compare(first, ways, engine=DEFAULT, trials=trials, decode=decode, judge=judge, say=say)
