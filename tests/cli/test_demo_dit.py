"""The demo's Diffusion Transformer as it lies in the repository."""

from __future__ import annotations

import pytest
from invoking import error, run_json

pytest.importorskip("diffusers", reason="diffusers is not installed")


def test_it_draws_the_garments_that_are_asked_for() -> None:
    arguments = ("--steps", "12", "--classes", "all", "--count", "30", "--batch", "10", "--trials", "1")
    found = run_json("diffuse", "demo-dit", *arguments, "--reuse", "solved:8")
    assert found["features"] == "demo-dit/judge"
    plain, solved, fewer = found["rows"]
    assert min(row["class_accuracy"] for row in found["rows"]) > 0.7
    assert plain["frechet"] < 30  # uniform noise: 135
    assert solved["psnr_db"] > fewer["psnr_db"] > 25


def test_its_classes_have_names() -> None:
    found = run_json("diffuse", "demo-dit", "--steps", "4", "--classes", "bag,ankle boot", "--trials", "1")
    assert found["classes"] == [8, 9]
    assert "did you mean sneaker" in error("diffuse", "demo-dit", "--classes", "sneakers")
