"""The unfolded model's outputs: computed once, kept, and never those of another model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle
from vitfold.artifacts.cache import keep_arrays, read_arrays
from vitfold.bench.reference import Reference, optional_reference, reference_outputs
from vitfold.errors import SourceError
from vitfold.images import ImageSet
from vitfold.model import Model

pytestmark = pytest.mark.usefixtures("own_cache")


def save(model: Model, path: Path, merge: int | None = None) -> Bundle:
    return pipeline.save(pipeline.optimize(model, merge=merge), path)


def test_outputs_are_computed_once(tiny_model: Callable[..., Model], photos: ImageSet) -> None:
    model = tiny_model()
    calls = []

    def find() -> Reference:
        calls.append(1)
        return Reference(model=model)

    first = reference_outputs(model.digest(), photos, model.preprocess, find)
    second = reference_outputs(model.digest(), photos, model.preprocess, find)
    assert len(calls) == 1
    np.testing.assert_array_equal(first.values, second.values)
    assert first.index == second.index == (0, 1, 2, 3, 4, 5)


def test_other_images_or_another_model_are_computed_anew(
    tiny_model: Callable[..., Model], photos: ImageSet, tmp_path: Path
) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    first = reference_outputs(model.digest(), photos, model.preprocess, lambda: Reference(model=model))
    second = reference_outputs(other.digest(), photos, other.preprocess, lambda: Reference(model=other))
    assert not np.allclose(first.values, second.values)
    Image.new("RGB", (50, 40)).save(photos.paths[0])
    third = reference_outputs(model.digest(), photos, model.preprocess, lambda: Reference(model=model))
    assert not np.allclose(first.values[0], third.values[0])
    np.testing.assert_allclose(first.values[1:], third.values[1:], rtol=1e-5, atol=1e-5)


def test_a_damaged_cache_entry_is_computed_again(
    tiny_model: Callable[..., Model], photos: ImageSet, own_cache: Path
) -> None:
    model = tiny_model()
    first = reference_outputs(model.digest(), photos, model.preprocess, lambda: Reference(model=model))
    (entry,) = (own_cache / "reference").iterdir()
    entry.write_bytes(b"damaged")
    second = reference_outputs(model.digest(), photos, model.preprocess, lambda: Reference(model=model))
    np.testing.assert_array_equal(first.values, second.values)


def test_a_bundle_without_merging_serves_as_reference(
    tiny_model: Callable[..., Model], photos: ImageSet, tmp_path: Path
) -> None:
    model = tiny_model()
    plain, merged = save(model, tmp_path / "plain.fold"), save(model, tmp_path / "merged.fold", 3)
    by_bundle = reference_outputs("by bundle", photos, model.preprocess, optional_reference(merged, plain))
    by_model = reference_outputs("by model", photos, model.preprocess, lambda: Reference(model=model))
    np.testing.assert_allclose(by_bundle.values, by_model.values, rtol=1e-5, atol=1e-5)


def test_unfit_references_are_refused(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    merged = save(tiny_model(), tmp_path / "merged.fold", 3)
    other = save(tiny_model(seed=1), tmp_path / "other.fold")
    with pytest.raises(SourceError, match="--merge none"):
        optional_reference(merged, merged)()
    with pytest.raises(SourceError, match="not made from the same model"):
        optional_reference(merged, other)()
    with pytest.raises(SourceError, match="--reference"):
        optional_reference(merged, None)()


def test_an_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "file" / "below"))
    keep_arrays("kind", "0" * 64, {"a": np.zeros(3)})
    assert read_arrays("kind", "0" * 64) is None


def test_the_cache_returns_what_it_was_given() -> None:
    keep_arrays("kind", "0" * 64, {"a": np.arange(6).reshape(2, 3)[:, ::2]})
    kept = read_arrays("kind", "0" * 64)
    assert kept is not None
    np.testing.assert_array_equal(kept["a"], [[0, 2], [3, 5]])
