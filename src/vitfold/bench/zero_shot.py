"""Zero-shot classification: image embeddings against one text embedding per class.

Which texts, and what embeds them: `sources.text_towers`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vitfold.bench.evaluation import Outputs
from vitfold.errors import VitfoldError
from vitfold.storage.ordinary import check_ordinary

SUFFIXES = (".npy", ".safetensors")


def read_embeds(path: Path) -> Float[np.ndarray, "C D"]:
    """Read text embeddings: one row per class, in the sorted order of class folders, as the only array of the file.

    Raises:
        VitfoldError: if the file cannot be read or holds something else.
    """
    try:
        check_ordinary(path)
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            arrays = load_file(path)
            if len(arrays) != 1:
                raise ValueError(f"it holds {len(arrays)} arrays")
            found = next(iter(arrays.values()))
    except (OSError, ValueError, SafetensorError) as error:
        raise VitfoldError(f"{path} holds no text embeddings ({error}); write one array (classes, width)") from None
    if found.ndim != 2 or not np.issubdtype(found.dtype, np.floating) or not np.isfinite(found).all():
        raise VitfoldError(f"{path} holds an array {found.dtype}{found.shape}; write finite reals (classes, width)")
    return np.asarray(found, np.float32)


def check_embeds(texts: Float[np.ndarray, "C D"], *, classes: int, width: int, name: str) -> None:
    """Check that text embeddings fit the class folders and the model.

    Raises:
        VitfoldError: naming what does not.
    """
    if texts.shape[1] != width:
        raise VitfoldError(
            f"{name} has text embeddings of width {texts.shape[1]}, the model's image embeddings have {width}; give "
            "the text tower that was trained with this image tower"
        )
    if texts.shape[0] != classes:
        raise VitfoldError(f"{name} has {texts.shape[0]} classes, the images are in {classes} class folders")


def zero_shot(outputs: Outputs, texts: Float[np.ndarray, "C D"]) -> Outputs:
    """Return the cosines of every image with every class, as outputs of a classifier.

    Equation: l_bc = <x_b, t_c> / (|x_b| |t_c|); temperature and bias of the training change no order.

    Source: CLIP (2103.00020), section 3.1.2.
    """
    images, classes = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (
        outputs.values.astype(np.float64), texts.astype(np.float64)
    ))  # fmt: skip
    return replace(outputs, values=(images @ classes.T).astype(np.float32))
