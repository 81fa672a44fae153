"""What each engine can, and what it wants from a graph: two tables, not code.

`ENGINES` holds one row per runtime, `TARGETS` the lowering choices that measurements settled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from vitfold.errors import TargetError, nearest

Gather = Literal["gather_nd", "gather_elements", "one_hot"]
Scatter = Literal["one_hot", "masked_sum", "scatter_elements"]
Bias = Literal["gemm", "add"]
Attention = Literal["decomposed", "fused"]
FloatType = Literal["float32", "float16", "bfloat16"]
ActivationType = Literal["uint8", "int8", "float8e4m3fn"]
ArgMax = Literal["argmax", "topk"]
Similarity = Literal["normalize", "divide"]
WeightScale = Literal["channel", "normalized"]
QuantizedProduct = Literal["matmul_integer_to_float", "qdq", "integer"]
EngineName = Literal[
    "onnxruntime",
    "onnxruntime-cuda",
    "onnxruntime-tensorrt",
    "onnxruntime-coreml",
    "onnxruntime-directml",
    "openvino",
    "openvino-bf16",
    "tensorrt",
    "torch",
    "torch-compile",
]

PLAIN, WIDE, FLOATING = "plain", "wide", "floating"
"""Ways to execute integer products: as the engine chooses, in kernels wide enough not to saturate, in floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a runtime can.

    `session` is the class that runs graphs on it, module and name, loaded only when asked for; None if it runs none.
    `options` are what it takes besides paths, and `settings` what it is always handed: an engine may have rows that
    differ in them alone. Such a row is `like` another one, and takes what is written for that. One with
    `narrow_floats` computes in bfloat16 where a graph says float32, and starts only on processors that multiply it;
    elsewhere what is made for it runs on the row that it is like.

    `float_target` and `quantized_targets` are what models are written for unless told otherwise, of the latter the
    first that is exact on a processor; none: whatever its instruction sets ask for. `exact_targets` are those that are
    exact on every processor, in words. `ways` are those in which its integer products may run; with `PLAIN` alone they
    are exact everywhere.

    `several_parts`: it runs bundles of more than one graph. `builds_for_batches`: what it builds of a graph takes a
    range of batches, so a target may state one. `strongly_typed`: every precision stands in the graph. `gpu`: it needs
    an NVIDIA GPU; elsewhere its graphs are checked on ONNX Runtime, and not timed. `forks`: it starts anew in a forked
    process. `rows`: tokens by which the time of its kernels goes up in steps.
    """

    name: str
    session: str | None
    float_target: str
    options: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    like: str | None = None
    narrow_floats: bool = False
    quantized_targets: tuple[str, ...] = ()
    exact_targets: str = ""
    ways: tuple[str, ...] = (PLAIN,)
    several_parts: bool = False
    builds_for_batches: bool = False
    strongly_typed: bool = False
    gpu: bool = False
    forks: bool = False
    rows: int = 6

    @property
    def executes(self) -> bool:
        """False for the simulation, which has no graphs and no speed."""
        return self.session is not None

    @property
    def exact_floats(self) -> str:
        """The row that computes the same in the floats that a graph says: itself, but for `narrow_floats`."""
        return str(self.like) if self.narrow_floats else self.name


_ONNX_RUNTIME = Engine(
    name="onnxruntime",
    session="vitfold.engines.onnxruntime:OnnxRuntimeSession",
    options=("threads", "execution", "literal"),
    float_target="cpu",
    exact_targets="cpu-avx2 or portable",
    ways=(PLAIN, WIDE, FLOATING),
    several_parts=True,
    forks=True,
)
_OPENVINO = Engine(
    name="openvino",
    session="vitfold.engines.openvino:OpenVinoSession",
    options=("threads", "execution"),
    float_target="openvino",
    quantized_targets=("openvino", "openvino-avx2"),
    exact_targets="openvino-avx2 or portable",
    ways=(PLAIN, FLOATING),
    rows=16,
)
_TORCH = Engine(
    name="torch",
    session="vitfold.engines.network.session:NetworkSession",
    options=("threads",),
    float_target="torch",
    quantized_targets=("torch",),
    several_parts=True,
)

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        _ONNX_RUNTIME,
        *(
            replace(_ONNX_RUNTIME, name=name, like="onnxruntime", settings={"provider": provider}, forks=False)
            for name, provider in (
                ("onnxruntime-cuda", "CUDAExecutionProvider"),
                ("onnxruntime-tensorrt", "TensorrtExecutionProvider"),
                ("onnxruntime-coreml", "CoreMLExecutionProvider"),
                ("onnxruntime-directml", "DmlExecutionProvider"),
            )
        ),
        _OPENVINO,
        replace(
            _OPENVINO,
            name="openvino-bf16",
            like="openvino",
            settings={"precision": "bf16"},
            narrow_floats=True,
            float_target="openvino-bf16",
            quantized_targets=("openvino-bf16",),
        ),
        Engine(
            name="tensorrt",
            session="vitfold.engines.tensorrt:TensorRtSession",
            options=("batch",),
            float_target="tensorrt-fp16",
            quantized_targets=("tensorrt-int8",),
            builds_for_batches=True,
            strongly_typed=True,
            gpu=True,
        ),
        _TORCH,
        replace(_TORCH, name="torch-compile", like="torch", settings={"compiled": True}),
        Engine(name="simulation", session=None, float_target="simulation"),
    )
}
"""Every engine that a bundle may be made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Lowering choices of one target.

    `gather` and `scatter_add` say how token rows are picked and summed, `linear_bias` whether a linear
    layer is one Gemm or a MatMul and an Add, `attention` whether float attention between integer layers is
    one operator or its parts, `contrib` whether ONNX Runtime's own operators (com.microsoft) may appear.

    The others say how quantized products run. `activation_type` stores activation codes; `symmetric`
    allows no zero point but 0; `weight_bits` is the widest weight code that the target multiplies
    without saturating; `quantized_product` is the form: ONNX Runtime's MatMulIntegerToFloat, standard
    QuantizeLinear/DequantizeLinear pairs in front of a MatMul, or the reordered form, in which products
    take integers, every dequantization stands behind one, and a softmax is normalized behind its product;
    `quantize_attention` says whether the products within attention gain from quantization there: what a
    calibration should do unless told otherwise; `whole_attention` whether a quantized attention of which only some
    queries are read, as in the last block of a model that pools by its class token, is computed for all of them,
    because that is one kernel and the other is not. `float_type` is what floats are computed in: float16 stands in the
    graph, bfloat16 is what its engine makes of a graph of float32.
    """

    name: str
    engine: str
    opset: int
    contrib: bool
    gather: Gather
    scatter_add: Scatter
    linear_bias: Bias
    attention: Attention
    activation_type: ActivationType
    symmetric: bool
    weight_bits: int
    quantized_product: QuantizedProduct
    quantize_attention: bool
    why: str
    quantize_outputs: bool = False
    whole_attention: bool = False
    float_type: FloatType = "float32"
    weight_scale: WeightScale = "channel"
    argmax: ArgMax = "argmax"
    similarity: Similarity = "normalize"
    keeps_order: bool = True
    implied_quant: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @property
    def graph_floats(self) -> str:
        """The type of the floats that stand in the graph."""
        return "float16" if self.float_type == "float16" else "float32"

    @property
    def runtime(self) -> Engine:
        """What its engine can."""
        return ENGINES[self.engine]

    @property
    def takes_wide(self) -> bool:
        """True if it multiplies activations of 16 bits, as two products of 8 bits."""
        return self.quantized_product == "matmul_integer_to_float" and not self.symmetric

    @property
    def hands_on(self) -> bool:
        """True if rounded outputs are codes that the next product takes, and what stands between works on integers."""
        return self.quantized_product == "integer"

    @property
    def takes_outputs(self) -> bool:
        """True if the outputs of products can be rounded, too."""
        return self.hands_on or self.simulated or self.weight_scale == "normalized"

    @property
    def simulated(self) -> bool:
        """True if no engine executes it."""
        return not self.runtime.executes


_CPU = Target(
    name="cpu",
    engine="onnxruntime",
    opset=20,
    contrib=True,
    gather="gather_nd",
    scatter_add="one_hot",
    linear_bias="gemm",
    attention="fused",
    activation_type="uint8",
    symmetric=False,
    weight_bits=7,
    quantized_product="matmul_integer_to_float",
    quantize_attention=False,
    why="float32 on ONNX Runtime's CPU provider, with its fused operators; quantized as on cpu-avx2",
)
_PORTABLE = Target(
    name="portable",
    engine="onnxruntime",
    opset=20,
    contrib=False,
    gather="gather_elements",
    scatter_add="one_hot",
    linear_bias="add",
    attention="decomposed",
    activation_type="uint8",
    symmetric=False,
    weight_bits=7,
    quantized_product="qdq",
    quantize_attention=False,
    why="standard ONNX operators only: for any runtime, at some cost on ONNX Runtime; weights of 7 bits, which "
    "saturate on no processor",
)
_OPENVINO_GRAPH = replace(_PORTABLE, name="openvino", engine="openvino", gather="gather_nd", argmax="topk")
"""GatherElements is a reference kernel there, which moves single elements."""
_TENSORRT = replace(
    _PORTABLE,
    name="tensorrt-fp16",
    engine="tensorrt",
    opset=20,
    gather="gather_nd",
    scatter_add="masked_sum",
    activation_type="int8",
    symmetric=True,
    weight_bits=8,
    float_type="float16",
    weight_scale="normalized",
    argmax="topk",
    similarity="divide",
    keeps_order=False,
    why="TensorRT, strongly typed: every precision stands in the graph, in the form of the fewest kernels",
)
_TORCH_FP16 = replace(
    _PORTABLE,
    name="torch-fp16",
    engine="torch",
    weight_bits=8,
    float_type="float16",
    weight_scale="normalized",
    why="PyTorch on a GPU: half precision, beside it integer products where the recipe quantizes",
)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _CPU,
        _PORTABLE,
        replace(
            _CPU,
            name="cpu-avx2",
            why="x86 without integer dot products: vpmaddubsw adds pairs of u8 x s8 in saturating int16, "
            "which 7-bit weights cannot reach",
        ),
        replace(
            _CPU,
            name="cpu-vnni",
            weight_bits=8,
            why="x86 with AVX512-VNNI or AVX-VNNI: u8 x s8 at full range; attention in integers would take 4 % off a "
            "ViT-B/16 at batch 1 and nothing at batch 8, and doubles the divergence from float: it stays float",
        ),
        replace(
            _CPU,
            name="cpu-amx",
            weight_bits=8,
            why="x86 with AMX int8 tiles: u8 x s8 at full range; lowered as for VNNI",
        ),
        replace(
            _CPU,
            name="cpu-arm",
            activation_type="int8",
            weight_bits=8,
            why="ARM with dot products: s8 x s8 at full range",
        ),
        replace(
            _OPENVINO_GRAPH,
            weight_bits=8,
            why="OpenVINO folds the Q/DQ pairs around products into integer kernels, at full range with VNNI or AMX",
        ),
        replace(
            _OPENVINO_GRAPH,
            name="openvino-avx2",
            why="OpenVINO on x86 without integer dot products, where pairs of 8-bit products saturate: 7-bit weights",
        ),
        replace(
            _OPENVINO_GRAPH,
            name="openvino-bf16",
            engine="openvino-bf16",
            weight_bits=8,
            float_type="bfloat16",
            why="OpenVINO on x86 with AMX or AVX512-BF16: what stays float is bfloat16, which halves attention's time; "
            "elsewhere the bundle runs as on openvino",
        ),
        _TENSORRT,
        replace(
            _TENSORRT,
            name="tensorrt-int8",
            quantize_attention=True,
            whole_attention=True,
            implied_quant="w8a8",
            why="TensorRT takes no uint8 activations and no zero points, which become shifts of x and of the bias; its "
            "fused attention in 8 bit needs q, k, v and the softmax in 8 bit, all of them",
        ),
        replace(
            _TENSORRT,
            name="tensorrt-fp8",
            activation_type="float8e4m3fn",
            quantize_attention=True,
            implied_quant="fp8",
            why="TensorRT on compute capability 8.9 and newer: E4M3 needs no zero point and no clipping search",
        ),
        replace(
            _TORCH_FP16,
            name="torch",
            float_type="float32",
            weight_scale="channel",
            why="PyTorch on CPUs and GPUs, in float32 unless the module is cast; integer products at full range, which "
            "no processor saturates there",
        ),
        _TORCH_FP16,
        replace(
            _TORCH_FP16,
            name="torch-fp8",
            activation_type="float8e4m3fn",
            symmetric=True,
            implied_quant="fp8",
            why="PyTorch on compute capability 8.9 and newer: E4M3 products, half precision beside them",
        ),
        replace(
            _PORTABLE,
            name="integer",
            quantized_product="integer",
            quantize_attention=True,
            quantize_outputs=True,
            why="operand reordering: every product takes integers, and hands on codes; exact on every "
            "processor by 7-bit weights and unsigned keys and values",
        ),
        replace(
            _PORTABLE,
            name="simulation",
            engine="simulation",
            weight_bits=8,
            quantize_attention=True,
            why="no graph: quantization simulated in float, for codes that no engine executes; it has no speed",
        ),
    )
}


_CHOICES: dict[str, tuple[str, ...]] = {
    "gather": get_args(Gather),
    "scatter_add": get_args(Scatter),
    "linear_bias": get_args(Bias),
    "attention": get_args(Attention),
}


def find_target(name: str) -> Target:
    """Return the target of this name; "cpu:gather=one_hot,linear_bias=add" changes single lowering choices.

    Raises:
        TargetError: offering the nearest names.
    """
    base, _, changes = name.partition(":")
    if base not in TARGETS:
        raise TargetError(f"unknown target {base!r}; {nearest(base, TARGETS)}")
    target = TARGETS[base]
    for change in filter(None, changes.split(",")):
        key, _, value = change.partition("=")
        if key not in _CHOICES:
            raise TargetError(f"unknown lowering choice {key!r} in target {name!r}; {nearest(key, _CHOICES)}")
        if value not in _CHOICES[key]:
            raise TargetError(f"{key} cannot be {value!r} in target {name!r}; {nearest(value, _CHOICES[key])}")
        changed: dict[str, Any] = {key: value, "name": name}
        target = replace(target, **changed)
    return target


def cpu_target(instruction_sets: Collection[str], machine: str) -> Target:
    """Return the quantized CPU target for these instruction sets (py-cpuinfo's flags) and `platform.machine()`.

    Whether it is exact there is measured by `engines.quantized_target`.
    """
    sets = set(instruction_sets)
    if machine.lower() in ("arm64", "aarch64") or "asimddp" in sets:
        return TARGETS["cpu-arm"]
    if "amx_int8" in sets:
        return TARGETS["cpu-amx"]
    if sets & {"avx512_vnni", "avx512vnni", "avx_vnni"}:
        return TARGETS["cpu-vnni"]
    return TARGETS["cpu-avx2"]
