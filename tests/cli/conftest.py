"""What the tests of the command line share: one cache, a few labelled images, a small model and short races."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoking import DEMO, saved_vit

from vitfold.pipeline.trial import MOST_SECONDS


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def surroundings(shared_cache: Path) -> Iterator[None]:
    """One cache for all commands, and races, whose results nobody relies on, of a fraction of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFOLD_CACHE", str(shared_cache))
        patch.setenv(MOST_SECONDS, "0.1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labelled demo images of every class, twenty in all."""
    made = tmp_path_factory.mktemp("images") / "few"
    for category in sorted((DEMO / "images").iterdir()):
        (made / category.name).mkdir(parents=True)
        for path in sorted(category.iterdir())[:2]:
            shutil.copy(path, made / category.name)
    return made


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A model in a file: six blocks of width 64, which calibrate in a moment."""
    return saved_vit(tmp_path_factory.mktemp("small") / "small.safetensors", image_size=32)
