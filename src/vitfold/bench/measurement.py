"""Raw timings and what is derived from them.

The statistics: a measurement keeps every sample, trial by trial, so that anybody can derive others. Takes no time
itself; see `timing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

Scope = Literal["engine", "end_to_end", "decoded_ahead"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
NOISY_IQR_RATIO = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Nanoseconds of every iteration, `trials_ns[t][i]`, of one subject at one batch size.

    Scope "engine" times `run` alone on bound input; "end_to_end" times files on disk to labels, one batch after the
    other; "decoded_ahead" the same while threads decode the next batches, so that its samples are a throughput.
    """

    subject: str
    engine: str
    batch: int
    scope: Scope
    trials_ns: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.trials_ns or not all(self.trials_ns):
            raise ValueError("a measurement needs at least one sample in every trial")

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """All samples in milliseconds."""
        return tuple(ns / 1e6 for trial in self.trials_ns for ns in trial)

    @property
    def trial_medians_ms(self) -> tuple[float, ...]:
        """The median of every trial in milliseconds."""
        return tuple(float(np.median(trial)) / 1e6 for trial in self.trials_ns)

    def latency_ms(self) -> dict[str, float]:
        """Median, mean, standard deviation, 90th and 99th percentile, interquartile range."""
        samples = np.array(self.samples_ms)
        low, median, high, p90, p99 = np.percentile(samples, [25, 50, 75, 90, 99])
        return {
            "median": float(median),
            "mean": float(samples.mean()),
            "std": float(samples.std(ddof=1)) if len(samples) > 1 else 0.0,
            "p90": float(p90),
            "p99": float(p99),
            "iqr": float(high - low),
        }

    def throughput_ips(self) -> dict[str, float]:
        """Images per second: batch / latency, over the trials' medians."""
        rates = self.batch * 1e3 / np.array(self.trial_medians_ms)
        return {
            "median": float(np.median(rates)),
            "mean": float(rates.mean()),
            "std": float(rates.std(ddof=1)) if len(rates) > 1 else 0.0,
        }

    @property
    def noisy(self) -> bool:
        """True if the middle half of the samples spreads over more than 15 % of the median."""
        latency = self.latency_ms()
        return latency["iqr"] > NOISY_IQR_RATIO * latency["median"]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values with every raw sample."""
        return {
            "subject": self.subject,
            "engine": self.engine,
            "batch": self.batch,
            "scope": self.scope,
            "trials_ns": [list(trial) for trial in self.trials_ns],
        }


def speed_up(baseline: Measurement, subject: Measurement) -> dict[str, float]:
    """Return how many times faster `subject` is, from trials that ran side by side.

    Equation: the median over trials t of (median latency of the baseline in t / of the subject in t),
    per image; the interquartile range over trials says how sure that is.
    """
    low, median, high = np.percentile(paired_ratios(baseline, subject), [25, 50, 75])
    return {"median": float(median), "iqr": float(high - low)}


def paired_ratios(baseline: Measurement, subject: Measurement) -> Float[np.ndarray, " T"]:
    """Return per trial how many times as long the baseline took, per image."""
    if len(baseline.trials_ns) != len(subject.trials_ns):
        raise ValueError("a speed-up needs both measurements from the same interleaved run")
    per_image = np.array(baseline.trial_medians_ms) / baseline.batch
    ratios: Float[np.ndarray, " T"] = per_image / (np.array(subject.trial_medians_ms) / subject.batch)
    return ratios
