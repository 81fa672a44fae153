"""What logits stand for: read from the source, said by the user, or plain from there being one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from zoo import randomize, tiny_hf, tiny_timm, tiny_tv

from vitfold.errors import SourceError
from vitfold.model.spec import spec_to_dict, vit_spec_from_dict
from vitfold.sources import adapt, load_source


def classifier(folder: Path, **options: Any) -> str:
    randomize(tiny_hf(hf.ViTForImageClassification, hf.ViTConfig, **options)).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize(
    ("problem", "classes", "head"),
    [
        (None, 3, "single_label"),
        ("single_label_classification", 3, "single_label"),
        ("multi_label_classification", 3, "multi_label"),
        ("regression", 3, "regression"),
        ("regression", 1, "regression"),
        (None, 1, "multi_label"),
    ],
)
def test_transformers_says_it_in_its_config(tmp_path, problem, classes, head):
    spec = load_source(classifier(tmp_path, num_labels=classes, problem_type=problem)).model.spec
    assert spec.head == head
    assert vit_spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_an_unknown_problem_is_refused(tmp_path):
    source = classifier(tmp_path, num_labels=3)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"problem_type": "ranking"}))
    with pytest.raises(SourceError, match=r"ranking"):
        load_source(source)


@pytest.mark.parametrize("build", [tiny_timm, tiny_tv])
def test_one_logit_is_a_yes_or_no_in_every_zoo(build):
    assert adapt(randomize(build(num_classes=1))).spec.head == "multi_label"
    assert adapt(randomize(build(num_classes=3))).spec.head == "single_label"


def test_the_user_may_say_it():
    module = randomize(tiny_timm(num_classes=3))
    assert adapt(module, problem="multi_label").spec.head == "multi_label"
    with pytest.raises(SourceError, match="this model gives features"):
        adapt(randomize(tiny_timm(num_classes=0)), problem="multi_label")


def test_a_word_that_nobody_knows_is_refused(without_type_checks):
    with pytest.raises(SourceError, match="unsupported problem 'ranking'; supported: single_label, multi_label"):
        adapt(randomize(tiny_timm(num_classes=3)), problem="ranking")


def test_a_sidecar_may_say_it(tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=4).state_dict(), tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"arch": "test_vit", "num_classes": 4, "problem": "regression"}))
    assert load_source(str(tmp_path / "a.safetensors")).model.spec.head == "regression"
    again = load_source(str(tmp_path / "a.safetensors"), problem="multi_label").model
    assert (again.spec.head, again.origin.arguments["problem"]) == ("multi_label", "multi_label")


def test_what_is_usual_is_not_written_so_that_older_readers_open_it(tmp_path):
    spec = load_source(classifier(tmp_path, num_labels=3)).model.spec
    assert "problem" not in spec_to_dict(spec)
