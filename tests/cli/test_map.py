"""`vitfold map`: every kind of input, what is written, and what happens when it is stopped at any time."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invoking import RANDOM, error, run, run_json
from PIL import Image

from vitfold.serve.mapping.job import OWN
from vitfold.serve.predictor import open_predictor
from vitfold.storage.locks import held

pa = pytest.importorskip("pyarrow")
pytest.importorskip("daft")
from pyarrow import csv, parquet  # noqa: E402

# Daft leaves the pipe to a worker for the collector of garbage to close.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    run("optimize", *RANDOM, "-o", folder / "mapped.fold")
    return folder / "mapped.fold"


@pytest.fixture(scope="module")
def both(folder: Path) -> Path:
    run("optimize", *RANDOM, "--outputs", "logits,embedding", "-o", folder / "mapped-both.fold")
    return folder / "mapped-both.fold"


@pytest.fixture(scope="module")
def photos(few: Path) -> list[Path]:
    return sorted(few.glob("*/*"))


@pytest.fixture(scope="module")
def expected(bundle: Path, photos: list[Path]) -> list[str]:
    with open_predictor(bundle, threads=1) as vit:
        return [one.top(1)[0][0] for one in vit(photos)]


def read(output: Path) -> Any:
    """Read a data set as others do, in the order of its files."""
    return parquet.read_table(output, columns=None).to_pydict()


def labels(bundle: Path, given: object, output: Path, *more: object) -> list[str]:
    run("map", bundle, given, "-o", output, "--part", 7, "--threads", 1, *more)
    found = read(output)
    assert found["error"] == [None] * len(found["id"])
    assert len(set(found["id"])) == len(found["id"])
    return found["label"]


def test_a_folder_and_a_pattern(
    bundle: Path, few: Path, photos: list[Path], expected: list[str], tmp_path: Path
) -> None:
    assert labels(bundle, few, tmp_path / "a") == expected
    assert read(tmp_path / "a")["id"] == [str(path) for path in photos]
    assert sorted(path.name for path in (tmp_path / "a").glob("*.parquet"))[:2] == [
        "part-00000000.parquet",
        "part-00000001.parquet",
    ]
    assert labels(bundle, few / "**" / "*.jpg", tmp_path / "b") == expected
    shutil.copytree(few, tmp_path / "tree")
    (tmp_path / "tree" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "tree" / "cat" / ".hidden.jpg").write_text("no image")
    (tmp_path / "tree" / "circle").symlink_to(tmp_path / "tree")
    assert labels(bundle, tmp_path / "tree", tmp_path / "c") == expected
    (tmp_path / "tree" / "circle").unlink()
    assert labels(bundle, tmp_path / "tree" / "**", tmp_path / "d") == expected


def test_tables_of_paths(
    bundle: Path, few: Path, photos: list[Path], expected: list[str], tmp_path: Path, served: str
) -> None:
    table = pa.table({"n": list(range(20)), "path": [str(path) for path in photos]})
    csv.write_csv(table, tmp_path / "a.csv")
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    assert labels(bundle, tmp_path / "a.csv", tmp_path / "a") == expected
    assert labels(bundle, tmp_path / "a.parquet", tmp_path / "b", "--id", "n") == expected
    assert read(tmp_path / "b")["id"] == [str(n) for n in range(20)]
    places = [f"{path.relative_to(few)}" for path in photos]
    mixed = [f"{served}/{places[0]}", photos[1].as_uri(), *(f"{served}/{one}" for one in places[2:])]
    csv.write_csv(pa.table({"url": mixed, "n": list(range(20))}), tmp_path / "urls.csv")
    assert labels(bundle, tmp_path / "urls.csv", tmp_path / "c", "--column", "url") == expected
    shutil.copytree(few, tmp_path / "beside")
    csv.write_csv(pa.table({"path": [f"beside/{one}" for one in places]}), tmp_path / "relative.csv")
    assert labels(bundle, tmp_path / "relative.csv", tmp_path / "d") == expected


@pytest.fixture
def served(few: Path) -> Iterator[str]:
    """The images behind HTTP on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=few)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_bytes_in_tables_archives_and_saved_data_sets(
    bundle: Path, photos: list[Path], expected: list[str], tmp_path: Path
) -> None:
    held_bytes = [path.read_bytes() for path in photos]
    for start in (0, 9):  # two files, whose rows are numbered through
        part = held_bytes[start : start + 9] if start == 0 else held_bytes[9:]
        (tmp_path / "table").mkdir(exist_ok=True)
        parquet.write_table(pa.table({"image": part}), tmp_path / "table" / f"{start}.parquet", row_group_size=4)
    assert labels(bundle, tmp_path / "table", tmp_path / "a") == expected
    assert read(tmp_path / "a")["id"] == [str(n) for n in range(20)]

    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for n, content in enumerate(held_bytes):
            for name, data in ((f"{n:05}.jpg", content), (f"{n:05}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    assert labels(bundle, tmp_path / "shard.tar", tmp_path / "b") == expected
    assert read(tmp_path / "b")["id"][3] == "00003.jpg"

    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_info.json").write_text("{}")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": one, "path": None} for one in held_bytes[:19]] + [{"bytes": None, "path": str(photos[19])}]
    images = pa.table({"image": pa.array(rows, kind), "label": list(range(20))})
    with pa.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), images.schema) as stream:
        stream.write_table(images, max_chunksize=6)
    assert labels(bundle, saved, tmp_path / "c") == expected


def test_embeddings_are_lists_of_one_length_and_null_for_a_broken_image(
    both: Path, photos: list[Path], tmp_path: Path
) -> None:
    content = [photos[0].read_bytes(), b"broken", None, photos[1].read_bytes()]
    parquet.write_table(pa.table({"key": list("abcd"), "bytes": content}), tmp_path / "a.parquet")
    given = ("map", both, tmp_path / "a.parquet", "--id", "key", "--columns", "embedding,score,scores", "--top", 2)
    said = run_json(*given, "-o", tmp_path / "a", "--dtype", "float16")
    assert said == {"output": str(tmp_path / "a"), "images": 4, "before": 0, "unread": 2, "files": 1}
    table = parquet.read_table(tmp_path / "a")
    with open_predictor(both, threads=1) as vit:
        embeds = vit.embed([photos[0], photos[1]])
    assert table.schema.names == ["id", "embedding", "score", "scores", "error"]
    assert table.schema.field("embedding").type == pa.list_(pa.float16(), embeds.shape[1])
    assert table["id"].to_pylist() == list("abcd")
    found = table["embedding"].to_pylist()
    assert found[1] == found[2] == [None] * embeds.shape[1]
    np.testing.assert_allclose(np.array([found[0], found[3]], np.float32), embeds, rtol=2e-3, atol=2e-3)
    assert [len(one or ()) for one in table["scores"].to_pylist()] == [2, 0, 0, 2]
    assert [one is None for one in table["error"].to_pylist()] == [True, False, False, True]
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"select count(*), count(error), count(embedding[1]), len(embedding) from '{tmp_path}/a/*.parquet' group by 4"
    )
    assert duckdb.sql(query).fetchall() == [(4, 2, 2, embeds.shape[1])]
    assert "b: " in error(*given, "-o", tmp_path / "b", "--fail-fast")
    assert not list((tmp_path / "b").glob("*.parquet"))


def test_a_url_that_is_not_there_says_why(bundle: Path, photos: list[Path], served: str, tmp_path: Path) -> None:
    csv.write_csv(pa.table({"url": [f"{served}/absent.jpg", str(photos[0])]}), tmp_path / "a.csv")
    run("map", bundle, tmp_path / "a.csv", "-o", tmp_path / "a")
    found = read(tmp_path / "a")["error"]
    assert "404" in found[0]
    assert found[1] is None


@pytest.fixture(scope="module")
def many(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand names of twenty images that take a while to decode, of which some are broken."""
    folder, large = tmp_path_factory.mktemp("many"), tmp_path_factory.mktemp("large")
    photos = [large / f"{i}.jpg" for i in range(20)]
    for path, source in zip(photos, sorted(few.glob("*/*")), strict=True):
        Image.open(source).resize((1200, 1200)).save(path)
    for i in range(1000):
        path = folder / f"{i // 100}" / f"{i:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"broken") if i % 97 == 5 else os.link(photos[i % 20], path)
    return folder


def started(bundle: Path, given: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    words = ["map", str(bundle), str(given), "-o", str(output), "--part", "10", "--batch", "2", "--threads", "1", *more]
    script = f"import sys; from vitfold.cli import main; sys.argv = {['vitfold', *words]!r}; main()"
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", script], text=True, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


def after(output: Path, files: int) -> None:
    ends = time.monotonic() + 120
    while len(list(output.glob("*.parquet"))) < files:
        assert time.monotonic() < ends
        time.sleep(0.002)


def check_whole(output: Path, many: Path) -> None:
    found = read(output)
    assert found["id"] == [str(path) for path in sorted(many.glob("*/*"))]
    assert [one is not None for one in found["error"]] == [i % 97 == 5 for i in range(1000)]
    assert not list((output / OWN).glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_was_stopped_goes_on(bundle: Path, many: Path, tmp_path: Path, how: signal.Signals) -> None:
    output = tmp_path / "out"
    kept: dict[str, int] = {}
    for more in (3, 20):
        process = started(bundle, many, output)
        after(output, len(list(output.glob("*.parquet"))) + more)
        if how is signal.SIGINT:  # Ctrl-C reaches the workers, too
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        began = time.monotonic()
        said = process.communicate(timeout=60)[1]
        assert time.monotonic() - began < 15
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[how], said
        for path in output.glob("*.parquet"):  # none is torn
            assert parquet.read_metadata(path).num_rows == 10
        now = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
        assert kept.items() <= now.items()  # and none was made again
        kept = now
    assert len(kept) < 100
    process = started(bundle, many, output)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "of 1000 images were done before" in said
    check_whole(output, many)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_command_and_loses_nothing(bundle: Path, many: Path, tmp_path: Path) -> None:
    import psutil

    output = tmp_path / "out"
    process = started(bundle, many, output, "--workers", "2")
    after(output, 4)
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if one.num_threads() > 1]
    with contextlib.suppress(psutil.NoSuchProcess):
        workers[-1].kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1, said
    assert "run the same command again" in said
    process = started(bundle, many, output, "--workers", "2")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    check_whole(output, many)


@pytest.mark.slow
def test_a_full_disk_is_said_and_gone_on_from(both: Path, many: Path, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"path": [str(path) for path in sorted(many.glob("*/*"))]}), tmp_path / "a.parquet")
    words = ["map", str(both), str(tmp_path / "a.parquet"), "-o", str(tmp_path / "out"), "--part", "400"]
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n"
        f"from vitfold.cli import main; sys.argv = {['vitfold', *words]!r}; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "free some space and run the same command again" in done.stderr
    assert not list((tmp_path / "out").rglob("*.par*"))
    assert run_json(*words)["images"] == 1000
    assert len(read(tmp_path / "out")["id"]) == 1000
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_one_output_is_of_one_job(bundle: Path, both: Path, few: Path, tmp_path: Path) -> None:
    given = ("map", bundle, few, "-o", tmp_path / "out", "--part", 8)
    run(*given)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert run_json(*given)["before"] == 20
    assert "begun with bundle" in error("map", both, *given[2:])
    assert "begun with columns label, score, labels, scores, and this is label" in error(*given, "--columns", "label")
    assert "begun with part rows 8, and this is 9" in error(*given[:-1], 9)
    assert "begun with input" in error("map", bundle, few / "cat", *given[3:])
    with held(tmp_path / "out" / OWN / "lock", "busy"):
        assert "is being written by" in error(*given)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert "holds other files" in error("map", bundle, few, "-o", tmp_path / "other")
    assert "is a file" in error("map", bundle, few, "-o", tmp_path / "other" / "mine.txt")


def test_a_table_that_changed_is_refused(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    csv.write_csv(pa.table({"path": [str(path) for path in photos]}), tmp_path / "a.csv")
    run("map", bundle, tmp_path / "a.csv", "-o", tmp_path / "out")
    csv.write_csv(pa.table({"path": [str(path) for path in photos[::-1]]}), tmp_path / "a.csv")
    assert "changed since" in error("map", bundle, tmp_path / "a.csv", "-o", tmp_path / "out")


def test_what_cannot_be_read_is_said_before_anything_is_made(bundle: Path, photos: list[Path], tmp_path: Path) -> None:
    def said(table: dict[str, list[Any]], *more: object) -> str:
        parquet.write_table(pa.table(table), tmp_path / "a.parquet")
        found = error("map", bundle, tmp_path / "a.parquet", "-o", tmp_path / "out", *more)
        assert not (tmp_path / "out").exists()
        return found

    assert "holds no images" in said({"path": pa.array([], pa.string())})
    assert "no column 'paht': did you mean path?" in said({"path": ["a"], "n": [1]}, "--column", "paht")
    assert "name that of the images by --column" in said({"a": ["a"], "b": ["b"]})
    assert "the column 'a' of" in said({"a": [1]})
    assert "has the scheme ftp, which is not read; known: abfs" in said({"url": ["ftp://host/a.jpg"]})
    assert "no column 'embedding' but label, score" in said({"path": ["a"]}, "--columns", "embedding")
    (tmp_path / "a.csv").write_bytes(b"")
    assert "is empty" in error("map", bundle, tmp_path / "a.csv", "-o", tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(b"no tar")
    assert "no tar file" in error("map", bundle, tmp_path / "a.tar", "-o", tmp_path / "out")
    assert "nothing matches" in error("map", bundle, tmp_path / "absent" / "*.jpg", "-o", tmp_path / "out")
    assert "is a URL" in error("map", bundle, "https://host/a.csv", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lance_tables(bundle: Path, photos: list[Path], expected: list[str], tmp_path: Path) -> None:
    lance = pytest.importorskip("lance")
    names = [f"n{i}" for i in range(20)]
    kept = pa.table({"image": [path.read_bytes() for path in photos], "name": names})
    for start in (0, 7):  # two fragments
        part = kept.slice(start, 7 if start == 0 else None)
        lance.write_dataset(part, str(tmp_path / "a.lance"), mode="create" if start == 0 else "append")
    given = ("map", bundle, tmp_path / "a.lance", "--id", "name", "-o", tmp_path / "a", "--part", 6)
    assert run_json(*given, "--column", "image")["images"] == 20
    assert read(tmp_path / "a")["label"] == expected
    assert read(tmp_path / "a")["id"] == names
    lance.write_dataset(kept.slice(0, 1), str(tmp_path / "a.lance"), mode="append")
    assert "changed since" in error(*given, "--column", "image")
    (tmp_path / "a.lance").rename(tmp_path / "any name")
    lance.dataset(str(tmp_path / "any name")).delete("name = 'n3'")
    assert (
        labels(bundle, tmp_path / "any name", tmp_path / "b", "--column", "image")
        == [one for i, one in enumerate(expected) if i != 3] + expected[:1]
    )
    paths = pa.table({"path": [str(path) for path in photos]})
    lance.write_dataset(paths, str(tmp_path / "b.lance"))
    assert labels(bundle, tmp_path / "b.lance", tmp_path / "c") == expected
    for manifest in (tmp_path / "b.lance" / "_versions").iterdir():
        manifest.write_bytes(b"broken")
    assert "cannot be read" in error("map", bundle, tmp_path / "b.lance", "-o", tmp_path / "d")
