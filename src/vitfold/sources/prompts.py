"""Pipelines of diffusers in folders, and prompts for them in files."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vitfold.errors import SourceError
from vitfold.sources.hub import read_object
from vitfold.sources.load import import_package


def open_pipeline(source: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline of diffusers in single precision, and arguments that keep its sizes as they are asked for.

    Raises:
        SourceError: if there is none, or diffusers cannot read it.
    """
    diffusers = import_package("diffusers", "diffusion", f"loading {source}")
    prefix, _, name = source.partition(":")
    if prefix != "hf" or not name:
        raise SourceError(f"{source!r} names no pipeline of diffusers; prompts go with hf:REPO_OR_FOLDER")
    folder = Path(name).expanduser()
    if (folder.is_absolute() or name.startswith((".", "~"))) and not folder.is_dir():
        raise SourceError(f"there is no folder {folder}; give the one that save_pretrained of a pipeline wrote")
    _check_whole(folder)
    logging = diffusers.utils.logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder) if folder.is_dir() else name, local_files_only=folder.is_dir()
        ).to(torch.float32)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"diffusers cannot read {source}: {line}") from None
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    names = inspect.signature(type(pipe).__call__).parameters
    return pipe, {"use_resolution_binning": False} if "use_resolution_binning" in names else {}


def _check_whole(folder: Path) -> None:
    """Check that a folder has what its index names.

    Raises:
        SourceError: naming the component whose folder is missing.
    """
    if not (folder / "model_index.json").is_file():
        return
    for name, kind in read_object(folder / "model_index.json").items():
        if isinstance(kind, list) and kind and kind[0] is not None and not (folder / name).is_dir():
            raise SourceError(
                f"{folder} lacks the folder {name}, which its model_index.json names ({kind[-1]}); copy it there, or "
                "save the pipeline again by save_pretrained"
            )


def read_prompts(path: Path) -> list[Any]:
    """Return prompts: the lines of a text, or rows of a pipeline's arguments in a file of safetensors.

    Raises:
        SourceError: if there are none.
    """
    if path.suffix == ".safetensors":
        try:
            held = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SourceError(f"{path} cannot be read ({error}); write it by safetensors") from None
        counts = {len(rows) if rows.ndim else 0 for rows in held.values()}
        if len(counts) != 1 or counts == {0}:
            raise SourceError(f"{path} needs as many rows of every argument, found {sorted(counts)}")
        none = {"negative_prompt": None} if "negative_prompt_embeds" in held else {}
        return [{**none, **{n: rows[i : i + 1] for n, rows in held.items()}} for i in range(counts.pop())]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read ({error}); give a text with a prompt per line") from None
    found: list[Any] = [line for line in lines if line]
    if not found:
        raise SourceError(f"{path} holds no prompt; write one per line")
    return found
