"""The unfolded model's outputs, computed once and kept.

Where they come from: the cache, a bundle that the user names, or the loaded model itself, run without any fold that
costs accuracy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vitfold.architectures.programs import program_of
from vitfold.artifacts.bundle import Bundle
from vitfold.artifacts.cache import keep_arrays, key_of, read_arrays
from vitfold.bench.classes import class_targets
from vitfold.bench.evaluation import Outputs, run_over
from vitfold.bench.fidelity import Fidelity, measure_fidelity
from vitfold.engines import DEFAULT, ENGINES, Session, open_graph, open_session
from vitfold.errors import SourceError, VitfoldError
from vitfold.images import ImageSet
from vitfold.model import Architecture, Model, Preprocess, ViTSpec
from vitfold.model.spec import Head
from vitfold.program import replay
from vitfold.progress import Advance
from vitfold.target import find_target
from vitfold.transforms.rewriting import only_outputs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """How to get the unfolded model's outputs: from a loaded model, or from a bundle with r = 0."""

    model: Model | None = None
    bundle: Bundle | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.bundle is None):
            raise ValueError("a reference is a model or a bundle")
        if self.bundle is not None and not self.bundle.manifest.recipe.is_lossless:
            raise SourceError(
                f"{self.bundle.path} is folded itself (r = {list(self.bundle.manifest.recipe.merge.r)}); "
                "give a bundle made with --merge none as reference"
            )

    @property
    def is_float32(self) -> bool:
        """True if its outputs are those of the model as it was loaded, not rounded to half precision."""
        return self.bundle is None or _is_float32(self.bundle)

    def open(self, folder: Path) -> Session:
        """Open a session of the unfolded model, on any machine; `folder` holds its graph meanwhile."""
        if self.bundle is not None:
            made_for = ENGINES[self.bundle.manifest.target["engine"]]
            return open_session(self.bundle, engine=DEFAULT if made_for.gpu else None)
        from vitfold.ops.emit import emit_graph, write_onnx

        model = self.model
        assert model is not None
        program = only_outputs(program_of(model.spec), *model.spec.output_names)
        graph = emit_graph(lambda ops, image: replay(program, ops, image), model, find_target("cpu"))
        write_onnx(graph, folder / "reference.onnx")
        return open_graph(folder / "reference.onnx", DEFAULT)


def _is_float32(bundle: Bundle) -> bool:
    return str(bundle.manifest.target.get("float_type", "float32")) == "float32"


def _with_answer(spec: Architecture, held: Architecture) -> Architecture:
    """An architecture whose outputs stand for what those of a bundle do."""
    if isinstance(spec, ViTSpec) and isinstance(held, ViTSpec):
        return replace(spec, problem=held.problem)
    return spec


def reference_from_origin(bundle: Bundle) -> Reference:
    """Load the model that a bundle was made from, as its manifest states.

    Raises:
        VitfoldError: if that model is not at hand any more or the optimize extra is missing.
    """
    from vitfold.sources.origin import load_origin

    origin, manifest = bundle.manifest.origin, bundle.manifest
    model = load_origin(origin).model
    # What an older vitfold did not read from this source changes how images and outputs are taken, not the weights.
    model = replace(
        model,
        spec=_with_answer(model.spec, manifest.spec),
        preprocess=replace(model.preprocess, exif=manifest.preprocess.exif),
    )
    if model.digest() != bundle.manifest.model_digest:
        raise SourceError(
            f"{origin['source']} has other weights now than when {bundle.path} was made; "
            "make the bundle again, or give --reference a bundle made with --merge none from the old weights"
        )
    return Reference(model=model)


def reference_outputs(
    digest: str,
    images: ImageSet,
    preprocess: Preprocess,
    find: Callable[[], Reference],
    *,
    skip_bad: bool = False,
    advance: Advance | None = None,
) -> Outputs:
    """Return the unfolded model's outputs on these images, from the cache if they were computed before.

    `find` is called only if they were not. Outputs in half precision are not kept.
    """
    key = key_of(digest, images.digest(), preprocess)
    kept = read_arrays("reference", key)
    if kept is not None and {"values", "index"} <= set(kept) and np.isfinite(kept["values"]).all():
        return Outputs(values=kept["values"], index=tuple(int(i) for i in kept["index"]), skipped=())
    reference = find()
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder, reference.open(Path(folder)) as session:
        outputs = run_over(session, images, preprocess, skip_bad=skip_bad, advance=advance)
    if reference.is_float32:
        keep_arrays("reference", key, {"values": outputs.values, "index": np.array(outputs.index, np.int64)})
    return outputs


def compare_outputs(
    outputs: Outputs, images: ImageSet, *, labels: tuple[str, ...] | None, head: Head, reference: Outputs | None
) -> Fidelity:
    """Return accuracy and fidelity of outputs on images, over those that both could read."""
    values, index = outputs.values, outputs.index
    ref = None
    if reference is not None:
        position = {image: row for row, image in enumerate(reference.index)}
        rows = [row for row, image in enumerate(index) if image in position]
        values, index = values[rows], tuple(index[row] for row in rows)
        ref = reference.values[[position[image] for image in index]]
    targets = None
    if images.classes is not None and head == "single_label":
        every = class_targets(images, labels, values.shape[1])
        targets = [every[image] for image in index]
    return measure_fidelity(
        values,
        targets=targets,
        reference=ref,
        reference_name=None if ref is None else "unfolded float32",
        head=head,
    )


def optional_reference(bundle: Bundle, given: Bundle | None) -> Callable[[], Reference]:
    """Return how to find a bundle's reference: the one given, or the model that it was made from."""

    def find() -> Reference:
        if given is not None:
            if given.manifest.model_digest != bundle.manifest.model_digest:
                raise SourceError(f"{given.path} was not made from the same model as {bundle.path}")
            return Reference(bundle=given)
        if bundle.manifest.recipe.is_lossless and _is_float32(bundle):
            return Reference(bundle=bundle)
        try:
            return reference_from_origin(bundle)
        except VitfoldError as error:
            raise SourceError(
                f"the unfolded model of {bundle.path} is needed for agreement and is not at hand: {error}; "
                "or pass --reference with a bundle made with --merge none from the same model"
            ) from None

    return find
