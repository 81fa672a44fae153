"""What `vitfold export` writes for Triton, read by Triton's own schema, and its client against a server of paper."""

from __future__ import annotations

import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import Bundle, open_bundle
from vitfold.engines import open_session, usable_cores
from vitfold.engines.trtexec import trtexec_command
from vitfold.errors import BundleError, TargetError
from vitfold.model import Model, Preprocess
from vitfold.serve.predictor import Predictor
from vitfold.serve.triton import TritonModel, export_triton
from vitfold.serve.triton_templates import Served, config_text, readme_text

LABELS = ("tabby cat", "dog: the friend", 'the "odd"\none', *(f"class {i}" for i in range(3, 10)))
SHAPE = "pixel_values:{}x3x32x32"


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    return replace(tiny_model(), labels=LABELS)


@pytest.fixture(scope="module")
def bundles(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    made: dict[str, Bundle] = {}

    def make(target: str) -> Bundle:
        if target not in made:
            folder = tmp_path_factory.mktemp("bundles")
            made[target] = pipeline.save(pipeline.optimize(model, merge=2, target=target), folder / "tiny vit.fold")
        return made[target]

    return make


def parsed(model: TritonModel) -> Any:
    """Return config.pbtxt as Triton's own ModelConfig."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", exc_type=(ImportError, RuntimeError))
    from google.protobuf import text_format

    return text_format.Parse((model.path / "config.pbtxt").read_text(), schema.ModelConfig())


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_cpu_bundle_is_served_by_onnx_runtime(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("cpu")
    written = export_triton(bundle, tmp_path / "repository", instances=2)
    assert written.path == tmp_path / "repository" / "tiny_vit"
    assert files(written.path) == ["1/model.onnx", "README.md", "client.py", "config.pbtxt", "labels.txt"]
    assert (written.path / "1/model.onnx").read_bytes() == bundle.onnx_path.read_bytes()
    config = parsed(written)
    assert (config.name, config.backend, config.platform) == ("tiny_vit", "onnxruntime", "onnxruntime_onnx")
    assert config.max_batch_size == 64
    assert [(t.name, list(t.dims)) for t in config.input] == [("pixel_values", [3, 32, 32])]
    assert [(t.name, list(t.dims), t.label_filename) for t in config.output] == [("logits", [10], "labels.txt")]
    types = config.DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
    assert config.input[0].data_type == config.output[0].data_type == types.values_by_name["TYPE_FP32"].number
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 64]
    assert config.dynamic_batching.max_queue_delay_microseconds > 0
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    assert [warm.batch_size for warm in config.model_warmup] == [1, 64]
    for warm in config.model_warmup:
        tensor = warm.inputs["pixel_values"]
        assert tensor.random_data
        assert list(tensor.dims) == [3, 32, 32]
    assert written.trtexec is None
    assert "trtexec" not in (written.path / "README.md").read_text()


def test_labels_are_one_line_each(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    written = export_triton(bundles("cpu"), tmp_path)
    lines = (written.path / "labels.txt").read_text().splitlines()
    assert lines[:3] == ["tabby cat", "dog: the friend", 'the "odd" one']
    assert len(lines) == len(LABELS)


def test_a_tensorrt_bundle_is_built_where_it_serves(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    written = export_triton(bundles("tensorrt-fp16"), tmp_path, name="vit-fp16", max_batch=16)
    config = parsed(written)
    assert (config.name, config.backend, config.platform) == ("vit-fp16", "tensorrt", "tensorrt_plan")
    assert config.max_batch_size == 16
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert [group.Kind.Name(group.kind) for group in config.instance_group] == ["KIND_GPU"]
    assert written.trtexec is not None
    assert f"--maxShapes={SHAPE.format(16)}" in written.trtexec
    assert written.trtexec in (written.path / "README.md").read_text()


def test_the_bundles_own_batches_are_kept(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("tensorrt-fp16")
    own = replace(bundle, manifest=replace(bundle.manifest, target={**bundle.manifest.target, "batch": [1, 4, 32]}))
    config = parsed(export_triton(own, tmp_path))
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 32]


@pytest.mark.parametrize("output", ["image_embeds", "last_hidden_state"])
def test_outputs_without_classes_have_no_labels(tiny_model: Callable[..., Model], tmp_path: Path, output: str) -> None:
    changes: dict[str, Any] = (
        {"output": output, "outputs": 0, "pool": "none"}
        if output == "last_hidden_state"
        else {"output": output, "outputs": 0}
    )
    bundle = pipeline.save(pipeline.optimize(tiny_model(**changes)), tmp_path / "tiny.fold")
    written = export_triton(bundle, tmp_path / "repository")
    config = parsed(written)
    assert config.output[0].name == bundle.manifest.spec.output
    assert config.output[0].label_filename == ""
    assert list(config.output[0].dims)[-1] == bundle.manifest.spec.embed_dim
    assert "labels.txt" not in files(written.path)


def test_external_data_goes_along(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("cpu")
    copied = replace(bundle, path=tmp_path / "copy.fold")
    copied.path.mkdir()
    (copied.path / "model.onnx").write_bytes(bundle.onnx_path.read_bytes())
    (copied.path / "model.onnx.data").write_bytes(b"weights")
    written = export_triton(copied, tmp_path / "repository")
    assert (written.path / "1/model.onnx.data").read_bytes() == b"weights"


def test_an_existing_model_is_refused_unless_told(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    export_triton(bundles("cpu"), tmp_path, name="vit")
    export_triton(bundles("cpu"), tmp_path, name="other")
    with pytest.raises(BundleError, match="--overwrite"):
        export_triton(bundles("cpu"), tmp_path, name="vit")
    export_triton(bundles("cpu"), tmp_path, name="vit", instances=3, overwrite=True)
    assert "count: 3" in (tmp_path / "vit/config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "vit"]


@pytest.mark.parametrize(
    ("instances", "threads", "each"), [(1, None, None), (1, 6, "6"), (4, 8, "2"), (4, 10, "2"), (4, 2, "1")]
)
def test_instances_divide_the_threads(
    bundles: Callable[[str], Bundle], tmp_path: Path, instances: int, threads: int | None, each: str | None
) -> None:
    written = export_triton(bundles("cpu"), tmp_path, instances=instances, threads=threads)
    parameters = {key: value.string_value for key, value in parsed(written).parameters.items()}
    assert parameters == ({} if each is None else {"intra_op_thread_count": each, "inter_op_thread_count": "1"})
    assert (f"{each} thread" in (written.path / "README.md").read_text()) == (each is not None)


def test_instances_divide_the_usable_cores_by_default(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    written = export_triton(bundles("cpu"), tmp_path, instances=2)
    assert parsed(written).parameters["intra_op_thread_count"].string_value == str(max(1, usable_cores() // 2))


def test_other_versions_of_a_model_are_the_users(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    written = export_triton(bundles("cpu"), tmp_path, name="vit")
    (written.path / "2").mkdir()
    (written.path / "2/model.onnx").write_text("theirs")
    export_triton(bundles("cpu"), tmp_path, name="vit", overwrite=True)
    assert (written.path / "2/model.onnx").read_text() == "theirs"


def test_a_model_of_somebody_else_is_left_alone(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/config.pbtxt").write_text('name: "vit"')
    with pytest.raises(BundleError, match=r"no model that vitfold exported.*left untouched"):
        export_triton(bundles("cpu"), tmp_path, name="vit", overwrite=True)
    assert (tmp_path / "vit/config.pbtxt").read_text() == 'name: "vit"'


def test_what_is_no_model_is_left_alone(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit/thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="left untouched"):
        export_triton(bundles("cpu"), tmp_path, name="vit", overwrite=True)
    assert files(tmp_path) == ["vit/thesis.txt"]


def test_a_failure_leaves_the_old_model(
    bundles: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = export_triton(bundles("cpu"), tmp_path)
    before = files(tmp_path)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(BundleError, match="free some space"):
        export_triton(bundles("cpu"), tmp_path, overwrite=True)
    assert files(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_a_simulated_bundle_is_refused(bundles: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = bundles("cpu")
    simulated = replace(bundle, manifest=replace(bundle.manifest, target={"name": "s", "engine": "simulation"}))
    with pytest.raises(TargetError, match=r"simulated: no engine runs it.*--quant w8a8"):
        export_triton(simulated, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("name", ["", "a b", "../up", ".hidden", "a/b"])
def test_a_name_that_triton_cannot_use_is_refused(bundles: Callable[[str], Bundle], tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="does not suit"):
        export_triton(bundles("cpu"), tmp_path / "repository", name=name)


def test_the_trtexec_line_has_the_shapes(tmp_path: Path) -> None:
    words = shlex.split(trtexec_command("a.onnx", (2, 4, 8), image_size=(384, 224)))
    assert words == [
        "trtexec",
        "--onnx=a.onnx",
        "--stronglyTyped",
        "--noTF32",
        "--minShapes=pixel_values:2x3x384x224",
        "--optShapes=pixel_values:4x3x384x224",
        "--maxShapes=pixel_values:8x3x384x224",
        "--saveEngine=model.plan",
        "--useCudaGraph",
        "--noDataTransfers",
    ]
    with pytest.raises(TargetError, match="rise"):
        trtexec_command("a.onnx", (4, 2, 8), image_size=(224, 224))


@pytest.mark.parametrize("resize", ["shortest", "cover", "exact", "none"])
def test_the_readme_states_the_preprocessing(resize: Any) -> None:
    preprocess = Preprocess(
        resize=resize,
        resize_size=(248, 250),
        crop_size=(224, 226),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        crop_offset="floor",
    )
    text = readme_text(served(preprocess))
    for value in ("224 x 226", "[0.485, 0.456, 0.406]", "[0.229, 0.224, 0.225]", "(H - h) // 2"):
        assert value in text
    assert ("bicubic" in text and "248" in text) == (resize != "none")
    assert "docker run --rm -p 8000:8000" in text
    assert "{" not in text.replace("${", "")


def served(preprocess: Preprocess) -> Served:
    return Served(
        name="vit",
        backend="onnxruntime",
        platform="onnxruntime_onnx",
        input_name="pixel_values",
        input_type="TYPE_FP32",
        input_shape=(3, 224, 226),
        output_name="logits",
        output_type="TYPE_FP32",
        output_shape=(10,),
        labelled=False,
        optimum=1,
        max_batch=1,
        instances=1,
        threads=None,
        on_gpu=False,
        preprocess=preprocess,
        classifies=True,
        trtexec=None,
    )


def test_one_image_a_time_names_no_size_twice(model: Model) -> None:
    text = config_text(served(model.preprocess))
    assert "preferred_batch_size: [1]" in text
    assert text.count("model_warmup") == 1


class PaperServer:
    """tritonclient.http, answered by the model that was exported; classes as Triton's classification extension."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self.batches: list[int] = []

    def module(self) -> ModuleType:
        module = ModuleType("tritonclient.http")
        contents: dict[str, Any] = {
            "InferInput": lambda name, shape, kind: SimpleNamespace(
                name=name, shape=shape, kind=kind, set_data_from_numpy=lambda array: self._take(array, shape, kind)
            ),
            "InferRequestedOutput": lambda name, class_count=0: SimpleNamespace(name=name, count=class_count),
            "InferenceServerClient": lambda url: SimpleNamespace(infer=self._infer),
        }
        vars(module).update(contents)
        return module

    def _take(self, array: Any, shape: list[int], kind: str) -> None:
        assert array.dtype == np.float32
        assert kind == "FP32"
        assert list(array.shape) == shape
        self.batches.append(shape[0])
        self._pixels = array

    def _infer(self, name: str, inputs: list[Any], outputs: list[Any]) -> Any:
        assert (inputs[0].name, outputs[0].name) == ("pixel_values", self._bundle.manifest.spec.output)
        with open_session(self._bundle, threads=1) as session:
            rows = session(self._pixels)
        if outputs[0].count:
            rows = np.array([self._classes(row, outputs[0].count) for row in rows], object)
        return SimpleNamespace(as_numpy=lambda name: rows)

    def _classes(self, row: Any, count: int) -> list[bytes]:
        labels = self._bundle.manifest.labels
        best = np.argsort(-row)[:count]
        return [f"{row[i]:f}:{i}{':' + labels[i] if labels else ''}".encode() for i in best]


@pytest.mark.parametrize("top", [1, 2])
def test_the_client_prints_what_the_bundle_predicts(
    bundles: Callable[[str], Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    top: int,
) -> None:
    bundle = open_bundle(bundles("cpu").path)
    written = export_triton(bundle, tmp_path / "repository", max_batch=2)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50 + index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    server = PaperServer(bundle)
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    monkeypatch.setitem(sys.modules, "tritonclient.http", server.module())
    monkeypatch.setattr(sys, "argv", ["client.py", "--top", str(top), *map(str, paths)])
    runpy.run_path(str(written.path / "client.py"), run_name="__main__")
    with Predictor(bundle, threads=1) as predictor:
        expected = [
            f"{path}  {row.output[i]:8.3f}  {LABELS[i]}"
            for path, row in zip(paths, predictor(paths, batch=2), strict=True)
            for i in np.argsort(-row.output)[:top]
        ]
    assert capsys.readouterr().out == "".join(line + "\n" for line in expected)
    assert server.batches == [2, 1]


def test_the_client_prints_embeddings(
    tiny_model: Callable[..., Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = pipeline.save(pipeline.optimize(tiny_model(outputs=0, output="image_embeds")), tmp_path / "tiny.fold")
    written = export_triton(bundle, tmp_path / "repository")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    monkeypatch.setitem(sys.modules, "tritonclient", ModuleType("tritonclient"))
    monkeypatch.setitem(sys.modules, "tritonclient.http", PaperServer(bundle).module())
    monkeypatch.setattr(sys, "argv", ["client.py", str(tmp_path / "red.png")])
    runpy.run_path(str(written.path / "client.py"), run_name="__main__")
    name, *numbers, dots = capsys.readouterr().out.split()
    assert name.endswith("red.png")
    assert len([float(number) for number in numbers]) == 6
    assert dots == "..."
