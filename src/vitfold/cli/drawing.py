"""Drawn images on the way out: decoded, described as JSON, written as files.

Shared by the commands that draw; what is drawn, and how, is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfold.cli.terminal import write_json
from vitfold.errors import SourceError, VitfoldError, nearest

if TYPE_CHECKING:
    from vitfold.model import Array, Drawn
    from vitfold.pipeline.diffusion import Asked, Row


def read_classes(words: str, count: int | None, model: Drawn) -> tuple[int, ...]:
    """Return one class per image: numbers or names separated by commas, or `all`; repeated up to `count` images.

    Raises:
        SourceError: if a word is neither a number nor one of the model's labels.
    """
    labels = model.labels or ()
    found: list[int] = []
    for word in (word.strip() for word in words.split(",")):
        if word == "all":
            found += range(model.spec.classes)
        elif word.isdecimal():
            found.append(int(word))
        elif word in labels:
            found.append(labels.index(word))
        else:
            cure = nearest(word, labels) if labels else "this model has no names for its classes"
            raise SourceError(f"--classes are numbers, names or all, found {word!r}; {cure}")
    return tuple(found[i % len(found)] for i in range(count)) if count is not None else tuple(found)


def decoder(model: Drawn) -> Callable[[Array], Array]:
    """Return what makes images in [0, 1] of samples.

    Raises:
        SourceError: if the model makes latents, and its VAE is not there.
    """
    if not model.latent:
        return lambda samples: (samples.clip(-1, 1) + 1) / 2
    if model.decoder is None:
        raise SourceError(
            f"{model.origin.source} makes latents, and the VAE that turns them into images is not there; put it into "
            "the folder vae beside the transformer, or write the latents: --latents"
        )
    from vitfold.sources.diffusers import load_decoder

    return load_decoder(Path(model.decoder))


def document(
    model: Drawn,
    asked: Asked,
    rows: Sequence[Row],
    *,
    merge: int,
    quant: str,
    features: str | None,
    chosen: str | None,
) -> dict[str, Any]:
    """Return what was asked for and what was measured, as plain JSON values."""
    from vitfold.bench.environment import environment

    return {
        "source": model.origin.source,
        "classes": list(asked.labels),
        "seed": asked.seed,
        "steps": asked.steps,
        "sampler": asked.sampler,
        "guidance": asked.guidance,
        "batch": asked.batch,
        "merge": merge,
        "quant": quant,
        "features": features,
        "engine": rows[0].measurement.engine,
        "chosen": chosen,
        "environment": environment(),
        "rows": [row.to_dict() for row in rows],
        "measurements": [row.measurement.to_dict() for row in rows],
    }


def write_drawn(
    folder: Path,
    model: Drawn,
    labels: tuple[int, ...],
    rows: Sequence[Row],
    decode: Callable[[Array], Array] | None,
    found: Mapping[str, Any],
) -> None:
    """Write the JSON, and the images with their sheet; latents where nothing decodes them.

    Raises:
        VitfoldError: if the folder cannot be written.
    """
    import numpy as np

    from vitfold.report.sheet import write_images

    write_json(folder / "diffuse.json", found)
    if decode is None:
        try:
            held: dict[str, Any] = {row.name: row.sampled.samples for row in rows}
            np.savez(folder / "latents.npz", **held)
        except OSError as error:
            raise VitfoldError(f"cannot write {folder}: {error}; choose another folder") from None
        return
    names = [model.labels[label] if model.labels else f"class-{label}" for label in labels]
    write_images(folder, {row.name: decode(row.sampled.samples) for row in rows}, names)
