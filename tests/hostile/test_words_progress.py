"""What is said where nobody watches a bar, and where the machine has other work."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vitfold.bench.environment import busy_remark, environment
from vitfold.cli.app import app
from vitfold.cli.lines import Lines, shown_seconds


@dataclass
class Watch:
    """A clock that is told the time."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Work:
    """(seconds passed, then a step or (done, total)) and the lines that have to appear."""

    id: str
    did: tuple[tuple[float, Any], ...]
    said: tuple[str, ...]


IMAGES = tuple((1.0, (done, 400)) for done in range(1, 401))
WORKS = (
    Work("one step", ((0, "loading demo"),), ("t: loading demo",)),
    Work("sites of a kind, quickly", tuple((0.1, f"searching: block {i} {i}/9") for i in range(1, 10)),
         ("t: searching: block 1, 1 of 9",)),
    Work("sites of a kind, slowly", tuple((40.0, f"searching: block {i} {i}/4") for i in range(1, 5)),
         ("t: searching: block 1, 1 of 4", "t: searching: block 2, 2 of 4, 2 min left",
          "t: searching: block 3, 3 of 4, 80 s left", "t: searching: block 4, 4 of 4, 40 s left")),
    Work("images, quickly", ((0, "collecting"), *((0.001, (done, 400)) for done in range(1, 401))),
         ("t: collecting",)),
    Work("images, slowly", ((0, "collecting"), *IMAGES),
         ("t: collecting", "t: collecting, 30 of 400, 6 min left", "t: collecting, 40 of 400, 6 min left",
          "t: collecting, 70 of 400, 6 min left", "t: collecting, 80 of 400, 5 min left")),
    Work("steps without a number", ((0, "measuring a: 1"), (31, "measuring a: 2"), (1, "measuring a: 3")),
         ("t: measuring a", "t: measuring a: 2")),
    Work("two kinds", ((0, "loading x"), (1, "verifying"), (1, "verifying")), ("t: loading x", "t: verifying")),
    Work("rounds of one step", ((0, "x"), (9, (9, 10)), (9, (2, 10)), (9, (9, 10))),
         ("t: x", "t: x, 9 of 10, 1 s left", "t: x, 2 of 10", "t: x, 9 of 10, 1 s left")),
    Work("nothing to do", ((0, "x"), (40, (0, 0))), ("t: x", "t: x, 0 of 0")),
    Work("images within counted sites", ((0, "a: s 1/3"), (10, (5, 10)), (25, (9, 10)), (1, "a: s 2/3")),
         ("t: a: s, 1 of 3", "t: a: s, 1 of 3")),
    Work("a name that looks like a number", ((0, "opening 3/4.fold"),), ("t: opening 3/4.fold",)),
)  # fmt: skip


@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.id)
def test_lines_come_now_and_then(case):
    watch, said = Watch(), list[str]()
    lines = Lines("t", say=said.append, clock=watch)
    for seconds, what in case.did:
        watch.now += seconds
        if isinstance(what, str):
            lines.step(what)
        else:
            lines.advance(*what)
    assert said[: len(case.said)] == list(case.said)
    assert len(said) == len(case.said) or "slowly" in case.id
    assert len(said) <= 2 + watch.now / 5


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (7200, "2 h")]
)
def test_durations_in_words(seconds, shown):
    assert shown_seconds(float(seconds)) == shown


@dataclass(frozen=True)
class Load:
    id: str
    values: dict[str, Any]
    said: str | None = field(default=None)


LOADS = (
    Load("busy", {"load_average": 5.2, "cores": 2, "machine_cores": 2}, "(load 5.2 on 2 cores)"),
    Load("just above", {"load_average": 2.1, "cores": 2, "machine_cores": 2}, "(load 2.1 on 2 cores)"),
    Load("as much as there is", {"load_average": 2.0, "cores": 2, "machine_cores": 2}),
    Load("idle", {"load_average": 0.0, "cores": 2, "machine_cores": 2}),
    Load("a container on a large machine", {"load_average": 9.0, "cores": 2, "machine_cores": 64}),
    Load("a file of an earlier version", {"load_average": 5.2, "cores": 4}, "(load 5.2 on 4 cores)"),
    Load("a system that does not say", {"load_average": None, "cores": 2}),
)


@pytest.mark.parametrize("case", LOADS, ids=lambda case: case.id)
def test_a_busy_machine_is_named_beside_its_figures(case, tmp_path):
    remark = busy_remark(case.values)
    assert (remark is None) == (case.said is None)
    assert case.said is None or case.said in str(remark)
    around = {**environment(), **case.values}
    around.update({} if "machine_cores" in case.values else {"machine_cores": None})
    spread = {"median": 1.0, "iqr": 0.1}
    row = {
        "bundle": "r4", "scope": "engine", "batch": 1, "tokens": 9, "macs": 9, "size_bytes": 9, "noisy": False,
        "fidelity": None, "latency_ms": spread, "throughput_ips": spread,
        "speed_up": {**spread, "baseline": "r0"},
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps({"environment": around, "rows": [row]}))
    done = CliRunner().invoke(app, ["table", str(tmp_path / "bench.json")])
    assert done.exit_code == 0, done.stderr
    assert ("the machine was busy" in done.stdout) == (case.said is not None)


def test_a_busy_machine_is_named_as_it_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr("os.getloadavg", lambda: (99.5, 1.0, 1.0))
    bundle = tmp_path / "tiny.fold"
    options = ["timm:test_vit", "--weights", "random", "--image-size", "32", "--num-classes", "4"]
    assert CliRunner().invoke(app, ["optimize", *options, "-o", str(bundle)]).exit_code == 0
    said = "the machine was busy (load 99.5 on"
    quick = ["--trials", "2", "--seconds", "0.1", "--threads", "1"]
    assert said in CliRunner().invoke(app, ["bench", str(bundle), *quick]).stdout
    in_json = CliRunner().invoke(app, ["bench", str(bundle), *quick, "--json"])
    assert json.loads(in_json.stdout)["environment"]["load_average"] == 99.5
    assert said in in_json.stderr
    assert said in CliRunner().invoke(app, ["profile", str(bundle), "--runs", "1", "--no-ceiling"]).stderr
    assert not Path("tiny.fold").exists()
