"""The list of a job and the columns that it may have: what they hold, and how much memory writing them takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from vitfold import pipeline
from vitfold.errors import VitfoldError
from vitfold.model import Model
from vitfold.serve import BatchPredictor

pa = pytest.importorskip("pyarrow")
pytest.importorskip("daft")
from pyarrow import parquet  # noqa: E402

from vitfold.serve.mapping import running  # noqa: E402
from vitfold.serve.mapping.job import open_job  # noqa: E402
from vitfold.serve.mapping.sources import find_source, references  # noqa: E402


def table(path: Path, rows: int) -> Path:
    with parquet.ParquetWriter(path, pa.schema([("path", pa.string())])) as writer:
        for start in range(0, rows, 1000):
            names = [f"images/{i:09}.jpg" for i in range(start, min(start + 1000, rows))]
            writer.write_table(pa.table({"path": names}))
    return path


def test_the_list_has_every_image_once_and_in_order(tmp_path: Path) -> None:
    source = find_source(str(table(tmp_path / "a.parquet", 1003)))
    with open_job(tmp_path / "out", source, {"a": 1}, 10, arrays=False) as job:
        assert (job.total, job.parts, job.rows_of(99), job.rows_of(100)) == (1003, 101, 10, 3)
        found = [one for part in range(job.parts) for one in job.references(part)]
    assert found == list(references(source, arrays=False))
    assert [one[0] for one in found] == [f"images/{i:09}.jpg" for i in range(1003)]
    assert found[7][1] == str(tmp_path / "images" / "000000007.jpg").encode()
    assert len(list((tmp_path / "out" / "_job").glob("list-*"))) == 2


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        source = find_source(str(table(tmp_path / f"{rows}.parquet", rows)))
        tracemalloc.start()
        try:
            with open_job(tmp_path / str(rows), source, {}, 100, arrays=False) as job:
                assert job.total == rows
                assert len(job.references(job.parts - 1)) == 100
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000)
    assert peak(100_000) < 1.5 * peak(20_000)


def test_rows_of_too_many_numbers_are_refused(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny_model(outputs=0, output="image_embeds")
    predict = BatchPredictor(pipeline.save(pipeline.optimize(model), tmp_path / "a.fold").path, threads=1, top=3)
    assert running.check_columns(predict, None) == ["embedding"]
    with pytest.raises(VitfoldError, match=r"\(head: features\) has no column 'label' but embedding"):
        running.check_columns(predict, ["label"])
    with pytest.raises(VitfoldError, match="32 numbers an image, too many for a table"):
        running.check_columns(predict, None, most=31)


def test_top_adds_lists_and_columns_choose(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    bundle = pipeline.save(pipeline.optimize(tiny_model()), tmp_path / "a.fold").path
    images = {"image": [b"broken"]}
    assert list(BatchPredictor(bundle, top=3)(images)) == ["image", "label", "score", "labels", "scores", "error"]
    assert list(BatchPredictor(bundle, top=3, columns=["scores"])(images)) == ["image", "scores", "error"]
    with pytest.raises(VitfoldError, match="no column 'embedding'; it has label, score"):
        BatchPredictor(bundle, columns=["embedding"])(images)
