"""Peers are set up like the bundles that they are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitfold.engines import onnxruntime as engine
from vitfold.errors import EngineError
from vitfold.peers import PEERS, check_peers, open_peer


@pytest.fixture
def module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))


def test_peers_run_on_as_many_threads_as_the_bundles(
    module: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []
    before = torch.get_num_threads()
    try:
        open_peer("torch", module, (3, 8, 8), tmp_path, threads=before + 1).close()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    original = engine.OnnxRuntimeSession

    def remembered(path: Path, *, threads: int | None = None) -> engine.OnnxRuntimeSession:
        asked.append(threads)
        return original(path, threads=threads)

    monkeypatch.setattr(engine, "OnnxRuntimeSession", remembered)
    open_peer("onnxruntime", module, (3, 8, 8), tmp_path, threads=1).close()
    assert asked == [1]


def test_unknown_peers_offer_the_nearest(module: torch.nn.Module, tmp_path: Path) -> None:
    check_peers(list(PEERS))
    with pytest.raises(EngineError, match="torch-compile"):
        check_peers(["torch-compiled"])
    with pytest.raises(EngineError, match="onnxruntime"):
        open_peer("onnxrt", module, (3, 8, 8), tmp_path)
