"""Towers with planted sinks, and photos on which they show."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import vitfold
from vitfold.images import ImageSet, find_images
from vitfold.model import Model

ROOT = Path(__file__).resolve().parents[2]


def planted_sinks() -> ModuleType:
    """The example that plants them."""
    spec = importlib.util.spec_from_file_location("planted_sinks", ROOT / "examples" / "planted_sinks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def planted() -> Callable[[str], Model]:
    """`planted("clip")` or `planted("siglip")`, each built once."""
    pytest.importorskip("transformers", reason="the towers are those of transformers")
    return cache(lambda family: vitfold.adapt(planted_sinks().plant(family)))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Twelve smooth random images."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(draw.integers(0, 255, (5, 5, 3), dtype=np.uint8))
        coarse.resize((140, 130), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    return find_images(folder)


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory):
    """One cache for all tests here: what is measured twice is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("VITFOLD_CACHE", str(folder))
        yield folder
