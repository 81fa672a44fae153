"""A sample of the mutations of `mutating.py`, and what it must notice: no signal, no hang, no foreign exception."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HERE = Path(__file__).parent
sys.path.append(str(HERE))

import mutating  # noqa: E402

from vitfold.artifacts.bundle import open_bundle  # noqa: E402
from vitfold.errors import BundleError, VitfoldError  # noqa: E402
from vitfold.model import Model  # noqa: E402
from vitfold.model.spec import with_names_of_today  # noqa: E402
from vitfold.serve.predictor import open_predictor  # noqa: E402

SAMPLE = 350


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Model]) -> Path:
    folder = tmp_path_factory.mktemp("mutations") / "seeds"
    mutating.build_seeds(folder, tiny_model)
    return folder


def test_a_sample_of_mutations_is_refused_or_works(seeds: Path) -> None:
    """In a process of its own: children are forked from one that has not used a runtime."""
    command = [sys.executable, str(HERE / "mutating.py"), "--count", str(SAMPLE), "--seeds", str(seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    counts = json.loads(done.stdout.strip().rpartition("s: ")[2])
    assert sum(counts.values()) == SAMPLE
    assert counts["refused BundleError"] > SAMPLE / 3


Change = Callable[[dict[str, Any]], object]


def put(*path: Any) -> Change:
    """Return the change that puts the last of these at the path of the others."""

    def change(values: dict[str, Any]) -> None:
        *above, key, value = path
        owner: Any = values
        for step in above:
            owner = owner[step]
        owner[key] = value

    return change


MANIFESTS: tuple[tuple[str, str, Change, str], ...] = (
    ("no spec", "float", lambda v: v.pop("spec"), "spec has to be a section, found null"),
    ("a spec that is text", "float", put("spec", "vit"), 'spec has to be a section, found "vit"'),
    ("a width of text", "float", put("spec", "width", "32"), 'spec.embed_dim has to be an integer, found "32"'),
    ("a width that is true", "float", put("spec", "width", True), "spec.embed_dim has to be an integer, found true"),
    ("half a block", "float", put("spec", "depth", 2.5), "spec.num_layers has to be an integer, found 2.5"),
    ("no block", "float", put("spec", "depth", 0), "spec.num_layers has to be an integer of 1 to 65536, found 0"),
    ("a billion blocks", "float", put("spec", "depth", 10**9), "spec.num_layers has to be an integer of 1 to 65536"),
    ("one side", "float", put("spec", "image_size", [32]), "spec.image_size has to be a list of 2, found [32]"),
    ("three sides", "float", put("spec", "image_size", [32] * 3), "spec.image_size has to be a list of 2"),
    ("a huge image", "float", put("spec", "image_size", [10**9, 32]), "spec.image_size[0] has to be an integer of 1"),
    ("a list of lists", "float", put("spec", "patch_size", [[8], 8]), "spec.patch_size[0] has to be an integer"),
    ("a negative epsilon", "float", put("spec", "norm_eps", -1e-6), "spec.norm_eps has to be a number of 0 to 1"),
    ("an unknown pooling", "float", put("spec", "pool", "max"), "spec.pool has to be token or avg or map or"),
    ("a flag of one", "float", put("spec", "class_token", 1), "spec.class_token has to be true or false, found 1"),
    ("sinks of nothing", "float", put("spec", "sinks", 3), "spec.sinks has to be a section, found 3"),
    ("sinks of infinity", "float", put("spec", "sinks", {"tau": 1e300}), "spec.sinks.tau has to be a number of 0"),
    ("no mean", "float", lambda v: v["preprocess"].pop("mean"), "preprocess.mean is missing"),
    ("two means", "float", put("preprocess", "mean", [0.5, 0.5]), "preprocess.mean has to be a list of 3"),
    ("a mean of text", "float", put("preprocess", "mean", ["a", 0, 0]), "preprocess.mean[0] has to be a number"),
    ("no spread", "float", put("preprocess", "std", [0, 1, 1]), "preprocess.std[0] has to be a number of 1e-06"),
    ("a resize to a billion", "float", put("preprocess", "resize_size", [10**9] * 2), "preprocess.resize_size[0]"),
    ("an unknown filter", "float", put("preprocess", "interpolation", "magic"), "preprocess.interpolation has to be"),
    ("labels that are text", "float", put("labels", "abcdefghij"), 'labels has to be a list, found "abcdefghij"'),
    ("labels of numbers", "float", put("labels", list(range(10))), "labels[0] has to be text, found 0"),
    ("too few labels", "float", put("labels", ["a"]), "there are 1 labels for 10 outputs"),
    ("tokens that do not follow", "float", put("tokens", [17, 15, 12]), "tokens are 17 15 12, and the recipe gives 17"),
    ("tokens of text", "float", put("tokens", "17"), 'tokens has to be a list, found "17"'),
    ("negative work", "float", put("macs", -1), "macs has to be an integer of 0 to"),
    ("work of text", "float", put("macs", "many"), 'macs has to be an integer, found "many"'),
    ("a digest that is none", "float", put("model_digest", "0" * 63), "model_digest has to be a sha256"),
    ("a digest in capitals", "float", put("model_digest", "A" * 64), "model_digest has to be a sha256"),
    ("an origin without a source", "float", lambda v: v["origin"].pop("source"), "origin.source is missing"),
    ("arguments that are a list", "float", put("origin", "arguments", []), "origin.arguments has to be a section"),
    (
        "an unknown engine",
        "float",
        put("target", "engine", "rm -rf"),
        "target.engine one of onnxruntime, onnxruntime-cuda",
    ),
    ("a target of markup", "float", put("target", "name", "[red]x"), "target.name is a target"),
    ("a form that is none", "int8", put("target", "quantized_product", "maybe"), "target.quantized_product has to be"),
    ("no form of products", "int8", lambda v: v["target"].pop("quantized_product"), "target.quantized_product is miss"),
    (
        "bits that no target has",
        "int8",
        put("target", "weight_bits", 99),
        "target.weight_bits has to be an integer of 2",
    ),
    ("batches that fall", "half", put("target", "batch", [8, 4, 1]), "target.batch has to rise, found 8 4 1"),
    ("two batches", "half", put("target", "batch", [1, 8]), "target.batch has to be a list of 3"),
    ("verified by nothing", "float", put("verified", None), "verified has to be a section, found null"),
    ("a negative error", "float", put("verified", "median_relative_error", -1), "verified.median_relative_error has"),
    ("images verified in part", "float", put("verified", "images", 1.5), "verified.images has to be an integer"),
    ("agreement beyond all", "float", put("fidelity", {"images": 3, "agreement": 2}), "fidelity.agreement has to be"),
    ("fidelity of text", "float", put("fidelity", "good"), 'fidelity has to be a section, found "good"'),
    ("a merge of text", "float", put("recipe", "merge", "r", "8"), 'recipe.merge.r has to be a list, found "8"'),
    ("a merge too large", "float", put("recipe", "merge", "r", [9, 2]), "r = 9 is too large for block 0"),
    ("an unknown rule", "float", put("recipe", "merge", "rule", "best"), "merge.rule is tome, nearest"),
    ("a section that no recipe has", "float", put("recipe", "shrink", {}), "unknown section [shrink]"),
    ("pruning without a share", "float", put("recipe", "prune", {}), "names either mlp, a share"),
    ("a share of text", "float", put("recipe", "prune", {"mlp": "half"}), "has to be a number"),
    ("all units gone", "float", put("recipe", "prune", {"mlp": 1.0}), "prune.mlp is the share of the units to go"),
    ("nine bits", "int8", put("recipe", "quant", "weights", 9), "quant.weights must be 2 to 8 bits, found 9"),
    ("sites that are a list", "int8", put("recipe", "quant", "sites", []), "recipe.quant.sites has to be a section"),
    ("a calibration without a root", "int8", lambda v: v["calibration"].pop("root"), "calibration.root is missing"),
    (
        "images out of their folder",
        "int8",
        put("calibration", "images", [{"path": "../a", "sha256": "0" * 64}]),
        "leads",
    ),
    ("images of text", "int8", put("calibration", "images", "all"), "calibration.images has to be a list"),
    ("an environment of text", "int8", put("calibration", "environment", "here"), "calibration.environment has to be"),
    ("a simulation of nothing", "simulated", lambda v: v["recipe"].pop("quant"), "its recipe quantizes nothing"),
    ("a folder of files", "float", put("files", []), "it has no list of files"),
    ("no recipe", "float", lambda v: v["files"].pop("recipe.toml"), "does not list recipe.toml"),
    ("a file with a path", "float", put("files", "a/b", {"sha256": "", "size_bytes": 0}), "which a bundle cannot hold"),
    ("a file without a name", "float", put("files", "", {"sha256": "", "size_bytes": 0}), "which a bundle cannot hold"),
    ("a file of a long name", "float", put("files", "n" * 300, {"sha256": "", "size_bytes": 0}), "lacks the file"),
    ("an entry of text", "float", put("files", "model.onnx", "here"), "which a bundle cannot hold"),
    ("a version of text", "float", put("version", "1"), 'states the format version "1", which is not one'),
    ("a version that is true", "float", put("version", True), "states the format version true"),
    ("a version of later", "float", put("version", 2), "upgrade with: pip install -U vitfold"),
    ("a text of a million", "float", put("vitfold", "x" * 10**6), "a text of 1000000 characters is too long"),
    ("a kind that is unknown", "float", put("kind", "audio"), "holds the steps of a diffusion model"),
    ("no step", "steps", put("plan", "steps", 0), "plan.steps has to be an integer of 1 to 10000, found 0"),
    ("steps without end", "steps", put("plan", "steps", 10**9), "plan.steps has to be an integer of 1 to 10000"),
    ("guidance of text", "steps", put("plan", "guidance", "much"), "plan.guidance has to be a number"),
    ("an unknown key of the plan", "steps", put("plan", "speed", 2), "unknown key plan.speed"),
    ("no part", "steps", put("parts", []), "parts are some of condition, step, full"),
    ("a part twice", "steps", put("parts", ["full", "full"]), "each once"),
    ("a part out of the folder", "steps", put("parts", ["../../x"]), "parts are some of"),
    ("steps beyond the last", "steps", put("mask", [99]), "mask[0] has to be an integer of 0 to 3, found 99"),
    ("steps of a simulation", "steps", put("target", "engine", "simulation"), "simulation, which does not run steps"),
    ("counts of text", "steps", put("counts", ["all"]), "counts[0] has to be an integer"),
    ("a latent of one", "steps", put("latent", 1), "latent has to be true or false, found 1"),
    (
        "a schedule without end",
        "steps",
        put("schedule", "num_train_timesteps", 2**40),
        "schedule.num_train_timesteps has",
    ),
    ("an unknown prediction", "steps", put("schedule", "prediction_type", None), "schedule.prediction_type has to be"),
    ("a schedule within a schedule", "steps", put("schedule", "more", {}), "schedule.more has to be a plain value"),
    ("three classes, one label", "steps", put("labels", ["a"]), "there are 1 labels for 3 classes"),
    ("a patch that does not divide", "steps", put("spec", "patch_size", 5), "the patch size 5 does not divide"),
)


@pytest.mark.parametrize(
    ("kind", "change", "words"), [case[1:] for case in MANIFESTS], ids=[case[0] for case in MANIFESTS]
)
def test_manifests_that_no_vitfold_wrote(seeds: Path, tmp_path: Path, kind: str, change: Change, words: str) -> None:
    if not (seeds / f"{kind}.fold").exists():
        pytest.skip("diffusers is not installed")
    work = tmp_path / "a.fold"
    shutil.copytree(seeds / f"{kind}.fold", work)
    values = mutating.manifest_of(work)
    change(values)
    (work / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError) as caught:
        open_bundle(work, steps=kind == "steps" and "kind" in values)
    assert words in str(caught.value)
    assert mutating.strange(str(caught.value)) == ""


TEXTS = (
    ("nothing", b"", "it is not JSON"),
    ("no text", b"\xff\xfe{}", "it is not UTF-8"),
    ("a hundred thousand brackets", b"[" * 100_000, "it is nested more than 24 deep"),
    ("thirty closed brackets", b"[" * 30 + b"]" * 30, "it is nested more than 24 deep"),
    ("no number", b'{"macs": NaN}', "NaN is no number"),
    ("infinity", b'{"macs": -Infinity}', "-Infinity is no number"),
    ("beyond floats", b'{"macs": 1e999}', "the number 1e999 is too large"),
    ("a million digits", b'{"macs": ' + b"9" * 10**6 + b"}", "is too large"),
    ("a key twice", b'{"macs": 1, "macs": 2}', "the key 'macs' is there twice"),
    ("half a character", b'{"vitfold": "\\ud800"}', "a text holds characters that are none"),
    ("a byte of nothing", b'{"vitfold": "\\u0000"}', "a text holds characters that are none"),
    ("a list of millions", b"[" + b"1," * (2**20 + 5) + b"1]", "entries is too long"),
    ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(100), "it is not UTF-8"),
)


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in TEXTS], ids=[case[0] for case in TEXTS])
def test_manifests_that_are_no_text_of_ours(seeds: Path, tmp_path: Path, content: bytes, words: str) -> None:
    work = tmp_path / "a.fold"
    shutil.copytree(seeds / "float.fold", work)
    (work / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match="is damaged: .*; make the bundle again") as caught:
        open_bundle(work)
    assert words in str(caught.value)


def photo() -> bytes:
    return b"\xff\xd8\xff\xe0\x00\x10JFIF" + np.random.default_rng(0).bytes(4000)


def nested(levels: int) -> bytes:
    """An attribute that holds a graph: a node with a body."""
    body = b""
    for _ in range(levels):
        node = mutating.joined([(4, 2, b"If"), (5, 2, mutating.joined([(1, 2, b"then_branch"), (6, 2, body)]))])
        body = mutating.joined([(1, 2, node)])
    return mutating.joined([(1, 0, 10), (7, 2, body)])


def tensor(dims: list[int], raw: bytes, kind: int = 1, **outside: str) -> bytes:
    entries = [(13, 2, mutating.joined([(1, 2, k.encode()), (2, 2, v.encode())])) for k, v in outside.items()]
    fields = [
        *((1, 0, size) for size in dims),
        (2, 0, kind),
        (8, 2, b"w"),
        *([] if outside else [(9, 2, raw)]),
        *entries,
    ]
    return mutating.joined([(1, 0, 10), (7, 2, mutating.joined([(5, 2, mutating.joined(fields))]))])


GRAPHS = (
    ("nothing", b"", "cannot be read as a graph"),
    ("a photo", photo(), "is no graph that vitfold wrote"),
    ("text", b"#!/bin/sh\nrm -rf /\n" * 50, "is no graph that vitfold wrote"),
    ("an archive", b"PK\x03\x04" + bytes(200), "is no graph that vitfold wrote"),
    ("zeros", bytes(4096), "is no graph that vitfold wrote"),
    ("a safetensors file", struct.pack("<Q", 2) + b"{}", "is no graph that vitfold wrote"),
    ("a model without a graph", mutating.joined([(1, 0, 10)]), "it holds 0 graphs"),
    ("two graphs", mutating.joined([(1, 0, 10), (7, 2, b""), (7, 2, b"")]), "it holds 2 graphs"),
    ("a graph in a graph", nested(1), "a node holds a graph of its own"),
    ("a thousand graphs in each other", nested(1000), "a node holds a graph of its own"),
    ("an endless number", b"\x08" + b"\xff" * 20, "cut short or no protocol buffer"),
    ("a length beyond the end", b"\x3a\xff\xff\xff\x7f" + bytes(10), "cut short or no protocol buffer"),
    ("too few bytes", tensor([1000, 1000], b"1234"), "the tensor w takes 4000000 bytes and has 4"),
    ("a shape beyond memory", tensor([2**41, 2**41], b"1234"), "has a type or a shape that no weight has"),
    ("texts as weights", tensor([1], b"1234", kind=8), "has a type or a shape that no weight has"),
    ("weights elsewhere", tensor([1], b"", location="../../etc/passwd"), "which is no file of the bundle"),
    ("weights at the root", tensor([1], b"", location="/etc/passwd"), "which is no file of the bundle"),
    ("weights in no file", tensor([1], b"", location="absent.data"), "lies beyond the end of absent.data"),
    ("weights behind the end", tensor([1], b"", location="recipe.toml", offset="999999"), "lies beyond the end"),
    ("weights before the start", tensor([1], b"", location="recipe.toml", offset="-4"), "does not say where it lies"),
    (
        "an operator of another program",
        mutating.joined(
            [(1, 0, 10), (7, 2, mutating.joined([(1, 2, mutating.joined([(4, 2, b"A"), (7, 2, b"b.c")]))]))]
        ),
        "a node has the operator 'A' of 'b.c'",
    ),
    (
        "a name that is no text",
        mutating.joined([(1, 0, 10), (7, 2, mutating.joined([(1, 2, mutating.joined([(4, 2, b"\xff\xfe")]))]))]),
        "a name is no text",
    ),
)


@pytest.mark.parametrize(("content", "words"), [case[1:] for case in GRAPHS], ids=[case[0] for case in GRAPHS])
def test_graphs_that_are_none(
    seeds: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    work = tmp_path / "a.fold"
    shutil.copytree(seeds / "float.fold", work)
    (work / "model.onnx").write_bytes(content)
    mutating.seal_again(work)
    with pytest.raises(BundleError, match=r"; make the bundle again") as caught:
        open_predictor(work)
    assert words in str(caught.value)
    assert "EP Error" not in "".join(capfd.readouterr())


FILES = (
    ("weights that are none", "weights.safetensors", b"no tensors", "is no whole file of tensors"),
    ("weights of a photo", "weights.safetensors", photo(), "is no whole file of tensors"),
    ("quantizers that are none", "quantizers.safetensors", b"", "it is no file of tensors"),
    ("weights for quantizers", "quantizers.safetensors", "weights.safetensors", "it is not JSON"),
    ("quantizers for weights", "weights.safetensors", "quantizers.safetensors", "does not fit the manifest"),
)


@pytest.mark.parametrize(("name", "content", "words"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_tensors_that_are_none(seeds: Path, tmp_path: Path, name: str, content: bytes | str, words: str) -> None:
    work = tmp_path / "a.fold"
    shutil.copytree(seeds / "simulated.fold", work)
    (work / name).write_bytes((work / content).read_bytes() if isinstance(content, str) else content)
    mutating.seal_again(work)
    with pytest.raises(BundleError) as caught:
        open_predictor(work)
    assert words in str(caught.value)


def test_steps_of_another_graph_are_noticed_on_opening(seeds: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from vitfold.diffusion.opening import open_steps

    work = tmp_path / "a.fold"
    shutil.copytree(seeds / "steps.fold", work)
    shutil.copyfile(work / "resume.onnx", work / "full.onnx")
    mutating.seal_again(work)
    with pytest.raises(BundleError, match=r"full.onnx is not the graph that the plan needs: .*make the bundle again"):
        open_steps(open_bundle(work, steps=True), 1)


def test_bundles_of_the_first_version_still_open(tmp_path: Path) -> None:
    """Manifests as vitfold wrote them before values were checked, of every kind of bundle."""
    old = sorted((HERE / "manifests").glob("*.json"))
    assert len(old) >= 8
    for path in old:
        values = json.loads(path.read_text())
        work = tmp_path / f"{path.stem}.fold"
        work.mkdir()
        for name in values["files"]:
            (work / name).write_bytes(b"")
        (work / "manifest.json").write_text(json.dumps(values))
        mutating.seal_again(work)
        manifest = open_bundle(work, steps=None).manifest
        assert manifest.model_digest == values["model_digest"]
        today = values | {"spec": with_names_of_today(values["spec"])}
        if "plan" in values:
            today["plan"] = {"method": None} | values["plan"]
            today = {"weights": None, "rescale": None} | today
        recipe = today.get("recipe", {})
        if "quant" in recipe and any(recipe["merge"]["r"]):
            today["recipe"] = recipe | {"quant": recipe["quant"] | {"calibrate_merged": True}}
        assert manifest.to_dict().items() <= today.items()


def test_the_seeds_work(seeds: Path) -> None:
    for path in sorted(seeds.glob("*.fold")):
        mutating.use(path)
    image = Image.new("RGB", (40, 40))
    with open_predictor(seeds / "float.fold") as predictor:
        assert len(predictor(image)[0].top(10)) == 10
    with pytest.raises(VitfoldError, match="no such bundle"):
        open_predictor(seeds / "absent.fold")
