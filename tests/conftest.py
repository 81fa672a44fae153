"""What all tests share: shapes and types of signatures executed as vitfold is imported, and tiny models."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxtyping import config, install_import_hook
from PIL import Image

# Tiny tensors lose more to a second thread than they win, above all where tests share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a race finds is asserted nowhere, and its seconds are many.
os.environ.setdefault("VITFOLD_RACE_SECONDS", "0.2")

# From here on every function and dataclass of vitfold checks its annotations when it is called.
_HOOK = install_import_hook("vitfold", "beartype.beartype")

from vitfold.images import ImageSet, find_images  # noqa: E402
from vitfold.model import Array, Model, Origin, Preprocess, ViTSpec, param_shapes  # noqa: E402
from vitfold.recipe import MergeRecipe  # noqa: E402


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no cycles while libraries are imported, and never again among what they made, which stays."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


TINY: dict[str, Any] = {
    "image_size": (32, 32),
    "patch_size": (8, 8),
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "mlp_dim": 48,
    "outputs": 10,
}
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed", "pool.latent")


def random_param(name: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Return a parameter that changes the function if it is dropped, transposed or swapped with another."""
    draw = np.random.default_rng([zlib.crc32(name.encode()), seed])
    if name.endswith((".ls1", ".ls2")):
        values = draw.uniform(0.2, 1.5, shape)
    elif len(shape) == 1 and name.endswith(".weight"):
        values = draw.uniform(0.6, 1.4, shape)
    elif name.endswith(".bias") or name in _TOKENS:
        values = 0.4 * draw.standard_normal(shape)
    else:
        values = draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float32)


def build_tiny_model(*, without: Iterable[str] = (), seed: int = 0, **overrides: Any) -> Model:
    """Return a random model of two blocks and width 32; `without` names optional biases to leave out."""
    spec = ViTSpec(**{**TINY, **overrides})
    required, optional = param_shapes(spec)
    dropped = set(without)
    if unknown := dropped - set(optional):
        raise ValueError(f"not optional parameters of this model: {sorted(unknown)}")
    shapes = required | {name: shape for name, shape in optional.items() if name not in dropped}
    return Model(
        spec=spec,
        params={name: random_param(name, shape, seed) for name, shape in shapes.items()},
        preprocess=Preprocess(
            resize="shortest",
            resize_size=spec.image_size,
            crop_size=spec.image_size,
            interpolation="bicubic",
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        labels=None,
        origin=Origin(source="tests:tiny", loader="tests", arguments={}),
    )


@pytest.fixture
def hide_packages(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function after which these packages count as not installed, and all others, if asked, as installed."""
    found = importlib.metadata.version

    def hide(*absent: str, others: str | None = None) -> None:
        def version(name: str) -> str:
            if name in absent:
                raise importlib.metadata.PackageNotFoundError(name)
            return others or found(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return hide


@pytest.fixture
def broken_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, on PYTHONPATH, lets no package of doctor's list be imported."""
    from vitfold.cli import doctor

    folder = tmp_path_factory.mktemp("broken")
    for _, module, _, _ in doctor._PARTS:
        (folder / f"{module.partition('.')[0]}.py").write_text("raise OSError('broken on purpose')\n", encoding="utf-8")
    return folder


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """Switch annotations off, to reach what vitfold itself says to a wrong type, as it does for its users."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """The factory `tiny_model(**spec_overrides)` of random models with two blocks and width 32."""
    return build_tiny_model


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Array]:
    """The factory `random_images(spec, batch)` of model inputs (batch, channels, H, W)."""

    def make(spec: ViTSpec, batch: int, seed: int = 0) -> Array:
        shape = (batch, spec.channels, *spec.image_size)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def run_torch() -> Callable[..., Array]:
    """The reference: `run_torch(model, images, r, prop_attn)` executes the program with `Run`."""
    import torch

    from vitfold.architectures.programs import forward
    from vitfold.ops.run import Run

    def run(model: Model, images: Array, r: Sequence[int] = (), *, prop_attn: bool = True) -> Array:
        recipe = MergeRecipe(r=tuple(r), prop_attn=prop_attn)
        with torch.inference_mode():
            return forward(Run(model.params), model.spec, recipe, torch.from_numpy(images)).numpy()

    return run


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    """Six random images of 40 x 50 pixels in a folder of their own."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return find_images(folder)


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests neither see nor fill the cache of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFOLD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for this test alone."""
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, where that is installed; of each module by itself, since it keeps asyncio from other tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
