"""The search, with a laboratory whose answers are known: what is tried, in which order, and what wins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vitfold.artifacts.journal import append_row
from vitfold.bench.fidelity import Fidelity
from vitfold.bench.statistics import Drop
from vitfold.errors import VitfoldError
from vitfold.pipeline import search as search_module
from vitfold.pipeline.goals import COARSE, Arm, LeastDrop, LeastLatency, Narrower, arm_from_dict
from vitfold.pipeline.search import PRUNED, SCREENED, Verdict, check_enough, search
from vitfold.recipe import PruneRecipe
from vitfold.schedule.solve import Point

POINTS = tuple((0.1 + 0.1 * i, 0.1 * (9 - i), (90 - 10 * i, 0, 0)) for i in range(10))


def drop(value: float, images: int = 1000) -> Drop:
    return Drop(images=images, drop=value, low=value - 0.002, high=value + 0.002, lost=0, gained=0, p_value=0.5)


@dataclass
class SearchContext:
    """Merging drops as much as it distorts / 10; quantizing adds `quantizing`, on OpenVINO everything takes half.

    Screening sees `hidden` more, with an interval as wide as that. Compensated merging drops `mended` of what it did.
    Quantizing adds `sinks` more unless there is a remedy against sink tokens; None: no remedy fits the model.
    """

    mended: float | None = None
    pruning: float = 0.0
    sinks: float | None = None

    quantizing: float = 0.0
    held_out: float = 0.0
    hidden: float = 0.0
    slower: frozenset[str] = frozenset()
    rows: list[dict[str, Any]] = field(default_factory=list)
    screened: list[tuple[int, ...]] = field(default_factory=list)
    screened_shares: list[float] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)

    @property
    def takes_registers(self) -> bool:
        return self.sinks is not None

    @property
    def trying(self) -> Any:
        return SimpleNamespace(refitting=None if self.mended is None else "images")

    def merging(self, r: tuple[int, ...]) -> float:
        return r[0] / 1000

    def screen(self, point: Point, rule: str) -> Drop:
        assert rule == "tome"
        r = point[2]
        self.screened.append(r)
        found = drop(self.merging(r) + self.hidden)
        return replace(found, low=found.low - self.hidden)

    def screen_pruned(self, narrower: Narrower) -> Drop:
        self.screened_shares.append(narrower.share)
        return drop(narrower.share * self.pruning)

    def measure(self, attempt: Any) -> dict[str, Any]:
        self.tried.append(attempt.name)
        seconds = (1.0 - attempt.r[0] / 100) * (0.5 if attempt.quant == "w8a8" else 1.0)
        seconds *= 0.5 if attempt.target == "openvino" else 1.0
        seconds = 2.0 if attempt.target in self.slower else seconds
        cost = self.quantizing / (10 if attempt.float_sites else 1) if attempt.quant == "w8a8" else 0.0
        sinks = 0.0 if attempt.registers or attempt.quant != "w8a8" else self.sinks or 0.0
        cost += sinks
        share = 0.0 if attempt.prune is None else attempt.prune.mlp
        seconds *= 1.0 - 0.6 * share
        mended = (self.mended or 1.0) if attempt.compensate else 1.0
        row = {
            **attempt.to_dict(),
            "drop": drop(self.merging(attempt.r) * mended + cost + share * self.pruning).to_dict(),
            "latency_ns": {"median": seconds * 1e7},
            "speedup": {"median": 1 / seconds, "low": 0.99 / seconds, "high": 1.01 / seconds},
            "error": None,
        }
        self.rows.append(row)
        return row

    def verify(self, row: dict[str, Any]) -> Verdict:
        fidelity = Fidelity(images=1, top1=1.0, top5=None, agreement=1.0, cosine=1.0, sqnr_db=None, reference=None)
        held_out = drop(row["drop"]["drop"] + self.held_out)
        return Verdict(row=row, bundle=None, held_out=held_out, fidelity=fidelity)  # type: ignore[arg-type]


def arm(quant: str = "none", target: str = "cpu", factor: float = 1.0) -> Arm:
    return Arm(quant=quant, target=target, points=tuple((factor * s, d, r) for s, d, r in POINTS))


def arms() -> list[Arm]:
    return [arm(), arm("w8a8", factor=0.5), arm("none", "openvino", 0.5), arm("w8a8", "openvino", 0.25)]


def least_latency(laboratory: SearchContext, max_drop: float = 0.0315) -> LeastLatency:
    return LeastLatency(max_drop=max_drop, screen=laboratory.screen, screen_pruned=laboratory.screen_pruned)


def run(laboratory: Any, arms: list[Arm], goal: Any, minutes: float = 1.0) -> search_module.SearchResult:
    return search(laboratory, arms, goal, minutes=minutes)


@pytest.fixture(autouse=True)
def _untyped(without_type_checks: None) -> None:
    """The laboratory here is a stand-in of another class."""


def test_the_fastest_arm_is_tried_first_and_nothing_that_promises_less_after_it() -> None:
    laboratory = SearchContext()
    found = run(laboratory, arms(), least_latency(laboratory))
    assert found.winner is not None
    assert found.winner.row["recipe"] == "w8a8-openvino-r30_0_0"
    assert laboratory.tried == ["w8a8-openvino-r30_0_0"]


@pytest.mark.parametrize(("pruning", "winner"), [(0.02, "none-cpu-prune50-r20_0_0"), (0.2, "none-cpu-r30_0_0")])
def test_a_narrower_arm_wins_where_its_units_cost_little(pruning: float, winner: str) -> None:
    """It starts where merging keeps what pruning leaves of the bound, behind no merging at all."""
    laboratory = SearchContext(mended=0.9, pruning=pruning)
    narrower = replace(arm(factor=0.7), share=0.5, prune=PruneRecipe(mlp=0.5), lost=0.5 * pruning)
    found = run(laboratory, [arm(), narrower], least_latency(laboratory))
    assert found.winner is not None
    assert found.winner.row["recipe"] == winner
    assert laboratory.tried[0] == "none-cpu-prune50-r0_0_0"
    if pruning == 0.02:
        assert laboratory.tried[1] == winner


@pytest.mark.parametrize(("seconds", "tried"), [(0.69, 1), (0.60, 2)])
def test_narrower_blocks_are_refitted_with_merging_where_that_promises_clearly_more(seconds, tried) -> None:
    laboratory = SearchContext(mended=0.9, pruning=0.01)
    points = ((seconds, 0.1, (10, 0, 0)), (0.7, 0.0, (0, 0, 0)))
    narrower = Arm(quant="none", target="cpu", points=points, share=0.5, prune=PruneRecipe(mlp=0.5), lost=0.005)
    run(laboratory, [narrower], least_latency(laboratory))
    assert laboratory.tried == ["none-cpu-prune50-r0_0_0", "none-cpu-prune50-r10_0_0"][:tried]


def test_merging_that_promises_little_more_is_passed_over_for_what_promises_clearly_more() -> None:
    """A first merge that gains nothing hides one behind it that does: the row of no merging takes 0.94 here."""
    laboratory = SearchContext(mended=0.9, pruning=0.01)
    points = ((0.60, 0.1, (40, 0, 0)), (0.93, 0.05, (5, 0, 0)), (0.94, 0.0, (0, 0, 0)))
    narrower = Arm(quant="none", target="cpu", points=points, share=0.1, prune=PruneRecipe(mlp=0.1), lost=0.005)
    run(laboratory, [narrower], least_latency(laboratory))
    assert laboratory.tried == ["none-cpu-prune10-r0_0_0", "none-cpu-prune10-r40_0_0"]


def test_narrower_blocks_that_break_the_bound_alone_do_not_merge_as_well() -> None:
    laboratory = SearchContext(mended=0.9, pruning=0.07)
    narrower = replace(arm(factor=0.2), share=0.5, prune=PruneRecipe(mlp=0.5), lost=0.01)
    goal = least_latency(laboratory)
    assert any(narrower.points[goal.start(narrower)][2])
    found = run(laboratory, [narrower, arm()], goal)
    assert [name for name in laboratory.tried if "prune" in name] == ["none-cpu-prune50-r0_0_0"]
    assert found.winner is not None
    assert found.winner.row["recipe"] == "none-cpu-r30_0_0"


def test_what_narrower_blocks_drop_is_not_laid_to_quantization() -> None:
    laboratory = SearchContext(mended=0.9, pruning=0.07)
    narrower = replace(arm("w8a8", factor=0.2), share=0.5, prune=PruneRecipe(mlp=0.5), lost=0.035)
    found = run(laboratory, [narrower], least_latency(laboratory))
    assert found.winner is None
    assert laboratory.tried == ["w8a8-cpu-prune50-r0_0_0"]


SHARES = [Narrower(share=share, prune=PruneRecipe(mlp=share)) for share in PRUNED]


@pytest.mark.parametrize(
    ("pruning", "shares"),
    [
        (0.057, (0.5, 0.55)),  # 0.55 drops 0.03135, 0.6 surely more than the bound
        (0.0545, (0.5, 0.55, 0.6)),  # 0.6 may keep it
        (0.2, ()),
        (0.0, (0.65, 0.7)),
    ],
)
def test_shares_around_the_largest_that_keeps_the_bound_are_tried(pruning: float, shares: tuple[float, ...]) -> None:
    laboratory = SearchContext(pruning=pruning)
    found = least_latency(laboratory).worth_trying(SHARES)
    assert tuple(one.share for one in found) == shares
    assert len(laboratory.screened_shares) <= 4
    for one in found:
        assert one.lost == pytest.approx(one.share * pruning)
        assert one.prune == PruneRecipe(mlp=one.share)


def test_where_time_is_the_bound_no_share_is_looked_at_before() -> None:
    found = LeastDrop(max_latency_ms=4.0, plain_ms=10.0).worth_trying(SHARES)
    assert tuple(one.share for one in found) == COARSE
    assert least_latency(SearchContext()).worth_trying([]) == []


def test_merging_alone_is_screened_by_bisection() -> None:
    laboratory = SearchContext()
    assert least_latency(laboratory).start(arm()) == 6
    assert len(laboratory.screened) <= 4


def test_where_quantization_costs_sensitive_sites_go_back_to_float_before_less_is_merged() -> None:
    laboratory = SearchContext(quantizing=0.031)
    found = run(laboratory, [arm("w8a8", "openvino", 0.25)], least_latency(laboratory))
    assert laboratory.tried[:2] == ["w8a8-openvino-r30_0_0", "w8a8-openvino-float4-r30_0_0"]
    assert found.winner is not None
    assert found.winner.row["merge"][0] < 30


def test_where_float_sites_do_not_mend_quantization_a_remedy_against_sinks_is_tried() -> None:
    laboratory = SearchContext(sinks=0.05)
    found = run(laboratory, [arm("w8a8", "openvino", 0.25)], least_latency(laboratory))
    assert [name.rpartition("-r")[0].removeprefix("w8a8-openvino") for name in laboratory.tried[:3]] == [
        "",
        "-float4",
        "-registers",
    ]
    assert found.winner is not None
    assert found.winner.row["registers"]
    assert found.winner.row["merge"][0] == 30
    without = SearchContext(quantizing=0.05)
    assert "-registers" not in "".join(
        run(without, [arm("w8a8", "openvino", 0.25)], least_latency(without)).rows[-1]["recipe"]
    )


@pytest.mark.parametrize("mends", [True, False])
def test_where_the_engine_multiplies_16_bits_sites_are_wide_before_they_are_float(mends) -> None:
    class Wide(SearchContext):
        def measure(self, attempt: Any) -> dict[str, Any]:
            row = super().measure(attempt if mends or not attempt.wide else replace(attempt, float_sites=0))
            return {**row, "recipe": attempt.name}

    laboratory = Wide(quantizing=0.014)
    found = run(laboratory, [arm("w8a8", "cpu-vnni", 0.25)], least_latency(laboratory, max_drop=0.0125))
    kinds = [name.rpartition("-r")[0].removeprefix("w8a8-cpu-vnni") for name in laboratory.tried]
    assert kinds[:2] == ["", "-wide4"]
    assert (kinds[2] == "-float4") == (not mends)
    assert found.winner is not None
    assert any(row["wide"] for row in found.rows)


def test_arms_whose_heads_differ_take_no_registers() -> None:
    laboratory = SearchContext(mended=0.9, sinks=0.05)
    narrower = replace(arm("w8a8", "openvino", 0.25), share=0.5, prune=PruneRecipe(mlp=0.5))
    run(laboratory, [narrower], least_latency(laboratory))
    assert any("-float4" in name for name in laboratory.tried)
    assert not any("-registers" in name for name in laboratory.tried)


def test_what_meets_the_bound_is_followed_by_bolder_recipes_until_none_can() -> None:
    laboratory = SearchContext(hidden=0.015)
    found = run(laboratory, [arm()], least_latency(laboratory))
    assert [name.rpartition("-r")[2] for name in laboratory.tried] == ["10_0_0", "20_0_0", "30_0_0"]
    assert found.winner is not None
    assert found.winner.row["merge"] == [30, 0, 0]


def test_what_merges_too_much_is_tried_compensated_and_bolder_from_there() -> None:
    plain, mending = SearchContext(), SearchContext(mended=0.4)
    before, after = (run(one, [arm()], least_latency(one)) for one in (plain, mending))
    assert before.winner is not None
    assert after.winner is not None
    assert not any(row["compensate"] for row in before.rows)
    assert after.winner.row["compensate"]
    assert "-compensated" in after.winner.row["recipe"]
    assert after.winner.row["merge"][0] > before.winner.row["merge"][0]
    assert len(mending.tried) == len(set(mending.tried))


def test_what_fails_on_held_out_images_does_not_win() -> None:
    laboratory = SearchContext(held_out=0.005)
    found = run(laboratory, [arm()], least_latency(laboratory))
    assert found.verified == 2
    assert found.winner is not None
    assert found.winner.row["merge"] == [20, 0, 0]


def test_nothing_slower_than_the_float_model_wins() -> None:
    laboratory = SearchContext(slower=frozenset({"cpu"}))
    found = run(laboratory, [arm()], least_latency(laboratory))
    assert found.winner is None
    assert found.nearest is not None


def test_when_time_is_over_the_best_so_far_wins() -> None:
    laboratory = SearchContext()
    found = run(laboratory, arms(), least_latency(laboratory), minutes=-1)
    assert found.winner is None
    assert "minutes were over" in found.reason


def test_least_drop_merges_no_more_than_it_takes() -> None:
    laboratory = SearchContext()
    goal = LeastDrop(max_latency_ms=4.0, plain_ms=10.0)
    found = run(laboratory, arms(), goal)
    assert found.winner is not None
    assert found.winner.row["latency_ns"]["median"] / 1e6 <= 4.0
    assert found.winner.row["drop"]["drop"] == 0.0
    assert found.winner.row["recipe"] == "w8a8-openvino-r0_0_0"


def test_a_latency_that_nothing_reaches_has_a_nearest_miss() -> None:
    laboratory = SearchContext()
    found = run(laboratory, [arm()], LeastDrop(max_latency_ms=0.5, plain_ms=10.0))
    assert found.winner is None
    assert found.nearest is not None
    assert found.nearest["merge"][0] == 90


def test_arms_survive_their_journal() -> None:
    found = arm_from_dict(replace(arm("w8a8", "openvino"), rule="nearest", lost=0.25).to_dict())
    assert found.lost == 0.25
    assert (found.points, found.rule) == (POINTS, "nearest")
    assert found.attempt(8).rule == "nearest"
    assert found.attempt(8).name == "w8a8-openvino-nearest-r10_0_0"


def test_arms_of_an_earlier_run_are_kept_and_only_missing_ones_built(tmp_path: Path, monkeypatch) -> None:
    """By engine and bits: a search that was interrupted while it timed schedules goes on with the next pair."""
    laboratory: Any = SimpleNamespace(folder=tmp_path, trying=SimpleNamespace(refitting=None))
    goal, built = LeastDrop(max_latency_ms=4.0, plain_ms=10.0), list[Any]()

    def build(_: Any, pairs: Any, narrower: Any) -> Any:
        assert narrower == []
        for quant, target in pairs:
            built.append((quant, target))
            yield (quant, target), [arm(quant, target)]
            if len(built) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(search_module, "build_arms", build)
    append_row(tmp_path / search_module.ARMS, replace(arm("none"), share=0.5).to_dict())  # of another division
    with pytest.raises(KeyboardInterrupt):
        search_module.find_arms(laboratory, ["none", "w8a8"], ["cpu", "openvino"], goal)
    found = search_module.find_arms(laboratory, ["none", "w8a8"], ["cpu", "openvino"], goal)
    assert built == [("none", "cpu"), ("none", "openvino"), ("w8a8", "cpu"), ("w8a8", "openvino")]
    assert [(one.quant, one.target, one.share) for one in found] == [(*pair, 0.0) for pair in built]
    assert all(one.points == POINTS for one in found)


def test_what_was_screened_stands_for_what_distorts_alike(tmp_path: Path) -> None:
    """It is read back from the journal, and nothing is measured again: there is no model here to measure with."""
    kept = {"rule": "tome", "prune": None}
    append_row(tmp_path / SCREENED, {**kept, "merge": [8, 0, 0], "distortion": 0.100, "drop": drop(0.01).to_dict()})
    append_row(tmp_path / SCREENED, {**kept, "merge": [9, 0, 0], "distortion": 0.108, "drop": drop(0.02).to_dict()})
    nothing: Any = SimpleNamespace()
    laboratory = search_module.SearchContext(trying=nothing, held_out=nothing, folder=tmp_path, say=lambda _: None)
    assert laboratory.screen((0.5, 0.101, (0, 8, 0)), "tome").drop == 0.01
    assert laboratory.screen((0.5, 0.112, (0, 8, 0)), "tome").drop == 0.02
    for point, rule in (((0.5, 0.101, (0, 8, 0)), "nearest"), ((0.5, 0.2, (0, 16, 0)), "tome")):
        with pytest.raises(AttributeError):
            laboratory.screen(point, rule)


def test_too_few_images_cannot_tell_the_drop() -> None:
    check_enough(100, 0.01)
    with pytest.raises(
        VitfoldError, match="50 images cannot tell a drop of 1 points: one is 2.00 already; give at least"
    ):
        check_enough(50, 0.01)
