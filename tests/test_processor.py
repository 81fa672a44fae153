"""What a results file says of the processor."""

from __future__ import annotations

import pytest

from vitfold.bench.environment import environment
from vitfold.processor import SETTINGS, processor
from vitfold.report.tables import environment_line


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_what_is_set_for_kernels_stands_beside_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = processor()
    assert "settings" not in plain
    assert "=" not in environment_line(environment())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setenv("LD_PRELOAD", "/home/me/lib/libjemalloc.so.2:avx2.so")
    told = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "LD_PRELOAD": "libjemalloc.so.2 avx2.so"}
    assert processor() == {**plain, "settings": told}
    assert environment_line(environment()).endswith(
        ", ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI, LD_PRELOAD=libjemalloc.so.2 avx2.so"
    )
