"""One contract for every engine: what `bind`, `run` and `fetch` promise. A new engine adds one row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vitfold import pipeline
from vitfold.bundle import Bundle
from vitfold.engines import ENGINES, Session, open_session
from vitfold.errors import EngineError
from vitfold.model import Array, Model


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def bundle(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return pipeline.save(pipeline.optimize(model, merge=3), tmp_path_factory.mktemp("engines") / "tiny.fold")


@pytest.fixture(params=ENGINES)
def session(request: pytest.FixtureRequest, bundle: Bundle) -> Iterator[Session]:
    with open_session(bundle, engine=request.param, threads=1) as opened:
        yield opened


def run(session: Session, pixels: Array) -> Array:
    session.bind(pixels)
    session.run()
    return session.fetch()


def test_an_engine_is_a_session_and_says_its_version(session: Session) -> None:
    assert isinstance(session, Session)
    name, version = session.engine.split(maxsplit=1)
    assert name in ENGINES
    assert version[0].isdigit()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_output_is_that_of_the_reference(
    session: Session,
    model: Model,
    batch: int,
    random_images: Callable[..., Array],
    run_torch: Callable[..., Array],
) -> None:
    pixels = random_images(model.spec, batch)
    expected = run_torch(model, pixels, (3, 3))
    np.testing.assert_allclose(run(session, pixels), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_equal_input_gives_equal_output(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 3)
    np.testing.assert_array_equal(run(session, pixels), run(session, pixels))


def test_what_was_fetched_belongs_to_the_caller(
    session: Session, model: Model, random_images: Callable[..., Array]
) -> None:
    first = run(session, random_images(model.spec, 2, seed=1))
    kept = first.copy()
    run(session, random_images(model.spec, 2, seed=2))
    np.testing.assert_array_equal(first, kept)


def test_an_image_does_not_depend_on_its_neighbours(
    session: Session, model: Model, random_images: Callable[..., Array]
) -> None:
    pixels = random_images(model.spec, 4)
    together = run(session, pixels)
    alone = np.concatenate([run(session, pixels[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


def test_input_need_not_be_contiguous(session: Session, model: Model, random_images: Callable[..., Array]) -> None:
    pixels = random_images(model.spec, 4)
    np.testing.assert_array_equal(run(session, pixels[::2]), run(session, np.ascontiguousarray(pixels[::2])))


@pytest.mark.parametrize("shape", [(1, 3, 31, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_a_wrong_shape_says_the_right_one(session: Session, shape: tuple[int, ...]) -> None:
    with pytest.raises((EngineError, TypeError), match="32"):
        session.bind(np.zeros(shape, np.float32))


def test_a_closed_session_says_so(bundle: Bundle) -> None:
    for engine in ENGINES:
        opened = open_session(bundle, engine=engine)
        opened.close()
        with pytest.raises(EngineError, match="closed"):
            opened.run()


def test_an_unknown_engine_offers_the_nearest(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="onnxruntime"):
        open_session(bundle, engine="onnxrt")


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    from vitfold.engines.onnxruntime import OnnxRuntimeSession

    (tmp_path / "bad.onnx").write_bytes(b"this is no protobuf")
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        OnnxRuntimeSession(tmp_path / "bad.onnx")
    with pytest.raises(EngineError, match=r"absent\.onnx"):
        OnnxRuntimeSession(tmp_path / "absent.onnx")
