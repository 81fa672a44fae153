"""A model from an ONNX file with what lies beside it: labels and preprocessing."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitfold.errors import SourceError, nearest
from vitfold.model import Model, Origin, Preprocess, preprocess_from_dict
from vitfold.model.preprocess import preprocess_of_arrays
from vitfold.model.spec import Problem
from vitfold.sources.files import read_sidecar
from vitfold.sources.onnx.model import ReadGraph, read_graph
from vitfold.sources.sizes import pair
from vitfold.sources.transformers_preprocess import DEFAULTS, default_processor, preprocess_from_processor

PROCESSOR, CONFIG = "preprocessor_config.json", "config.json"
USUAL = "deit"
"""The family whose preprocessing is taken where nothing says another: ImageNet's means."""
_log = logging.getLogger("vitfold")


def load_file(
    path: Path,
    origin: Origin,
    *,
    image_size: tuple[int, int] | None = None,
    problem: Problem | None = None,
    preprocess: str | None = None,
    outputs: Sequence[str] = (),
) -> Model:
    """Load an ONNX file.

    Labels and preprocessing come from `MODEL.json` (keys labels, preprocess, problem, image_size), else from
    `config.json` and `preprocessor_config.json` in its folder.

    Args:
        preprocess: a file that says how images are prepared, or a family that has a usual way: vit, deit, dinov2, clip,
            siglip.
        outputs: as `read_graph` takes them.

    Raises:
        SourceError: if the file cannot be read, or has what vitfold cannot hold.
        ParityError: if the program does not compute what the file does.
    """
    if not path.is_file():
        raise SourceError(f"no file {path}; check the path")
    sidecar = read_sidecar(path.with_suffix(".json"))
    size = image_size or pair(sidecar.get("image_size"))
    kind = problem or sidecar.get("problem")
    labels = _labels(path, sidecar)
    head = kind or ("single_label" if labels else None)
    read = read_graph(path, image_size=size, head=head, outputs=outputs)
    return model_of(
        read, origin, labels=labels, preprocess=_preprocess(path, sidecar, preprocess, read.spec.image_size)
    )


def model_of(read: ReadGraph, origin: Origin, *, labels: Sequence[str] | None, preprocess: Preprocess | None) -> Model:
    """Return a model of what was read; labels that do not fit its outputs are left out with a warning."""
    spec = read.spec
    if len(spec.input_shape) != 3 or spec.channels != 3:
        preprocess = preprocess_of_arrays(spec.input_shape)
    elif preprocess is None:
        preprocess = preprocess_from_processor(default_processor(USUAL, spec.image_size), spec.image_size)
        _log.warning(
            "nothing says how images are prepared for this graph: taking the usual way of ImageNet (short side to "
            "256/224 of %d x %d, its means); give --preprocess",
            *spec.image_size,
        )
    if labels is not None and len(labels) != spec.output_width:
        _log.warning("there are %d labels for %d outputs; they are left out", len(labels), spec.output_width)
        labels = None
    if spec.inputs[0].dtype.startswith(("int", "uint")):
        preprocess = replace(preprocess, mean=(0.0,) * 3, std=(1 / 255,) * 3)  # the graph takes pixels as they are
    fits = bool(preprocess.arrays) or preprocess.crop_size == spec.image_size
    return Model(
        spec=spec,
        params=read.params,
        preprocess=preprocess if fits else replace(preprocess, crop_size=spec.image_size),
        labels=None if labels is None else tuple(labels),
        origin=origin,
    )


def _labels(path: Path, sidecar: Mapping[str, Any]) -> tuple[str, ...] | None:
    if sidecar.get("labels") is not None:
        return tuple(str(label) for label in sidecar["labels"])
    names = _json(path.with_name(CONFIG)).get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdigit() for key in names):
        return None
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _preprocess(
    path: Path, sidecar: Mapping[str, Any], given: str | None, image_size: tuple[int, int]
) -> Preprocess | None:
    if given is not None and given in DEFAULTS:
        return preprocess_from_processor(default_processor(given, image_size), image_size)
    if given is not None:
        file = Path(given).expanduser()
        if not file.is_file():
            raise SourceError(f"--preprocess {given} is no file and no family; {nearest(given, DEFAULTS)}")
        return _from_values(_json(file), image_size, file)
    if sidecar.get("preprocess") is not None:
        return preprocess_from_dict(sidecar["preprocess"])
    beside = path.with_name(PROCESSOR)
    return _from_values(_json(beside), image_size, beside) if beside.is_file() else None


def _from_values(values: Mapping[str, Any], image_size: tuple[int, int], path: Path) -> Preprocess:
    if not values:
        raise SourceError(f"{path} says nothing about preprocessing; give a preprocessor_config.json")
    if "crop_size" in values and "resize_size" in values:
        return preprocess_from_dict(dict(values))
    return preprocess_from_processor(dict(values), image_size)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is no JSON file ({error}); mend or remove it") from None
    return values if isinstance(values, dict) else {}
