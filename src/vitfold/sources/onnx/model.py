"""From an ONNX file to a checked `Model`: read, lift, recognise, compare with the file in ONNX Runtime."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from vitfold.errors import ParityError, SourceError, UnsupportedError
from vitfold.model import Array, GraphEnd, GraphSpec
from vitfold.model.graph import Kind
from vitfold.model.spec import random_array
from vitfold.ops.run import Run
from vitfold.program import Program, Ref, replay
from vitfold.program.queries import attentions_of, makers, params_read, readers
from vitfold.sources.onnx.attention import with_attentions
from vitfold.sources.onnx.blocks import Blocks, with_blocks
from vitfold.sources.onnx.lifting import LiftedProgram, lift
from vitfold.sources.onnx.reading import (
    BATCHES,
    Plain,
    at_batch,
    random_inputs,
    read_plain,
    run_values,
)
from vitfold.sources.onnx.scales import with_folded_scales
from vitfold.sources.onnx.views import with_short_views
from vitfold.transforms.dead import without_dead_nodes

TOLERANCE = 1e-5
_ROWS = 1e-4
_CHANNELS = (1, 3, 4)
_FEATURES = ("embed", "feature", "hidden", "token", "pool")
_NO_LOGITS = ("layer_norm", "rms_norm", "mean", "reduce", "divide")
"""What makes features: a norm, a pooling, a division by a length."""
_CLASSES = ("logits", "seg")
_MOST_PREFIX = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadGraph:
    """What a file came to: its architecture and parameters, and how far the program is from it."""

    spec: GraphSpec
    params: Mapping[str, Array]
    error: float


def read_graph(
    path: Path,
    *,
    image_size: Sequence[int] | None = None,
    head: Kind | None = None,
    outputs: Sequence[str] = (),
) -> ReadGraph:
    """Read an ONNX file.

    Args:
        outputs: those that are wanted; where all are outputs of the file, the others and what they need are left out.
        image_size: height and width, for files that leave them open.
        head: what the first output stands for, where its name does not say so.

    Raises:
        SourceError: if the file cannot be read, or has what vitfold cannot hold.
        ParityError: if the program does not compute what the file does, naming the first node that differs.
    """
    return read(*read_plain(path, image_size=image_size, chosen=outputs), path, head=head)


def read(plain: Plain, model: onnx.ModelProto, path: Path, *, head: Kind | None = None) -> ReadGraph:
    """Lift a graph, recognise its parts, and compare it with what it came from, as `read_graph` does."""
    image = _image_end(plain, path)
    found, error, lifted = lift_blocks(plain, model, path)
    return ReadGraph(spec=_spec(plain, image, lifted, found, head), params=found.params, error=error)


def lift_blocks(
    plain: Plain, model: onnx.ModelProto, path: Path, *, attending: bool = True
) -> tuple[Blocks, float, LiftedProgram]:
    """Return a graph's program with its blocks, how far it is from what it came from, and how it was lifted.

    Raises:
        SourceError: if it has what vitfold cannot hold, or no attention and is meant to be `attending`.
        ParityError: if the program does not compute what the graph does, naming the first node that differs.
    """
    lifted = lift(plain)
    program, params = with_attentions(*with_folded_scales(lifted.program, lifted.params))
    shapes = {name: array.shape for name, array in params.items()}
    program = without_dead_nodes(with_short_views(program, shapes))
    if attending and not attentions_of(program) and not _weighs_values(program):
        raise UnsupportedError(
            f"{path} has no attention: vitfold makes transformers faster, not convolutional networks"
        )
    read_of = params_read(program)
    found = with_blocks(program, {name: array for name, array in params.items() if name in read_of})
    return found, _check_parity(path, plain, model, lifted, found), lifted


def _weighs_values(program: Program) -> bool:
    """Whether a softmax is multiplied with something, as in an attention of a form that is not recognised."""
    read_by = readers(program)
    for node in program.nodes:
        if node.op == "softmax" or (node.op == "foreign" and "Softmax" in str(node.attributes)):
            found = [node.outputs[0]]
            for ref in found:  # through changes of shape
                for reader in read_by[ref]:
                    if reader.op == "matmul":
                        return True
                    if reader.op in ("reshape", "transpose"):
                        found += reader.outputs
    return False


def _image_end(plain: Plain, path: Path) -> tuple[int, tuple[int, int]]:
    """Return channels and size of the images that a file takes.

    Raises:
        SourceError: if it takes something else.
    """
    shape = plain.shapes[plain.inputs[0].name][0]
    if len(shape) != 4:
        return (shape[1] if len(shape) > 2 else 1), (shape[-2] if len(shape) > 2 else 1, shape[-1])
    if shape[1] not in _CHANNELS and shape[3] in _CHANNELS:
        raise SourceError(
            f"{path} takes images of {shape[1]} x {shape[2]} pixels with their channels last; export it with channels "
            "first"
        )
    return shape[1], (shape[2], shape[3])


def _check_parity(path: Path, plain: Plain, model: onnx.ModelProto, lifted: LiftedProgram, found: Blocks) -> float:
    """Compare program and file on random inputs; return the largest relative difference."""
    names = [end.name for end in plain.outputs]
    batch = plain.batch or BATCHES[0]
    fixed = at_batch(model, batch)
    given = random_inputs(fixed)
    expected = run_values(fixed, names, given, path)
    inputs = tuple(torch.from_numpy(given[end.name]) for end in plain.inputs)
    with torch.inference_mode():
        made = replay(found.program, Run(found.params), *inputs)
    if plain.batch is not None:
        _check_rows(path, plain, found)
    worst = 0.0
    for name, value in zip(names, made, strict=True):
        if not np.isfinite(expected[name]).all():
            raise ParityError(
                f"{path} returns NaN or infinity in {name} on random input; its weights are damaged or half precision "
                "overflows: export it in single precision"
            )
        if tuple(value.shape) != expected[name].shape:
            raise ParityError(
                f"{path} returns {expected[name].shape} for {name}, the program {tuple(value.shape)}; please report it"
            )
        worst = max(worst, _difference(expected[name], value.numpy()))
    if worst <= TOLERANCE:
        return worst
    where = _first_difference(path, plain, fixed, lifted, given)
    raise ParityError(
        f"the program differs from {path} by {worst:.2g} (relative; at most {TOLERANCE:g} is allowed), {where}; this "
        "is a bug in vitfold's reading of the file: please report it"
    )


def _check_rows(path: Path, plain: Plain, found: Blocks) -> None:
    """Check that the program of a file of a fixed batch takes any: every image by itself.

    Raises:
        ParityError: if images have to do with each other.
    """
    images = _random_images(plain, 3)
    run = Run(found.params)
    try:
        with torch.inference_mode():
            together = replay(found.program, run, images)[0]
            single = torch.cat([replay(found.program, run, images[i : i + 1])[0] for i in range(len(images))])
    except Exception as error:  # a foreign piece that insists on the file's own batch
        raise ParityError(
            f"{path} works for {plain.batch} images only ({error}); export it with an open batch"
        ) from None
    if _difference(single.numpy(), together.numpy()) > _ROWS:
        raise ParityError(f"{path} computes images from each other; export it with an open batch")


def _random_images(plain: Plain, count: int) -> torch.Tensor:
    """Random inputs as the file takes them, after single precision took the place of half."""
    end = plain.inputs[0]
    whole = np.dtype(end.dtype).kind in "iu"
    shape = (count, *plain.shapes[end.name][0][1:])
    return torch.from_numpy(random_array(shape, end.dtype if whole else "float32", np.random.default_rng(1)))


def _difference(expected: Array, found: Array) -> float:
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    return float(np.abs(expected.astype(np.float64) - found).max()) / (scale or 1.0) if expected.size else 0.0


def _first_difference(
    path: Path, plain: Plain, model: onnx.ModelProto, lifted: LiftedProgram, given: Mapping[str, Array]
) -> str:
    """Return a phrase that names the first node whose result differs."""
    named = {output for node in model.graph.node for output in node.output}
    names = [output for node in plain.nodes for output in node.output if output in lifted.values and output in named]
    seen = {name: lifted.values[name].value.ref for name in names if lifted.values[name].place.front}
    program = Program(inputs=lifted.program.inputs, nodes=lifted.program.nodes, outputs=seen)
    inputs = tuple(torch.from_numpy(given[end.name]) for end in plain.inputs)
    expected = run_values(model, list(seen), given, path)
    with torch.inference_mode():
        values = dict(zip(seen, replay(program, Run(lifted.params), *inputs), strict=True))
    for name in seen:
        value = values[name].numpy()
        if value.shape != expected[name].shape or _difference(expected[name], value) > TOLERANCE:
            maker = next(node for node in plain.nodes if name in node.output)
            return f"first at {maker.op_type} ({maker.name or name})"
    return "behind all single nodes, where attention is put together"


def _spec(
    plain: Plain,
    image: tuple[int, tuple[int, int]],
    lifted: LiftedProgram,
    found: Blocks,
    head: Kind | None,
) -> GraphSpec:
    program = found.program
    layers = len(found.streams)
    prefix, suffix, grid, why = (0, 0, (1, 1), found.why) if not found.even else _layout(plain, found)
    attention = next((node for node in attentions_of(program) if node.block == 0), None)
    heads, head_dim = (0, 0) if attention is None else _heads(program, attention.operand("q"))
    stream = program.shapes[found.streams[0]] if layers else (1, 1, 1)
    mlp = next((n.shapes[0][-1] for n in program.nodes if n.block == 0 and n.role == "mlp" and n.op == "linear"), 0)
    return GraphSpec(
        program=json.dumps(program.to_dict(), separators=(",", ":")),
        shapes=tuple(sorted((name, tuple(array.shape)) for name, array in found.params.items())),
        inputs=tuple(_end(end, plain) for end in plain.inputs),
        outputs_of=tuple(_end(end, plain) for end in plain.outputs),
        opset=plain.opset,
        image_size=image[1],
        channels=image[0],
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        embed_dim=stream[-1],
        mlp_dim=mlp,
        tokens=stream[1] if len(stream) == 3 else math.prod(stream[1:-1]),
        prefix=prefix,
        suffix=suffix,
        grid=grid,
        head=head or _kind(plain, program),
        unmergeable=why,
        foreign=tuple(sorted(lifted.foreign.items())),
    )


def _heads(program: Program, ref: Ref) -> tuple[int, int]:
    shape = program.shapes[ref]
    return shape[1], shape[3]


def _end(end: GraphEnd, plain: Plain) -> GraphEnd:
    """An end with every length but the batch's fixed."""
    fixed = plain.shapes[end.name][0]
    first = end.shape[0] if end.shape else "batch"
    return GraphEnd(name=end.name, dtype=end.dtype, shape=(first, *fixed[1:]))


def _kind(plain: Plain, program: Program) -> Kind:
    """What the first output stands for, by its shape and name, and by what makes it."""
    end = plain.outputs[0]
    name = end.name.lower()
    shape = plain.shapes[end.name][0]
    if ("depth" in name and len(shape) == 3) or (len(shape) == 4 and shape[1] == 1):
        return "map"
    if len(shape) == 4 and shape[1] > 1 and any(word in name for word in _CLASSES):
        return "segmentation"
    maker = makers(program).get(next(iter(program.outputs.values())))
    unclassified = maker is not None and maker.op in _NO_LOGITS
    if len(plain.shapes[end.name][0]) != 2 or unclassified or any(word in name for word in _FEATURES):
        return "features"
    return "single_label"


def _layout(plain: Plain, found: Blocks) -> tuple[int, int, tuple[int, int], str]:
    """Find which tokens are patches: those that depend on the image.

    Returns:
        Tokens in front of them and behind them, their grid, and why nothing merges.
    """
    program, stream = found.program, found.streams[0]
    if plain.inputs[0].dtype.startswith("int"):
        return 0, 0, (1, 1), "its tokens are words, and merging is for patches"
    shown = Program(inputs=program.inputs, nodes=program.nodes, outputs={"x": stream})
    images = _random_images(plain, 2)
    with torch.inference_mode():
        x = replay(shown, Run(found.params), images)[0]
    varies = (x[0] - x[1]).abs().amax(-1) > 0
    patches = int(varies.sum())
    prefix = int(varies.int().argmax())
    suffix = len(varies) - prefix - patches
    if not patches or not bool(varies[prefix : prefix + patches].all()) or prefix > _MOST_PREFIX:
        return 0, 0, (1, 1), "tokens that do not depend on the image stand between those that do"
    return prefix, suffix, _grid(program, patches, tuple(images.shape[-2:])), ""


def _grid(program: Program, patches: int, size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the patches: those of an image of features with as many places, else near the aspect."""
    for node in program.nodes:
        for shape in node.shapes:
            if len(shape) == 4 and shape[2] * shape[3] == patches and node.block is None and node.role == "embed":
                return shape[2], shape[3]
    best = min(
        (abs(math.log((rows * size[1]) / ((patches // rows) * size[0]))), rows)
        for rows in range(1, patches + 1)
        if patches % rows == 0
    )[1]
    return best, patches // best
