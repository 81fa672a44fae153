"""ONNX files as sources: what exporters write becomes the program that a reader would have written, or is refused."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, parser
from PIL import Image
from torch import nn

import vitfold
from vitfold.architectures.programs import plain_program
from vitfold.errors import ParityError, RecipeError, SourceError
from vitfold.images import ImageSet, find_images
from vitfold.ops.run import Run
from vitfold.pipeline import calibrate_plan
from vitfold.program import program_from_dict, replay
from vitfold.program.queries import attentions_of, linears_of
from vitfold.sources import load_source
from vitfold.sources.onnx.lifting import lift
from vitfold.sources.onnx.model import read, read_graph
from vitfold.sources.onnx.reading import BATCHES, at_batch, random_inputs, read_plain, run_values

SIZE = 32


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter numbers that are neither zero nor one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            one.copy_(torch.randn(one.shape, generator=generator) * (0.3 if one.ndim == 1 else one.shape[-1] ** -0.5))
            if one.ndim == 1 and name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
                one.add_(1.0)
    return module.eval()


def tiny_timm(**options):
    import timm

    given = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    return randomized(timm.models.vision_transformer.VisionTransformer(**{**given, **options}))


def export(module, path: Path, *, opset=17, batch: int | None = None, shape=(3, SIZE, SIZE), dynamo=False, **options):
    """Export a module as its user would; `batch` fixes the number of images."""
    axes = None if batch else {"images": {0: "n"}, "logits": {0: "n"}}
    example = torch.zeros(batch or 2, *shape, dtype=next(module.parameters()).dtype)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        given = {"dynamic_axes": axes, "opset_version": opset} if not dynamo else {}
        if dynamo and not batch:
            given = {"dynamic_shapes": ({0: torch.export.Dim("n")},)}
        torch.onnx.export(
            module, (example,), path, input_names=["images"], output_names=["logits"], dynamo=dynamo, **given, **options
        )
    return path


def program_in(spec):
    return program_from_dict(json.loads(spec.program))


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    """A tiny Vision Transformer as an ONNX file with an open batch."""
    return export(tiny_timm(init_values=1e-1), tmp_path_factory.mktemp("vit") / "vit.onnx", opset=14)


WAYS = {
    "opset 11, attention in parts": {"opset": 11},
    "opset 13, attention in parts": {"opset": 13},
    "opset 14, one image": {"opset": 14, "batch": 1},
    "opset 17": {"opset": 17},
    "opset 17, four images": {"opset": 17, "batch": 4},
    "torch.export": {"dynamo": True},
    "torch.export, one image": {"dynamo": True, "batch": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_exporters_take_apart_becomes_the_written_program(way, tmp_path):
    module = tiny_timm()
    for block in module.blocks:
        block.attn.fused_attn = "in parts" not in way
    found = read_graph(export(module, tmp_path / "vit.onnx", **WAYS[way]))
    written = vitfold.adapt(module)
    program, expected = program_in(found.spec), plain_program(written.spec)
    assert found.error < 1e-5
    assert found.spec.foreign == ()
    assert [n.op for n in program.nodes if n.block is not None] == [n.op for n in expected.nodes if n.block is not None]
    assert [n.site for n in attentions_of(program)] == [n.site for n in attentions_of(expected)]
    blocks = [n.site for n in linears_of(expected) if n.block is not None]
    assert [n.site for n in linears_of(program) if n.block is not None] == blocks
    for layer in blocks:
        np.testing.assert_allclose(found.params[f"{layer}.weight"], written.params[f"{layer}.weight"], rtol=1e-5)
    spec = found.spec
    assert (spec.num_layers, spec.num_heads, spec.head_dim, spec.prefix, spec.grid) == (2, 4, 8, 1, (4, 4))
    assert (spec.input, spec.output_names, spec.head) == ("images", ("logits",), "single_label")


def test_half_precision_is_read_in_single_and_handed_on_in_half(tmp_path):
    path = export(tiny_timm().half(), tmp_path / "half.onnx")
    spec = read_graph(path).spec
    assert (spec.inputs[0].dtype, spec.outputs_of[0].dtype) == ("float16", "float16")
    bundle = vitfold.save(vitfold.optimize(vitfold.load(str(path)), merge=2), tmp_path / "half.fold")
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    assert [one.type for one in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float16)"] * 2


@pytest.mark.parametrize("batch", [None, 1])
def test_a_bundle_of_a_file_is_a_drop_in(tmp_path, batch, make_images):
    path = export(tiny_timm(), tmp_path / "vit.onnx", batch=batch)
    model = vitfold.load(str(path), preprocess="vit")
    plan = vitfold.optimize(model, merge=2, quant="w8a8")
    images = make_images(12)
    bundle = vitfold.save(calibrate_plan(plan, images), tmp_path / "vit.fold", images=images)
    before, after = (onnxruntime.InferenceSession(p) for p in (path, bundle.path / "model.onnx"))
    for ends in ("get_inputs", "get_outputs"):
        old, new = getattr(before, ends)(), getattr(after, ends)()
        assert [(one.name, one.type, one.shape) for one in new] == [(one.name, one.type, one.shape) for one in old]
    pixels = np.random.default_rng(0).standard_normal((batch or 3, 3, SIZE, SIZE), dtype=np.float32)
    (expected,), (found,) = before.run(None, {"images": pixels}), after.run(None, {"images": pixels})
    assert found.shape == expected.shape
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.9
    with vitfold.open(bundle.path) as predict:
        assert predict(images.paths[:3])[0].output.shape == (10,)


def test_a_bundle_of_a_file_is_loaded_again_and_compared(vit_file, tmp_path, make_images):
    from vitfold.bench.reference import reference_from_origin

    model = vitfold.load(str(vit_file), preprocess="clip")
    bundle = vitfold.save(vitfold.optimize(model, merge="none"), tmp_path / "vit.fold")
    again = reference_from_origin(vitfold.open_bundle(bundle.path))
    assert again.model is not None
    assert again.model.digest() == model.digest()


class OtherAxes(nn.Module):
    """Attention of torch itself, which has the batch behind the tokens, or between them and the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.attention = nn.MultiheadAttention(32, 4)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(0))


class Windows(nn.Module):
    """Attention in windows with a bias for each pair of places, shifted by a roll."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(2, 16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.patches(x).permute(0, 2, 3, 1)
        batch, height, width, _ = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.reshape(batch, height // 4, 4, width // 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, 16)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * 8**-0.5) @ k.transpose(-2, -1) + self.bias
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, 16))
        y = y.reshape(batch, height // 4, width // 4, 4, 4, 16).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(y.reshape(batch, height, width, 16), (2, 2), (1, 2))
        return self.head(x.mean((1, 2)))


class Rotary(nn.Module):
    """Queries and keys turned by their places, between a convolution of overlapping windows and a resized map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 4, 1)
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))
        angles = torch.arange(64)[:, None] / 10.0 ** torch.arange(4)
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def turned(self, x):
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat((-b, a), -1) * self.sin

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = (one(y).reshape(-1, 64, 2, 8).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        x = x + self.proj(y.transpose(1, 2).reshape(-1, 64, 16))
        maps = x.transpose(1, 2).reshape(-1, 16, 8, 8)
        return nn.functional.interpolate(maps, scale_factor=2.0, mode="bilinear")


@pytest.mark.parametrize(("kind", "shape"), [(OtherAxes, (2, 5)), (Windows, (2, 5)), (Rotary, (2, 16, 16, 16))])
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "exported"])
def test_attention_is_found_wherever_the_batch_is(kind, shape, dynamo, tmp_path):
    module = randomized(kind())
    found = read_graph(export(module, tmp_path / "m.onnx", dynamo=dynamo))
    (attention,) = attentions_of(program_in(found.spec))
    assert found.error < 1e-5
    image = torch.randn(3, 3, SIZE, SIZE)
    with torch.inference_mode():
        expected = module(image)
        (made,) = replay(program_in(found.spec), Run(dict(found.params)), image)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert len(expected.shape) == len(shape)
    assert (attention.inputs["bias"] is not None) == (kind is Windows)
    assert {one.partition(":")[0] for _, one in found.spec.foreign} == ({"Conv", "Resize"} if kind is Rotary else set())


def test_windows_are_quantized_and_say_why_nothing_merges(tmp_path, make_images):
    model = vitfold.load(str(export(randomized(Windows()), tmp_path / "m.onnx")), preprocess="vit")
    with pytest.raises(RecipeError, match="windows"):
        vitfold.optimize(model, merge=2)
    plan = calibrate_plan(vitfold.optimize(model, quant="w8a8"), make_images(12))
    assert {"blocks.0.attn.qkv.w", "blocks.0.attn.proj.w"} <= set(plan.quantizers or ())
    assert vitfold.save(plan, tmp_path / "w.fold").manifest.tokens == (64, 64)


@pytest.mark.parametrize("target", ["cpu", "portable", "tensorrt-fp16"])
def test_merging_goes_through_turned_keys_and_gives_a_map_its_places_back(target, tmp_path):
    model = vitfold.load(str(export(randomized(Rotary()), tmp_path / "m.onnx")), preprocess="vit")
    bundle = vitfold.save(vitfold.optimize(model, merge=20, target=target), tmp_path / "r.fold")
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    image = np.ones((1, 3, SIZE, SIZE), np.float32)
    assert session.run(None, {"images": image})[0].shape == (1, 16, 16, 16)
    assert bundle.manifest.tokens == (64, 44)


class Raw(nn.Module):
    """A model that prepares its pixels itself."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.body, self.last = tiny_timm(), last

    def forward(self, x):
        x = (x.float() / 255 - 0.5) / 0.5
        return self.body(x.permute(0, 3, 1, 2) if self.last else x)


def export_raw(path, shape, *, last=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Raw(last=last).eval(), (torch.zeros(2, *shape, dtype=torch.uint8),), path, dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={name: {0: "n"} for name in "xy"},
        )  # fmt: skip
    return path


def test_pixels_of_eight_bits_go_in_as_they_are(tmp_path, make_images):
    model = vitfold.load(str(export_raw(tmp_path / "raw.onnx", (3, SIZE, SIZE))), preprocess="vit")
    images = make_images(8)
    bundle = vitfold.save(vitfold.optimize(model), tmp_path / "raw.fold", images=images)
    assert onnxruntime.InferenceSession(bundle.path / "model.onnx").get_inputs()[0].type == "tensor(uint8)"
    assert bundle.manifest.fidelity is not None
    assert bundle.manifest.fidelity["cosine"] > 0.9999
    assert float(model.preprocess(Image.new("RGB", (SIZE, SIZE), (7, 7, 7))).mean()) == pytest.approx(7.0)
    with pytest.raises(SourceError, match="channels last"):
        vitfold.load(str(export_raw(tmp_path / "last.onnx", (SIZE, SIZE, 3), last=True)))


def test_several_outputs_keep_their_names(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.second = tiny_timm(), nn.Linear(10, 3)

        def forward(self, x):
            y = self.body(x)
            return y, self.second(y)

    path = tmp_path / "two.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Two().eval(), (torch.zeros(2, 3, SIZE, SIZE),), path, dynamo=False, opset_version=17, input_names=["x"],
            output_names=["kind", "place"], dynamic_axes={name: {0: "n"} for name in ("x", "kind", "place")},
        )  # fmt: skip
    bundle = vitfold.save(vitfold.optimize(vitfold.load(str(path)), merge=2), tmp_path / "two.fold")
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx")
    assert [one.name for one in session.get_outputs()] == ["kind", "place"]
    with vitfold.open(bundle.path) as predict:
        assert predict.session(np.zeros((1, 3, SIZE, SIZE), np.float32)).shape == (1, 10)


def test_labels_and_preprocessing_lie_beside_the_file(vit_file, tmp_path):
    path = tmp_path / "vit.onnx"
    path.write_bytes(vit_file.read_bytes())
    labels = {str(i): f"kind {i}" for i in range(10)}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    processor = {
        "size": {"height": SIZE, "width": SIZE},
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model = vitfold.load(str(path))
    assert model.labels == tuple(labels.values())
    assert (model.preprocess.mean, model.preprocess.std) == ((0.1,) * 3, (0.2,) * 3)
    assert vitfold.load(str(path), preprocess="siglip").preprocess.mean == (0.5,) * 3


def test_a_difference_is_refused_with_the_first_node_that_differs(vit_file):
    plain, model = read_plain(vit_file)
    for tensor in model.graph.initializer:
        if tensor.name == "norm.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1.5, tensor.name))
    with pytest.raises(ParityError, match="first at LayerNormalization"):
        read(plain, model, vit_file)


@pytest.mark.parametrize("seed", range(12))
def test_shapes_and_orders_of_axes_are_followed_with_the_batch_anywhere(seed):
    """Random chains of reshapes and transposes, compared with ONNX Runtime, whose own optimizer is off."""
    random = np.random.default_rng(seed)
    nodes, constants, name, shape = [], [], "x", [BATCHES[0], 2, 3, 4]
    for i in range(6):
        made = f"v{i}"
        if random.random() < 0.6 or len(shape) < 3:
            perm = random.permutation(len(shape)).tolist()
            if i % 2:
                axes = "abcdefgh"[: len(shape)]
                equation = f"{axes}->{''.join(axes[axis] for axis in perm)}"
                nodes.append(helper.make_node("Einsum", [name], [made], equation=equation))
            else:
                nodes.append(helper.make_node("Transpose", [name], [made], perm=perm))
            shape = [shape[axis] for axis in perm]
        else:
            at = int(random.integers(0, len(shape) - 1))
            joined = [*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :]]
            batch_in = next(k for k, n in enumerate(joined) if n % BATCHES[0] == 0)
            target = [-1 if k == batch_in else n for k, n in enumerate(joined)]
            constants.append(numpy_helper.from_array(np.array(target, np.int64), f"s{i}"))
            nodes.append(helper.make_node("Reshape", [name, f"s{i}"], [made]))
            shape = joined
        name = made
    nodes.append(helper.make_node("Tanh", [name], ["y"]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 3, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "chain", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = Path("chain.onnx")
    given = random_inputs(at_batch(model, 2))
    expected = run_values(at_batch(model, 2), ["y"], given, path)["y"]
    try:
        plain, _ = _plain_of(model)
        lifted = lift(plain)
    except SourceError as error:
        assert "batch" in str(error)  # noqa: PT017
        return
    (made,) = replay(lifted.program, Run(dict(lifted.params)), torch.from_numpy(given["x"]))
    out = lifted.outputs["y"]
    rest = list(made.shape[1:])
    ahead = out.place.axis + (out.place.before > 1)
    moved = made.permute(*range(1, 1 + ahead), 0, *range(1 + ahead, 1 + len(rest)))
    np.testing.assert_allclose(moved.reshape(expected.shape).numpy(), expected, rtol=1e-6)


def _plain_of(model):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        onnx.save(model, path)
        return read_plain(path)


def _text_model(body: str, *, inputs="float[n,3,8,8] x", outputs="float[n,3,8,8] y", imports='"" : 17'):
    return parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]> g ({inputs}) => ({outputs}) {{ {body} }}")


def _save(model, path: Path) -> Path:
    onnx.save(model, path)
    return path


def cut(path, vit_file):
    path.write_bytes(vit_file.read_bytes()[:5000])


def empty(path, _):
    path.write_bytes(b"")


def no_model(path, _):
    path.write_text("hello")


def custom_operator(path, _):
    _save(_text_model("y = my.Thing(x)", imports='"" : 17, "my" : 1'), path)


def quantized(path, _):
    constants = "s = Constant<value = float {0.1}>() z = Constant<value = uint8 {0}>()"
    _save(_text_model(f"{constants} q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)"), path)


def newer_opset(path, _):
    model = _text_model("y = Relu(x)")
    model.opset_import[0].version = 999
    _save(model, path)


def branches(path, _):
    then = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"])], "t", [], [helper.make_empty_tensor_value_info("t")]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["e"])], "e", [], [helper.make_empty_tensor_value_info("e")]
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 8, 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    _save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def missing_weights(path, vit_file):
    model = onnx.load(vit_file)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.with_name("weights.bin").unlink()


def sequence(path, _):
    _save(_text_model("y = SequenceConstruct(x)", outputs="seq(float[n,3,8,8]) y"), path)


def two_inputs(path, _):
    _save(_text_model("y = Add(x, z)", inputs="float[n,3,8,8] x, float[n,3,8,8] z"), path)


def open_sizes(path, _):
    _save(_text_model("y = Relu(x)", inputs="float[n,3,h,w] x", outputs="float[n,3,h,w] y"), path)


def no_attention(path, _):
    _save(_text_model("y = Relu(x)"), path)


def data_dependent(path, _):
    _save(_text_model("i = NonZero(x) y = Cast<to = 1>(i)", outputs="float[r,k] y"), path)


BAD = {
    cut: "cut off|needs the file|lacks",
    empty: "no nodes",
    no_model: "no ONNX model",
    custom_operator: "my.Thing",
    quantized: "quantized already",
    newer_opset: "opset 999",
    branches: "If",
    missing_weights: "weights.bin",
    sequence: "sequence|Sequence",
    two_inputs: "z",
    open_sizes: "--image-size",
    no_attention: "no attention",
    data_dependent: "shape|batch|NonZero",
}


@pytest.mark.parametrize("spoil", BAD, ids=[one.__name__ for one in BAD])
def test_bad_files_are_refused_with_what_is_wrong(spoil, vit_file, tmp_path):
    path = tmp_path / "bad.onnx"
    spoil(path, vit_file)
    with pytest.raises(SourceError, match=BAD[spoil]):
        load_source(str(path))


def test_a_file_that_is_not_there_and_options_of_weights_are_refused(vit_file, tmp_path):
    with pytest.raises(SourceError, match="no file"):
        load_source(str(tmp_path / "gone.onnx"))
    with pytest.raises(SourceError, match="--arch"):
        load_source(str(vit_file), arch="vit_tiny_patch16_224")
    with pytest.raises(SourceError, match="--image-size"):
        load_source(str(vit_file), image_size=64)
    with pytest.raises(SourceError, match="preprocess"):
        load_source(str(vit_file), preprocess="nothing")


def test_an_open_size_is_chosen(tmp_path):
    import timm

    body = timm.models.vision_transformer.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=1, num_heads=4, num_classes=3, dynamic_img_size=True
    )
    path = tmp_path / "open.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            randomized(body), (torch.zeros(2, 3, SIZE, SIZE),), path, dynamo=False, opset_version=17,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n"}},
        )  # fmt: skip
    assert read_graph(path, image_size=(SIZE, SIZE)).spec.grid == (4, 4)


@pytest.fixture
def make_images(tmp_path):
    """The factory `make_images(count)` of sets of random pictures."""

    def make(count: int) -> ImageSet:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        return find_images(folder)

    return make


class Pair(nn.Module):
    """A tower for images and one for something else, and what both make together."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = tiny_timm(num_classes=10)
        self.words = nn.Linear(4, 10)

    def forward(self, pixels, words):
        image, text = self.image(pixels), self.words(words)
        return image, text, image @ text.T


def test_of_a_file_of_several_inputs_the_outputs_that_need_one_are_taken(tmp_path):
    path, pixels = tmp_path / "pair.onnx", torch.randn(2, 3, SIZE, SIZE)
    module = Pair().eval()
    names = {"input_names": ["pixels", "words"], "output_names": ["image_embeds", "text_embeds", "similarity"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"pixels": {0: "n"}, "image_embeds": {0: "n"}}
        torch.onnx.export(module, (pixels, torch.randn(3, 4)), path, dynamo=False, dynamic_axes=axes, **names)
    with pytest.raises(SourceError, match=r"several inputs \(pixels, words\).*--outputs image_embeds \(of pixels\)"):
        load_source(str(path))
    model = load_source(str(path), outputs="image_embeds").model
    assert (model.spec.input, model.spec.output_names) == ("pixels", ("image_embeds",))
    bundle = vitfold.save(vitfold.optimize(model, merge=1), tmp_path / "a.fold")
    assert [one.name for one in onnx.load(bundle.path / "model.onnx").graph.input] == ["pixels"]
    with pytest.raises(SourceError, match="several inputs"):
        load_source(str(path), outputs="similarity")
