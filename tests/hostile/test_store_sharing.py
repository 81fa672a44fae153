"""One predictor in many hands: threads, processes of every kind, and what is refused with the cure."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.cores import most_threads
from vitfold.engines import open_graph, open_session
from vitfold.errors import BundleError, EngineError, VitfoldError
from vitfold.model import Array, Model
from vitfold.recipe import quant_from_scheme
from vitfold.serve.predictor import Predictor, open_predictor

THREADS = 8


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def path(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.save(pipeline.optimize(model, merge=2), tmp_path_factory.mktemp("shared") / "a.fold").path


def pictures(count: int) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (50, 40, 3), dtype=np.uint8)) for _ in range(count)]


def outputs(predictor: Predictor, images: list[Image.Image], batch: int) -> Array:
    return np.stack([one.output for one in predictor(images, batch=batch)])


def test_eight_threads_get_what_one_gets(path: Path) -> None:
    images = pictures(THREADS * 6)
    shares = [images[i::THREADS] for i in range(THREADS)]
    with open_predictor(path) as predictor:
        expected = [outputs(predictor, share, batch=1 + i % 3) for i, share in enumerate(shares)]
        found: dict[int, Array] = {}
        start = threading.Barrier(THREADS)

        def work(i: int) -> None:
            start.wait()
            for _ in range(5):
                found[i] = outputs(predictor, shares[i], batch=1 + i % 3)
                np.testing.assert_array_equal(found[i], expected[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(THREADS))
    for i, one in found.items():
        np.testing.assert_array_equal(one, expected[i])


def test_closing_waits_for_whoever_is_at_work(path: Path) -> None:
    predictor = open_predictor(path)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                predictor(pictures(1))
        except VitfoldError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    predictor.close()
    for thread in threads:
        thread.join()
    assert all("closed" in str(error) for error in errors)
    with pytest.raises(EngineError, match="this predictor is closed; open the bundle again"):
        predictor(pictures(1))


def serve(predictor: Predictor, results: Any) -> None:
    try:
        results.put(outputs(predictor, pictures(3), batch=2))
    except VitfoldError as error:
        results.put(str(error))


def in_a_process(method: str, predictor: Predictor) -> Any:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=serve, args=(predictor, results))
    process.start()
    found = results.get(timeout=120)
    process.join(60)
    assert process.exitcode == 0
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_opens_it_by_itself(path: Path, method: str) -> None:
    with open_predictor(path, threads=1) as predictor:
        expected = outputs(predictor, pictures(3), batch=2)
        np.testing.assert_array_equal(in_a_process(method, predictor), expected)
        np.testing.assert_array_equal(outputs(predictor, pictures(3), batch=2), expected)


@pytest.mark.parametrize("again", [lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy])
def test_a_copy_is_another_session_of_the_same_bundle(path: Path, again: Callable[[Predictor], Predictor]) -> None:
    with open_predictor(path) as predictor, again(predictor) as copied:
        np.testing.assert_array_equal(outputs(copied, pictures(2), 2), outputs(predictor, pictures(2), 2))
        assert copied.session is not predictor.session


def test_a_bundle_that_was_replaced_is_noticed(path: Path, model: Model, tmp_path: Path) -> None:
    moved = tmp_path / "a.fold"
    shutil.copytree(path, moved)
    with open_predictor(moved) as predictor:
        pickled = pickle.dumps(predictor)
        pipeline.save(pipeline.optimize(model, merge=3), moved, overwrite=True)
        with pytest.raises(BundleError, match="was replaced since this predictor was opened; open it anew"):
            pickle.loads(pickled)
        assert "was replaced since" in in_a_process("fork", predictor)


def test_engines_that_do_not_survive_a_fork_say_so(model: Model, photos: Any, tmp_path: Path) -> None:
    quant = quant_from_scheme("w4a4")
    assert quant is not None
    folded = pipeline.optimize(model, quant=replace(quant, method="minmax", calibration_size=4))
    bundle = pipeline.save(pipeline.calibrate_plan(folded, photos), tmp_path / "simulated.fold")
    with Predictor(bundle) as predictor:
        assert len(predictor(pictures(1))) == 1
        assert "get_context('spawn')" in in_a_process("fork", predictor)


REFUSED = (
    ("threads of zero", {"threads": 0}, {}, r"threads has to be a whole number of 1 to \d+ .* found 0; leave it out"),
    ("negative threads", {"threads": -1}, {}, "found -1; leave it out"),
    ("threads beyond the machine", {"threads": most_threads() + 1}, {}, "threads has to be a whole number"),
    ("a hundred thousand threads", {"threads": 100_000}, {}, "found 100000"),
    ("threads as truth", {"threads": True}, {}, "found True"),
    ("half a thread", {"threads": 1.5}, {}, "found 1.5"),
    ("threads as text", {"threads": "2"}, {}, "found '2'"),
    ("an unknown engine", {"engine": "onnx"}, {}, "unknown engine 'onnx'; did you mean onnxruntime"),
    ("a batch of zero", {}, {"batch": 0}, "batch must be a whole number of at least 1, found 0"),
    ("a negative batch", {}, {"batch": -1}, "found -1"),
    ("a batch as text", {}, {"batch": "8"}, "found '8'"),
    ("a batch as truth", {}, {"batch": True}, "found True"),
)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("opening", "calling", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_what_makes_no_sense_is_refused(path: Path, opening: Any, calling: Any, words: str) -> None:
    with pytest.raises(VitfoldError, match=words), open_predictor(path, **opening) as predictor:
        predictor(pictures(1), **calling)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("threads", [0, -3, 100_000, 2.0])
def test_threads_are_checked_wherever_a_graph_is_opened(path: Path, threads: Any) -> None:
    bundle = open_predictor(path).bundle
    with pytest.raises(EngineError, match="threads has to be"):
        open_session(bundle, threads=threads)
    with pytest.raises(EngineError, match="threads has to be"):
        open_graph(bundle.onnx_path, "onnxruntime", threads=threads)


def test_values_that_are_none_are_no_prediction(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    model = tiny_model()
    huge = dict(model.params)
    huge["head.bias"] = np.full_like(huge["head.bias"], 3e38)
    huge["head.weight"] = huge["head.weight"] * np.float32(1e38)
    bundle = pipeline.save(pipeline.optimize(model, merge=2), tmp_path / "a.fold")
    pipeline.writing.write_graph(pipeline.optimize(replace(model, params=huge), merge=2), bundle.onnx_path)
    with (
        Predictor(bundle) as predictor,
        pytest.raises(EngineError, match=r"image 0 is NaN or infinite \(1 of 1"),
    ):
        predictor(pictures(1))


def test_a_graph_of_other_outputs_is_noticed(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    bundle = pipeline.save(pipeline.optimize(tiny_model(), merge=2), tmp_path / "a.fold")
    pipeline.writing.write_graph(pipeline.optimize(tiny_model(outputs=7), merge=2), bundle.onnx_path)
    with Predictor(bundle) as predictor, pytest.raises(EngineError, match=r"promises 10 values each; make the bundle"):
        predictor(pictures(1))
