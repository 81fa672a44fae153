"""One recipe made into a bundle, run over images and timed beside the float model: a row of a sweep or a search.

Which recipes are tried, and in which order, is `sweep`'s and `search`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from vitfold.artifacts.bundle import Bundle
from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import Outputs, run_over
from vitfold.bench.fidelity import Fidelity, answers
from vitfold.bench.measurement import Measurement
from vitfold.bench.reference import compare_outputs
from vitfold.bench.statistics import Drop, paired_drop, ratio_interval
from vitfold.bench.timing import Protocol
from vitfold.engines import open_session
from vitfold.errors import VitfoldError
from vitfold.images import ImageSet
from vitfold.model import Model
from vitfold.model.spec import Head
from vitfold.pipeline.calibration import calibrate_plan, keep_float
from vitfold.pipeline.compensating import compensate_plan
from vitfold.pipeline.plan import Plan, optimize
from vitfold.pipeline.trial import SHORT, timed, timed_ahead
from vitfold.pipeline.writing import save
from vitfold.progress import Say
from vitfold.recipe import FLOAT, WIDE, PruneRecipe, quant_from_scheme

CHECKED_IMAGES = 16
_RUNS = 3
_BUSY = 1.4
"""So many times as long as beside other rows takes the float model where the machine is too busy for a speed-up."""


def decides(head: Head) -> bool:
    """Return whether outputs are decisions, which can be counted as right or wrong."""
    return head in ("single_label", "multi_label")


def check_decides(head: Head) -> None:
    """Check that outputs are decisions.

    Raises:
        VitfoldError: if they are features or numbers, which cannot be counted as right.
    """
    if not decides(head):
        given = {"regression": "numbers (a regression)", "map": "maps", "segmentation": "maps"}.get(head, "features")
        raise VitfoldError(
            f"a drop is counted in classes, and this model gives {given}; choose --merge and --quant, and compare "
            "cosine, SQNR and errors with vitfold bench or evaluate"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One recipe by name: r per block by a rule, bits or "none", method, target, and how many sites stay float.

    With `wide` these are not float but have inputs of 16 bits. `compensate` says whether layers are refitted to the
    merging, `prune` which heads and hidden units stay, `registers` whether something is done about sink tokens where
    that is worth it.
    """

    name: str
    r: tuple[int, ...]
    rule: str = "tome"
    quant: str = "none"
    method: str | None = None
    target: str = "cpu"
    float_sites: int = 0
    wide: bool = False
    compensate: bool = False
    prune: PruneRecipe | None = None
    registers: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as rows begin."""
        return {
            "recipe": self.name,
            "merge": list(self.r),
            "rule": self.rule,
            "quant": self.quant,
            "method": self.method,
            "target": self.target,
            "float_sites": self.float_sites,
            "wide": self.wide,
            "compensate": self.compensate,
            "prune": None if self.prune is None else self.prune.to_dict(),
            "registers": self.registers,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EvalContext:
    """What all attempts share: the model, images to calibrate and to report on, and what the float model says there.

    `refitting` are the images that layers are refitted on, None where there are too few.
    """

    model: Model
    calibration: ImageSet
    calibration_size: int
    calibration_seed: int
    images: ImageSet
    expected: Outputs
    protocol: Protocol = SHORT
    refitting: ImageSet | None = None

    def right(self, outputs: Outputs) -> Bool[np.ndarray, " B"]:
        """Say of every image whether its top-1 class is its folder's, or, without folders, the float model's.

        Where every label is a yes or no of its own, an image is right if all of them are the float model's.

        Raises:
            VitfoldError: if the model decides nothing.
        """
        head = self.model.spec.head
        check_decides(head)
        if self.images.classes is None or head != "single_label":
            same = answers(outputs.values, head) == answers(self.expected.values, head)
            alike: Bool[np.ndarray, " B"] = same.all(1)
            return alike
        wanted = np.array(class_targets(self.images, self.model.labels, outputs.values.shape[1]))
        right: Bool[np.ndarray, " B"] = outputs.values.argmax(1) == wanted
        return right

    def fidelity(self, outputs: Outputs) -> Fidelity:
        """Compare with labels, where there are any, and with the float model."""
        return compare_outputs(
            outputs,
            self.images,
            labels=self.model.labels,
            head=self.model.spec.head,
            reference=self.expected,
        )

    def drop(self, outputs: Outputs) -> Drop:
        """Compare with the float model, image by image."""
        return paired_drop(self.right(self.expected), self.right(outputs))


def plan_attempt(attempt: Trial, trying: EvalContext, *, say: Say = lambda _: None) -> Plan:
    """Resolve an attempt and calibrate it, where it quantizes."""
    quant = quant_from_scheme(attempt.quant)
    if quant is not None:
        quant = replace(
            quant,
            method=attempt.method or quant.method,
            calibration_size=trying.calibration_size,
            seed=trying.calibration_seed,
        )
    folded = optimize(
        trying.model,
        merge=list(attempt.r),
        rule=attempt.rule,
        compensate=attempt.compensate,
        prune=attempt.prune,
        quant=quant or "none",
        registers="auto" if attempt.registers else None,
        target=attempt.target,
    )
    from vitfold.quant import Progress

    progress = Progress(step=say)
    if folded.needs_compensation:
        assert trying.refitting is not None
        folded = compensate_plan(folded, trying.refitting, progress=progress)
    if quant is None:
        return folded
    say("calibrating")
    images = trying.calibration.sample(trying.calibration_size, seed=trying.calibration_seed)
    if attempt.float_sites:
        scheme = WIDE if attempt.wide else FLOAT
        folded = keep_float(folded, images, attempt.float_sites, scheme=scheme, progress=progress)
    return calibrate_plan(folded, images, progress=progress)


def measure_attempt(
    attempt: Trial,
    trying: EvalContext,
    folder: Path,
    plain: Bundle,
    *,
    rows: Sequence[Mapping[str, Any]] = (),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Write an attempt's bundle, run it over the images, time it beside the plain float one; return its row.

    Times are taken again where they are noisy, or where the float model takes much longer than beside earlier `rows`:
    runtimes suffer unequally from a busy machine. The calmest of three counts.

    Raises:
        VitfoldError: if it cannot be made or run.
    """
    folded = plan_attempt(attempt, trying, say=say)
    bundle = save(
        folded, folder / f"{attempt.name}.fold", images=trying.images.first(CHECKED_IMAGES), overwrite=True, step=say
    )
    say("running over the images")
    manifest = bundle.manifest
    with open_session(bundle) as session:
        outputs = run_over(session, trying.images, trying.model.preprocess)
        fidelity = trying.fidelity(outputs)
        times: Mapping[str, Measurement] | None = None
        ahead: Mapping[str, Measurement] | None = None
        if not manifest.simulated:
            say("timing beside the float model")
            with open_session(plain) as beside:
                sessions = {"float": beside, "attempt": session}
                usual = min(map(_float_ms, rows), default=math.inf)
                times = _calm(lambda: timed(sessions, trying.model.spec, protocol=trying.protocol), usual)
                if trying.protocol.decode_ahead:
                    say("timing from files to labels, decoded ahead")
                    ahead = timed_ahead(sessions, trying.model.preprocess, trying.images, protocol=trying.protocol)
    return {
        **attempt.to_dict(),
        "bundle": str(bundle.path.name),
        "tokens": list(manifest.tokens),
        "macs": manifest.macs,
        "size_bytes": bundle.size_bytes,
        "work": folded.work().to_dict(),
        "images": fidelity.images,
        "top1": fidelity.top1,
        "top1_agreement": fidelity.agreement,
        "cosine": fidelity.cosine,
        "sqnr_db": fidelity.sqnr_db,
        "drop": trying.drop(outputs).to_dict() if decides(trying.model.spec.head) else None,
        **_timing(times),
        **_ahead(ahead),
        "error": None,
    }


def failed_row(attempt: Trial, error: VitfoldError) -> dict[str, Any]:
    """Return the row of an attempt that could not be made or run."""
    unknown = ("bundle", "macs", "size_bytes", "work", "top1", "top1_agreement", "cosine", "sqnr_db", "drop")
    return {
        **attempt.to_dict(),
        **dict.fromkeys(unknown),
        "tokens": [],
        "images": 0,
        **_timing(None),
        "error": str(error),
    }


def _ahead(times: Mapping[str, Measurement] | None) -> dict[str, Any]:
    """Images per second from files to labels, mean and standard deviation over rounds, where that was timed."""
    if times is None:
        return {}
    rates = {name: one.throughput_ips() for name, one in times.items()}
    speedup = ratio_interval(times["float"], times["attempt"])
    return {"decoded_ahead": {"throughput_ips": rates["attempt"], "float_ips": rates["float"], "speedup": speedup}}


def _calm(measure: Callable[[], Mapping[str, Measurement]], usual_ms: float) -> Mapping[str, Measurement]:
    """Measure until it is calm, three times at most; return the run that spreads least, of such as are not too slow."""

    def slow(times: Mapping[str, Measurement]) -> bool:
        return times["float"].latency_ms()["median"] > _BUSY * usual_ms

    runs = [measure()]
    while len(runs) < _RUNS and (slow(runs[-1]) or any(one.noisy for one in runs[-1].values())):
        runs.append(measure())
    return min([run for run in runs if not slow(run)] or runs, key=_spread)


def _float_ms(row: Mapping[str, Any]) -> float:
    """What the float model took beside a row; infinity where it was not timed."""
    if row["speedup"] is None:
        return math.inf
    return float(row["latency_ns"]["median"]) / 1e6 * float(row["speedup"]["median"])


def _spread(times: Mapping[str, Measurement]) -> float:
    found = [one.latency_ms() for one in times.values()]
    return max(latency["iqr"] / latency["median"] for latency in found)


def _timing(times: Mapping[str, Measurement] | None) -> dict[str, Any]:
    if times is None:
        return {"latency_ns": None, "throughput_ips": None, "speedup": None, "noisy": False}
    measured = times["attempt"]
    return {
        "latency_ns": {
            "median": measured.latency_ms()["median"] * 1e6,
            "trials": [median * 1e6 for median in measured.trial_medians_ms],
        },
        "throughput_ips": measured.throughput_ips()["median"],
        "speedup": ratio_interval(times["float"], measured),
        "noisy": measured.noisy,
    }
