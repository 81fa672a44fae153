"""What a step is told beside the image: classes of a Diffusion Transformer, embeddings of prompts of a denoiser."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vitfold.engines import Session
from vitfold.errors import RecipeError
from vitfold.model import Array, DenoiserSpec, DiTSpec
from vitfold.model.denoiser import TIMESTEP
from vitfold.model.dit import class_rows, timestep_embedding

At = Callable[[int], Mapping[str, Array]]
"""From a step to what its parts read beside the image."""
_NEGATIVE = "negative."
_NAMES = "names"


@runtime_checkable
class Conditions(Protocol):
    """What may be asked for, by number."""

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def at(self, executor: Session, timesteps: Sequence[float], labels: Sequence[int], *, guided: bool) -> At:
        """Return what every step reads: rows with the conditions, then, if guided, as many without."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """The classes of a Diffusion Transformer; both embeddings are computed for all steps before the first one."""

    spec: DiTSpec

    @property
    def count(self) -> int:
        """How many there are."""
        return self.spec.classes

    def at(self, executor: Session, timesteps: Sequence[float], labels: Sequence[int], *, guided: bool) -> At:
        """Return what every step and every class asked for do to the model."""
        spec = self.spec
        asked = [*labels, *([spec.null_class] * len(labels) if guided else [])]
        classes, row_of = np.unique(np.array(asked), return_inverse=True)
        t_freq = timestep_embedding(spec, np.repeat(np.array(timesteps).astype(int), len(classes)))
        executor.bind({"waves": t_freq, "label": class_rows(spec, np.tile(classes, len(timesteps)))})
        executor.run("condition")
        found = executor.fetch("given")["given"]
        given = found.reshape(len(timesteps), len(classes), spec.modulations, spec.embed_dim)
        return lambda step: {"given": given[step][row_of]}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompts:
    """Prompts as a denoiser reads them: for every one of its conditions an array with a row per prompt.

    `negative` are the rows that guidance leads away from, none where a model is not guided by a second pass.
    """

    names: tuple[str, ...]
    given: Mapping[str, Array]
    negative: Mapping[str, Array]
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        wrong = [name for name, rows in (*self.given.items(), *self.negative.items()) if len(rows) != len(self.names)]
        if wrong or not self.names:
            raise RecipeError(f"{len(self.names)} prompts need as many rows of {wrong[0] if wrong else 'conditions'}")
        if self.negative and set(self.negative) != set(self.given):
            raise RecipeError("prompts need the same conditions with and without guidance")

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.names)

    def check(self, spec: DenoiserSpec, guidance: float) -> None:
        """Check that they are for a denoiser.

        Raises:
            RecipeError: naming what does not fit.
        """
        wanted = {one.name: one.shape for one in spec.conditions}
        for rows in (self.given, self.negative) if self.negative else (self.given,):
            found = {name: array.shape[1:] for name, array in rows.items()}
            if found != wanted:
                name = next(name for name in (*wanted, *found) if found.get(name) != wanted.get(name))
                raise RecipeError(
                    f"the embeddings have {name} of shape {found.get(name)}, and this model takes "
                    f"{wanted.get(name)}; embed the prompts by its own text encoders"
                )
        if guidance != 1.0 and not self.negative:
            raise RecipeError(f"guidance {guidance:g} needs negative embeddings, and there are none; take guidance 1")

    def at(self, executor: Session, timesteps: Sequence[float], labels: Sequence[int], *, guided: bool) -> At:
        """Return what every step reads."""
        del executor
        picked = np.array(labels)
        rows = {
            name: np.concatenate([array[picked], self.negative[name][picked]]) if guided else array[picked]
            for name, array in self.given.items()
        }
        times = [np.float32(t * self.time_scale) for t in timesteps]
        count = len(labels) * (2 if guided else 1)
        return lambda step: {TIMESTEP: np.full(count, times[step], np.float32), **rows}

    def save(self, path: str | Path) -> Path:
        """Write them as safetensors: NAME and negative.NAME, a row per prompt, and in the metadata what they say.

        Raises:
            RecipeError: if the file cannot be written.
        """
        path = Path(path)
        arrays = {**self.given, **{f"{_NEGATIVE}{name}": array for name, array in self.negative.items()}}
        try:
            save_file(
                {name: np.ascontiguousarray(array) for name, array in arrays.items()},
                path,
                metadata={_NAMES: json.dumps(self.names)},
            )
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"cannot write {path}: {error}; choose another folder") from None
        return path


def load_prompts(path: str | Path, spec: DenoiserSpec) -> Prompts:
    """Read embeddings that `Prompts.save` wrote; names of prompts may be missing.

    Raises:
        RecipeError: if there is no such file, or it does not fit the model.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in list(file.keys())}
            names = json.loads((file.metadata() or {}).get(_NAMES, "null"))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise RecipeError(f"{path} holds no embeddings ({error}); write them by vitfold.embed_prompts") from None
    if not arrays or any(array.ndim == 0 for array in arrays.values()):
        raise RecipeError(f"{path} holds no rows of embeddings; write them by vitfold.embed_prompts")
    given = {name: array for name, array in arrays.items() if not name.startswith(_NEGATIVE)}
    count = len(next(iter(given.values()))) if given else 0
    if not isinstance(names, list) or len(names) != count:
        names = [f"prompt-{i}" for i in range(count)]
    found = Prompts(
        names=tuple(map(str, names)),
        given=given,
        negative={n.removeprefix(_NEGATIVE): array for n, array in arrays.items() if n.startswith(_NEGATIVE)},
        time_scale=spec.time_scale,
    )
    found.check(spec, 1.0)
    return found
