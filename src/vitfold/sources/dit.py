"""From a source string to a checked `DiTModel`: which file is read by whom."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vitfold.errors import SourceError
from vitfold.model import DiTModel, Origin
from vitfold.sources.load import import_package
from vitfold.storage.digest import file_sha256

DEMO_DIT = "demo-dit"
REAL = "real.safetensors"
FORMS = (
    "hf:REPO_OR_FOLDER of a DiTTransformer2DModel, FILE.safetensors or FILE.pt with the names of DiT's own repository, "
    f"or {DEMO_DIT}"
)


def load_dit(source: str, *, heads: int | None = None) -> DiTModel:
    """Load a pretrained Diffusion Transformer.

    A folder of diffusers is checked against diffusers itself; of a state dict there is no original to compare with.

    Args:
        source: hf:REPO_OR_FOLDER, FILE.safetensors, FILE.pt, or demo-dit.
        heads: attention heads, which a state dict does not tell; needed where the width is not a published one.

    Raises:
        SourceError: if the source is unknown, unreadable, or has a feature that vitfold does not run.
        ParityError: if the program differs from the original.
    """
    import_package("torch", "optimize", "loading a model")
    prefix, colon, name = source.partition(":")
    if source == DEMO_DIT or (colon and prefix == "hf" and name):
        if heads is not None:
            raise SourceError(f"--heads {heads} belongs to a file, and {source} says so itself; leave it out")
        return _from_diffusers(source, str(_demo()) if source == DEMO_DIT else name)
    path = Path(source).expanduser()
    if path.suffix in (".pt", ".pth", ".safetensors"):
        from vitfold.sources.facebook import read_state_dict

        if not path.is_file():
            raise SourceError(f"there is no file {path}; a source is {FORMS}")
        path = path.resolve()
        arguments: dict[str, Any] = {"heads": heads, "sha256": file_sha256(path)}
        return read_state_dict(path, heads, Origin(source=str(path), loader="torch", arguments=arguments))
    if path.is_dir():
        raise SourceError(f"{source} is a folder; for a folder of diffusers write hf:{source}")
    raise SourceError(f"{source!r} names no Diffusion Transformer, and there is no such bundle; a source is {FORMS}")


def _from_diffusers(source: str, name: str) -> DiTModel:
    package = import_package("diffusers", "diffusion", f"loading {source}")
    from vitfold.sources.diffusers import read_folder, read_repository

    folder = Path(name).expanduser()
    loader = f"diffusers {package.__version__}"
    if folder.is_dir():
        folder = folder.resolve()
        source = source if source == DEMO_DIT else f"hf:{folder}"
        return read_folder(folder, Origin(source=source, loader=loader, arguments={}))
    if folder.is_absolute() or name.startswith((".", "~")):
        raise SourceError(f"there is no folder {folder}; a source is {FORMS}")
    return read_repository(name, Origin(source=source, loader=loader, arguments={}))


def demo_dit_folder() -> Path:
    """Return the folder of the demo: the one that VITFOLD_DEMO_DIT names, or the one in the checkout."""
    named = os.environ.get("VITFOLD_DEMO_DIT")
    if named:
        return Path(named).expanduser().resolve()
    return Path(__file__).resolve().parents[3] / "assets" / "demo_dit"


def judge_folder(source: str) -> Path | None:
    """Return the folder `judge` beside the weights of a source, if there is one: a classifier of timm, REAL within."""
    prefix, _, name = source.partition(":")
    if source != DEMO_DIT and prefix != "hf":
        return None
    folder = (demo_dit_folder() if source == DEMO_DIT else Path(name).expanduser().resolve()) / "judge"
    return folder if folder.is_dir() else None


def _demo() -> Path:
    folder = demo_dit_folder()
    if not folder.is_dir():
        raise SourceError(
            f"the demo's Diffusion Transformer is not at {folder}; train it with examples/train_demo_dit.py and set "
            "VITFOLD_DEMO_DIT to the folder that it exports"
        )
    return folder
