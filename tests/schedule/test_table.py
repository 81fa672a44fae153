"""The latency table: recovered from schedules whose times are known, and rising whatever the noise."""

from __future__ import annotations

import numpy as np
import pytest

from vitfold.recipe import largest_r
from vitfold.schedule.solve import schedule_seconds
from vitfold.schedule.table import LatencyTable, fit_table, probe_schedules

DEPTH, TOKENS, PREFIX = 12, 197, 1


def truth(tokens: int, merged: int, sizes: bool) -> float:
    """A machine: what a block really takes; linear in tokens, and every merge costs."""
    return 0.4 * 1e-5 * (tokens + 50) + 0.6 * 1e-5 * (tokens - merged + 50) + (2e-4 if merged else 0.0)


def times(noise: float = 0.0, seed: int = 0) -> dict[tuple[int, ...], float]:
    rng = np.random.default_rng(seed)
    return {
        r: schedule_seconds(r, TOKENS, truth) * (1 + noise * rng.standard_normal())
        for r in probe_schedules(DEPTH, TOKENS, PREFIX)
    }


def test_every_probe_can_be_carried_out_and_they_differ():
    for tokens, prefix, depth in ((197, 1, 12), (65, 1, 12), (17, 1, 3), (50, 5, 6)):
        probes = probe_schedules(depth, tokens, prefix)
        assert len(set(probes)) == len(probes) >= 4
        for r in probes:
            left = tokens
            for merged in r:
                assert 0 <= merged <= largest_r(left, prefix)
                left -= merged


@pytest.mark.parametrize(
    ("tokens", "prefix", "rows"), [(197, 1, 16), (65, 1, 16), (65, 1, 6), (577, 1, 48), (196, 0, 16)]
)
def test_probes_lead_to_numbers_of_tokens_that_kernels_like(tokens, prefix, rows):
    probes = probe_schedules(DEPTH, tokens, prefix, rows)
    assert (tokens % rows, *(0,) * (DEPTH - 1)) in probes, "the fewest that get there"
    assert len(probes) >= 6
    for r in probes:
        left = tokens
        for merged in r:
            assert 0 <= merged <= largest_r(left, prefix)
            left -= merged
            assert left == tokens or left % (rows // 2) == 0
    assert max(sum(1 for merged in r if merged) for r in probes) >= 5, "merges enough to tell what one costs"


@pytest.mark.parametrize("cliff", [0.0, 0.3])
def test_what_the_models_own_number_of_tokens_costs_beyond_its_neighbours_is_found(cliff):
    def steep(tokens: int, merged: int, sizes: bool) -> float:
        """Each block takes longer by `cliff` where it has 65 tokens, which are one more than a multiple of 16."""
        before, after = (1 + cliff * (count == 65) for count in (tokens, tokens - merged))
        return 1e-5 * (0.4 * before * (tokens + 50) + 0.6 * after * (tokens - merged + 50)) + (5e-6 if merged else 0.0)

    known = {r: schedule_seconds(r, 65, steep) for r in probe_schedules(DEPTH, 65, PREFIX, 16)}
    table = fit_table(known, tokens=65, attention_ratio=0.4)
    for r in ((0,) * 12, (1, *(0,) * 11), (0, 0, 0, 17, *(0,) * 8), (0, 1, 0, 16, *(0,) * 8)):
        assert table.total(r, 65) == pytest.approx(schedule_seconds(r, 65, steep), rel=1e-6)
    gain = table.total((0,) * 12, 65) / table.total((1, *(0,) * 11), 65)
    assert gain > 1.2 if cliff else 1.0 < gain < 1.01


def test_two_blocks_tell_nothing():
    with pytest.raises(ValueError, match="three blocks"):
        probe_schedules(2, 65, 1)


def test_the_table_predicts_schedules_that_were_never_timed():
    table = fit_table(times(), tokens=TOKENS, attention_ratio=0.4)
    assert table.merge_seconds == pytest.approx(2e-4)
    for r in ((8,) * 12, (0, 0, 48, 0, 0, 48, 0, 0, 24, 0, 0, 0), (0,) * 11 + (90,)):
        assert table.total(r, TOKENS) == pytest.approx(schedule_seconds(r, TOKENS, truth), rel=1e-6)


def test_what_grows_with_the_square_is_told_from_what_does_not():
    def squared(tokens: int, merged: int, sizes: bool) -> float:
        return 1e-8 * (0.4 * tokens**2 + 0.6 * (tokens - merged) ** 2) + truth(tokens, merged, sizes)

    known = {r: schedule_seconds(r, TOKENS, squared) for r in probe_schedules(DEPTH, TOKENS, PREFIX)}
    table = fit_table(known, tokens=TOKENS, attention_ratio=0.4)
    for r in ((8,) * 12, (0, 0, 48, 0, 0, 48, 0, 0, 24, 0, 0, 0)):
        assert table.total(r, TOKENS) == pytest.approx(schedule_seconds(r, TOKENS, squared), rel=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_noise_leaves_a_table_that_rises(seed):
    table = fit_table(times(0.1, seed), tokens=TOKENS, attention_ratio=0.4)
    assert list(table.seconds) == sorted(table.seconds)
    assert table.merge_seconds >= 0
    assert table.total((0,) * 12, TOKENS) == pytest.approx(schedule_seconds((0,) * 12, TOKENS, truth), rel=0.4)


def test_between_lengths_it_is_linear():
    table = LatencyTable(lengths=(10, 20), seconds=(1.0, 3.0), merge_seconds=0.5, attention_ratio=0.5)
    assert table.block(15, 0) == pytest.approx(2.0)
    assert table.block(20, 10) == pytest.approx(2.0 + 0.5)


def test_narrower_blocks_work_less_and_merge_as_long():
    whole = LatencyTable(lengths=(50, 100), seconds=(1.0, 2.0), merge_seconds=0.25, attention_ratio=0.5)
    narrow = whole.narrowed(0.4)
    assert narrow.block(100, 0) == pytest.approx(0.4 * 2.0)
    assert narrow.block(100, 50) == pytest.approx(0.4 * 1.5 + 0.25)
    assert whole.block(100, 50) == pytest.approx(1.5 + 0.25)
