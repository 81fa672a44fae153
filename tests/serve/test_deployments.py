"""Folders for KServe, BentoML and Ray Serve: their texts, the threads of each instance, and code that runs."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.cores import usable_cores
from vitfold.errors import BundleError, EngineError
from vitfold.model import Model
from vitfold.serve.docker import export_context

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")


@pytest.fixture(scope="module")
def bundle(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    model = replace(tiny_model(), labels=tuple("abcdefghij"))
    return pipeline.save(pipeline.optimize(model), folder / "My vit_1.fold").path


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_an_inference_service_has_the_cores_of_its_threads(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "k", "kserve", threads=8, instances=2)
    service = parsed(folder / "inferenceservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "my-vit-1"
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 2)
    (container,) = predictor["containers"]
    assert container["args"][-2:] == ["--threads", "4"]
    assert container["resources"]["limits"]["cpu"] == "4"
    assert container["args"][:2] == ["serve", "My_vit_1.fold"]
    for name in ("My_vit_1.fold", "vitfold", "Dockerfile", "requirements.txt"):
        assert (folder / name).exists()
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in (folder / "Dockerfile").read_text()


def keywords(call: ast.Call) -> dict[str, Any]:
    return {one.arg or "": ast.literal_eval(one.value) for one in call.keywords}


def calls(path: Path) -> dict[str, dict[str, Any]]:
    """Return the literal keywords of each call in a module, by the name of what is called."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [node for node in found if all(isinstance(one.value, ast.Constant | ast.Dict) for one in node.keywords)]
    return {ast.unparse(node.func): keywords(node) for node in named}


def test_a_bento_has_a_worker_for_each_instance(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "b", "bento", threads=6, instances=2, name="vit")
    build = parsed(folder / "bentofile.yaml")
    assert build["name"] == "vit"
    assert "My_vit_1.fold/**" in build["include"]
    module, _, name = build["service"].partition(":")
    found = calls(folder / f"{module}.py")
    assert found["bentoml.service"]["workers"] == 2
    assert found["bentoml.service"]["resources"] == {"cpu": "3"}
    assert found["open_predictor"] == {"threads": 3}
    assert f"class {name}:" in (folder / f"{module}.py").read_text()
    assert "bentoml>=" in (folder / build["python"]["requirements_txt"]).read_text()


def test_an_application_of_ray_has_a_replica_for_each_instance(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "r", "ray-serve", threads=4, instances=2)
    (application,) = parsed(folder / "serve.yaml")["applications"]
    (deployment,) = application["deployments"]
    assert (deployment["num_replicas"], deployment["ray_actor_options"]) == (2, {"num_cpus": 2})
    assert calls(folder / "app.py")["open_predictor"] == {"threads": 2}
    assert application["import_path"] == "app:app"


def test_instances_divide_the_cores_of_this_machine(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "r", "ray-serve", instances=2)
    each = max(1, usable_cores() // 2)
    assert calls(folder / "app.py")["open_predictor"] == {"threads": each}


def test_what_cannot_be_deployed_is_said(bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    with pytest.raises(EngineError, match="a container runs one instance; start several of them"):
        export_context(opened, tmp_path / "d", instances=2)
    export_context(opened, tmp_path / "d")
    with pytest.raises(BundleError, match="was not written by `vitfold export --format bento`"):
        export_context(opened, tmp_path / "d", "bento", overwrite=True)
