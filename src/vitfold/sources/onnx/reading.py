"""An ONNX file as a plain list of nodes for two batch sizes.

ONNX Runtime's own optimizer does it, with the sizes of the inputs fixed: it computes whatever follows from them
(`Shape`, `Gather`, `Concat` and their like), takes out what does nothing, and joins normalizations and activations that
an exporter took apart. It runs once for each of two batches; where a number or a length differs, it is the batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnxruntime
from onnx import TensorProto, numpy_helper

from vitfold.errors import SourceError
from vitfold.model import Array, GraphEnd
from vitfold.model.spec import random_array

Shape = tuple[int, ...]
BATCHES = (2, 3)
"""The two batches; small primes, so that few lengths of a model are multiples of both by chance."""
OPSET = 20
_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_DOMAINS = ("", "ai.onnx", "com.microsoft")
_QUANTIZED = ("QuantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits")
_FLOW = ("If", "Loop", "Scan", "SequenceAt", "SequenceConstruct", "SplitToSequence", "ConcatFromSequence", "Optional")
_COUNTING = ("NonZero", "NonMaxSuppression", "Unique", "Compress", "StringSplit")
_OFF = (
    *("MatMulAddFusion", "BiasGeluFusion", "FastGeluFusion", "BiasSoftmaxFusion", "BiasDropoutFusion"),
    *("SkipLayerNormFusion", "EmbedLayerNormFusion", "AttentionFusion", "GemmActivationFusion", "ConvActivationFusion"),
    *(
        "ConvAddFusion",
        "ConvMulFusion",
        "MatMulScaleFusion",
        "MatmulTransposeFusion",
        "MatMulBNFusion",
        "ReshapeFusion",
    ),
    *("TransposeOptimizer", "GatherSliceToSplitFusion", "ConstantSharing", "MatMulActivationFusion", "QuickGeluFusion"),
)
"""Fusions of ONNX Runtime whose results are further from `Ops` than what they replace."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plain:
    """A file's graph in normal form: nodes in order, constants, and the shape of every value for both batches.

    `varying` are numbers that differ between the batches; `batch` is the one that the file insists on, if any, for
    which both shapes are.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: Mapping[str, Array]
    varying: Mapping[str, tuple[Array, Array]]
    shapes: Mapping[str, tuple[Shape, Shape]]
    types: Mapping[str, int]
    inputs: tuple[GraphEnd, ...]
    outputs: tuple[GraphEnd, ...]
    opset: int
    batch: int | None

    @property
    def batches(self) -> tuple[int, int]:
        """The batches that both shapes of a value belong to."""
        return BATCHES if self.batch is None else (self.batch, self.batch)


def read_plain(
    path: Path, *, image_size: Sequence[int] | None = None, chosen: Sequence[str] = (), several: bool = False
) -> tuple[Plain, onnx.ModelProto]:
    """Read a file; return it in normal form and, in single precision, as it is.

    Where all names that are `chosen` are outputs of it, it is read as one of these outputs and of what they need.
    `several` inputs are for programs of their own, not for models of images.

    Raises:
        SourceError: if it is no ONNX model, lacks something, or has what no program of vitfold can hold.
    """
    model = _loaded(path)
    _check(model, path)
    if chosen and {one.name for one in model.graph.output} >= set(chosen):
        _keep_outputs(model, chosen)
    if not several:
        _check_inputs(model, path)
    inputs, outputs = _ends(model, "input"), _ends(model, "output")
    model = _in_single_precision(model)
    fixed = _with_sizes(model, inputs, image_size, path)
    batch = next((int(end.shape[0]) for end in inputs if end.shape and isinstance(end.shape[0], int)), None)
    fixed = _at_opset(fixed)
    if batch is not None:
        only = _normalized(at_batch(fixed, batch), path)
        return _joined(only, only, inputs, outputs, batch, path), fixed
    first, second = (_normalized(at_batch(fixed, size), path) for size in BATCHES)
    return _joined(first, second, inputs, outputs, None, path), fixed


def _keep_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Leave out outputs, and the nodes and inputs that only these need."""
    graph = model.graph
    kept = {one.name: one for one in graph.output}
    needed = _needed(graph, names)
    nodes = [node for node in graph.node if set(node.output) & needed]
    inputs = [one for one in graph.input if one.name in needed]
    for field, left in ((graph.output, [kept[name] for name in names]), (graph.node, nodes), (graph.input, inputs)):
        values = [type(one).FromString(one.SerializeToString()) for one in left]
        del field[:]
        field.extend(values)


def _needed(graph: onnx.GraphProto, names: Sequence[str]) -> set[str]:
    """The values that outputs depend on, themselves included."""
    maker = {output: node for node in graph.node for output in node.output}
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        node = maker.get(name)
        if node is not None:
            waiting += [one for one in node.input if one]
            waiting += [one for inner in _inner_nodes(node) for one in inner.input if one]
    return needed


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from _all_nodes(attribute.g)


def _check_inputs(model: onnx.ModelProto, path: Path) -> None:
    """Check that a file has one input.

    Raises:
        SourceError: naming the outputs that need one input alone, where some do.
    """
    names = [end.name for end in _ends(model, "input")]
    if len(names) == 1:
        return
    if not names:
        raise SourceError(f"{path} takes no input; export it with its images as input")
    alone = {}
    for output in model.graph.output:
        given = [name for name in names if name in _needed(model.graph, [output.name])]
        if len(given) == 1:
            alone[output.name] = given[0]
    ways = ", ".join(f"--outputs {output} (of {given})" for output, given in alone.items())
    cure = f"take those outputs that need one: {ways}" if ways else "export the part that takes one"
    raise SourceError(f"{path} takes several inputs ({', '.join(names)}), and vitfold models of one; {cure}")


def read_plain_pair(paths: tuple[Path, Path]) -> tuple[Plain, onnx.ModelProto]:
    """Read a model that was exported once for each of the two batches, as `read_plain` reads a file.

    Raises:
        SourceError: as there.
    """
    models = []
    for path in paths:
        model = _loaded(path)
        _check(model, path)
        models.append(_at_opset(_in_single_precision(model)))
    copies = [at_batch(model, size) for model, size in zip(models, BATCHES, strict=True)]
    first, second = (_normalized(model, path) for model, path in zip(copies, paths, strict=True))
    inputs, outputs = (
        tuple(replace(end, shape=("batch", *end.shape[1:])) for end in _ends(models[0], which))
        for which in ("input", "output")
    )
    return _joined(first, second, inputs, outputs, None, paths[0]), models[0]


def _loaded(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        missing = getattr(error, "filename", None) or error
        raise SourceError(f"{path} needs the file {missing}, which is not there; put its weights beside it") from None
    except onnx.checker.ValidationError as error:
        raise SourceError(f"{path} lacks its weights: {str(error).splitlines()[0]}; put them beside it") from None
    except Exception as error:  # protobuf raises errors of several classes, none of them public
        raise SourceError(f"{path} is no ONNX model, or is cut off ({_short(error)}); export or copy it anew") from None


def _check(model: onnx.ModelProto, path: Path) -> None:
    if not model.graph.node:
        raise SourceError(f"{path} holds no nodes; it is empty or cut off: export or copy it anew")
    newest = onnx.defs.onnx_opset_version()
    for imported in model.opset_import:
        if imported.domain in ("", "ai.onnx") and imported.version > newest:
            raise SourceError(
                f"{path} is of opset {imported.version}, and the onnx package here knows {newest}; upgrade onnx and "
                "onnxruntime, or export with a lower opset"
            )
    local = {(function.domain, function.name) for function in model.functions}
    for node in _all_nodes(model.graph):
        if node.domain not in _DOMAINS and (node.domain, node.op_type) not in local:
            raise SourceError(
                f"{path} has the custom operator {node.domain}.{node.op_type} ({node.name or 'without a name'}), which "
                "ONNX Runtime does not run by itself; export without it"
            )
        if node.op_type in _QUANTIZED:
            raise SourceError(
                f"{path} is quantized already ({node.op_type} at {node.name or node.output[0]}); give the float model"
            )


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_nodes(attribute.g)


def _ends(model: onnx.ModelProto, which: str) -> tuple[GraphEnd, ...]:
    held = {one.name for one in model.graph.initializer}
    found = []
    for one in getattr(model.graph, which):
        if which == "input" and one.name in held:
            continue
        if not one.type.HasField("tensor_type"):
            raise SourceError(f"the {which} {one.name} is no tensor (a sequence or a map); export the model without it")
        kind = one.type.tensor_type
        lengths = tuple(
            d.dim_value if d.HasField("dim_value") else d.dim_param or f"{one.name}_dim_{i}"
            for i, d in enumerate(kind.shape.dim)
        )
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
        found.append(GraphEnd(name=one.name, shape=lengths, dtype=dtype))
    return tuple(found)


def _in_single_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with single precision wherever it has another."""
    kinds = {one.data_type for one in model.graph.initializer}
    kinds.update(one.type.tensor_type.elem_type for one in (*model.graph.input, *model.graph.output))
    if not kinds.intersection(_FLOATS):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for graph in _graphs(changed.graph):
        del graph.value_info[:]
        for one in (*graph.input, *graph.output):
            if one.type.tensor_type.elem_type in _FLOATS:
                one.type.tensor_type.elem_type = TensorProto.FLOAT
        for tensor in graph.initializer:
            _widen(tensor)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    _widen(attribute.t)
                if node.op_type in ("Cast", "RandomNormalLike", "EyeLike") and attribute.name in ("to", "dtype"):
                    attribute.i = TensorProto.FLOAT if attribute.i in _FLOATS else attribute.i
    return changed


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in _FLOATS:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _with_sizes(
    model: onnx.ModelProto, inputs: Sequence[GraphEnd], image_size: Sequence[int] | None, path: Path
) -> onnx.ModelProto:
    """Return the model with every length but the batch fixed."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for one in fixed.graph.output:
        one.type.tensor_type.ClearField("shape")
    ends = {end.name: end for end in inputs}
    for one in fixed.graph.input:
        end = ends.get(one.name)
        if end is None:
            continue
        lengths = list(end.shape)
        loose = [axis for axis, length in enumerate(lengths) if axis and isinstance(length, str)]
        if len(lengths) == 4 and image_size is not None:
            height = 1 if lengths[3] == 3 and lengths[1] != 3 else 2
            for axis, size in zip((height, height + 1), image_size, strict=True):
                if isinstance(lengths[axis], int) and lengths[axis] != size:
                    raise SourceError(
                        f"{path} takes images of {lengths[height]} x {lengths[height + 1]} pixels only, not of "
                        f"{size}; leave --image-size out"
                    )
                lengths[axis] = size
            lengths = [3 if axis == 1 and isinstance(length, str) else length for axis, length in enumerate(lengths)]
        elif loose:
            raise SourceError(
                f"the input {one.name} of {path} has the shape {' x '.join(map(str, end.shape))}, which leaves "
                f"{lengths[loose[0]]} open; give --image-size"
            )
        for d, length in zip(one.type.tensor_type.shape.dim, lengths, strict=True):
            if isinstance(length, int):
                d.dim_value = length
    return fixed


def _at_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model at the opset that vitfold writes, where it is older and ONNX can convert it."""
    opset = _opset(model)
    if opset >= OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, OPSET)
    except Exception:  # its errors are C++ errors of several classes; ONNX Runtime reads the old opset as well
        return model


def _opset(model: onnx.ModelProto) -> int:
    return max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=1)


def at_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a model whose inputs are of one batch."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    held = {one.name for one in fixed.graph.initializer}
    for one in fixed.graph.input:
        if one.name not in held and one.type.tensor_type.shape.dim:
            one.type.tensor_type.shape.dim[0].dim_value = batch
    return fixed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Normal:
    model: onnx.ModelProto
    constants: Mapping[str, Array]
    shapes: Mapping[str, Shape]
    types: Mapping[str, int]


def _normalized(model: onnx.ModelProto, path: Path) -> _Normal:
    """Let ONNX Runtime fold and fuse a model of fixed sizes."""
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        given, made = Path(folder) / "given.onnx", Path(folder) / "made.onnx"
        onnx.save(model, given, save_as_external_data=True, location="given.data", size_threshold=1024)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(made)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "made.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            onnxruntime.InferenceSession(
                str(given), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_OFF)
            )
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise SourceError(f"ONNX Runtime does not take {path}: {_short(error)}; export it anew") from None
        found = onnx.load(made)
    flow = next((node for node in found.graph.node if node.op_type in _FLOW), None)
    if flow is not None:
        raise SourceError(
            f"{path} decides at run time what it computes ({flow.op_type} at {flow.name or flow.output[0]}); export it "
            "for fixed sizes, without branches and loops"
        )
    counting = next((node for node in found.graph.node if node.op_type in _COUNTING), None)
    if counting is not None:
        raise SourceError(
            f"in {path} the numbers of an image decide how much there is ({counting.op_type} at "
            f"{counting.name or counting.output[0]}); export the model up to there"
        )
    constants = _constants(found)
    shapes, types = _shapes(found, path)
    return _Normal(model=found, constants=constants, shapes=shapes, types=types)


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    """Return all constants, and take the nodes that follow from them alone out of the model."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if any(name and name not in constants for name in node.input):
            kept.append(node)
            continue
        alone = onnx.helper.make_graph(
            [node],
            "constant",
            [],
            [onnx.helper.make_empty_tensor_value_info(name) for name in node.output],
            [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name],
        )
        bare = onnx.helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
        made = onnx.reference.ReferenceEvaluator(bare).run(None, {})
        for name, array in zip(node.output, made, strict=True):
            constants[name] = np.asarray(array)
            model.graph.initializer.append(numpy_helper.from_array(constants[name], name))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return constants


def _shapes(model: onnx.ModelProto, path: Path) -> tuple[dict[str, Shape], dict[str, int]]:
    """Return shape and element type of every value: those that ONNX infers, the others by running the graph."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, data_prop=True)
    except Exception:  # an operator that ONNX does not know: everything is found by running
        inferred = bare
    shapes: dict[str, Shape] = {}
    types: dict[str, int] = {}
    for one in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        kind = one.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            shapes[one.name] = tuple(d.dim_value for d in kind.shape.dim)
            types[one.name] = kind.elem_type
    open_ones = [name for node in model.graph.node for name in node.output if name and name not in shapes]
    for start in range(0, len(open_ones), 64):
        for name, value in _values(model, open_ones[start : start + 64], path).items():
            shapes[name] = value.shape
            types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
    return shapes, types


def _values(model: onnx.ModelProto, names: Sequence[str], path: Path) -> dict[str, Array]:
    """Return values within a graph for random inputs."""
    return run_values(model, names, random_inputs(model), path)


def random_inputs(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Return random inputs for a model of fixed sizes: normal reals, small whole numbers."""
    random = np.random.default_rng(seed)
    held, given = {one.name for one in model.graph.initializer}, {}
    for one in model.graph.input:
        if one.name in held:
            continue
        kind = one.type.tensor_type
        shape = tuple(d.dim_value for d in kind.shape.dim)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
        given[one.name] = random_array(shape, dtype, random)
    return given


def run_values(
    model: onnx.ModelProto, names: Sequence[str], given: Mapping[str, Array], path: Path
) -> dict[str, Array]:
    """Run a model and return some of its values, wherever they stand in it."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="vitfold-") as folder:
        file = Path(folder) / "shown.onnx"
        onnx.save(shown, file, save_as_external_data=True, location="shown.data", size_threshold=1024)
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            found: list[Any] = session.run(list(names), dict(given))
        except Exception as error:  # as above
            raise SourceError(f"ONNX Runtime does not run {path}: {_short(error)}; export it anew") from None
    return dict(zip(names, found, strict=True))


def _joined(
    first: _Normal,
    second: _Normal,
    inputs: tuple[GraphEnd, ...],
    outputs: tuple[GraphEnd, ...],
    batch: int | None,
    path: Path,
) -> Plain:
    """Put both batches together."""
    nodes, others = list(first.model.graph.node), list(second.model.graph.node)
    if [node.op_type for node in nodes] != [node.op_type for node in others]:
        raise SourceError(
            f"{path} computes something else for {BATCHES[1]} images than for {BATCHES[0]}; export it with one batch "
            "axis in front of every input"
        )
    names = dict(zip((end.name for end in inputs), (end.name for end in inputs), strict=True))
    for node, beside in zip(nodes, others, strict=True):
        names.update(zip(node.output, beside.output, strict=True))
        names.update(zip(node.input, beside.input, strict=True))
    varying = {}
    for name, array in first.constants.items():
        other = second.constants.get(names.get(name, name))
        if other is not None and (other.shape != array.shape or not np.array_equal(other, array)):
            varying[name] = (array, other)
    return Plain(
        nodes=tuple(nodes),
        constants=first.constants,
        varying=varying,
        shapes={
            name: (shape, second.shapes[names[name]])
            for name, shape in first.shapes.items()
            if names.get(name) in second.shapes
        },
        types=first.types,
        inputs=inputs,
        outputs=outputs,
        opset=max(OPSET, _opset(first.model)),
        batch=batch,
    )


def _short(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[-1][:200] if text else type(error).__name__
