"""The program that is written for a runtime: the plain forward pass with its merging, without what nothing reads."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from vitfold.architectures.vit import vit
from vitfold.model import ViTSpec, param_shapes
from vitfold.ops.protocol import Port
from vitfold.program import Program, trace
from vitfold.program.program import Shape
from vitfold.recipe import MergeRecipe
from vitfold.transforms import without_dead_rows

INPUT = "pixel_values"


def deployed_program(spec: ViTSpec, merge: MergeRecipe, shapes: Mapping[str, Shape] | None = None) -> Program:
    """Return the program of a Vision Transformer, without the rows of its last block that pooling does not read.

    Args:
        shapes: those of the parameters that the model has; all that its architecture may have, if None.
    """
    found = _all_shapes(spec) if shapes is None else shapes
    return _deployed(spec, merge, tuple(sorted(found.items())))


@functools.lru_cache(maxsize=32)
def _deployed(spec: ViTSpec, merge: MergeRecipe, shapes: tuple[tuple[str, Shape], ...]) -> Program:
    known = dict(shapes)
    written = trace(
        lambda ops, image: vit(ops, spec, merge, image),
        known,
        inputs=(Port(name=INPUT, shape=(spec.channels, *spec.image_size)),),
        outputs=(spec.output,),
    )
    return without_dead_rows(written, known)


def _all_shapes(spec: ViTSpec) -> Mapping[str, Shape]:
    required, optional = param_shapes(spec)
    return required | optional
