"""The bundle on disk: whole or not at all, and every damage named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitfold.artifacts.bundle import MODEL, Bundle, Manifest, open_bundle, write_bundle
from vitfold.artifacts.digested import MANIFEST, VERSION
from vitfold.artifacts.vision import Vision, read_vision
from vitfold.errors import BundleError
from vitfold.model import Model
from vitfold.recipe import MergeRecipe, QuantRecipe, Recipe


@pytest.fixture
def manifest(tiny_model: Callable[..., Model]) -> Manifest:
    model = tiny_model()
    return Manifest(
        vitfold="0",
        labels=tuple("abcdefghij"),
        target={"name": "cpu", "engine": "onnxruntime"},
        held=Vision(
            spec=model.spec,
            preprocess=model.preprocess,
            recipe=Recipe(merge=MergeRecipe(r=(2, 2))),
            tokens=(17, 15, 13),
            macs=123,
        ),
        origin=model.origin.to_dict(),
        model_digest="0" * 64,
        verified={"images": 1},
    )


def write(path: Path, manifest: Manifest, content: bytes = b"weights", **options: Any) -> Bundle:
    def writer(folder: Path) -> Manifest:
        (folder / MODEL).write_bytes(content)
        return manifest

    return write_bundle(path, writer, **options)


def test_what_is_written_is_read_back(tmp_path: Path, manifest: Manifest) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    again = open_bundle(tmp_path / "a.fold")
    assert again.manifest == manifest
    assert again.digest == bundle.digest
    assert again.onnx_path.read_bytes() == b"weights"
    assert again.name == "a"
    assert again.size_bytes == len(b"weights") + len((again.path / "recipe.toml").read_bytes())


@pytest.mark.parametrize("merged", [True, False])
def test_bundles_of_before_that_state_no_calibration_were_calibrated_merged(manifest: Manifest, merged: bool) -> None:
    target = {**manifest.target, "activation_type": "uint8", "quantized_product": "fused", "weight_bits": 8}
    quantized = Recipe(merge=MergeRecipe(r=(2, 2)), quant=QuantRecipe(calibrate_merged=merged))
    values = json.loads(json.dumps(manifest.changed(recipe=quantized).to_dict()))

    def read() -> Vision:
        return read_vision(values, labels=manifest.labels, target=target, name=MANIFEST)

    assert read().recipe == quantized
    del values["recipe"]["quant"]["calibrate_merged"]
    again = read().recipe.quant
    assert again is not None
    assert again.calibrate_merged


def test_equal_content_has_an_equal_digest(tmp_path: Path, manifest: Manifest) -> None:
    first, second = write(tmp_path / "a.fold", manifest), write(tmp_path / "b.fold", manifest)
    other = write(tmp_path / "c.fold", manifest.changed(macs=124))
    assert first.digest == second.digest != other.digest


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def writer(folder: Path) -> Manifest:
        (folder / MODEL).write_bytes(b"half")
        raise error("stop")

    with pytest.raises((error, BundleError)):
        write_bundle(tmp_path / "a.fold", writer)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_the_old_bundle(tmp_path: Path, manifest: Manifest) -> None:
    old = write(tmp_path / "a.fold", manifest)

    def writer(folder: Path) -> Manifest:
        (folder / MODEL).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "a.fold", writer, overwrite=True)
    assert open_bundle(tmp_path / "a.fold").digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["a.fold"]


def test_replacing_needs_permission(tmp_path: Path, manifest: Manifest) -> None:
    write(tmp_path / "a.fold", manifest)
    with pytest.raises(BundleError, match="--overwrite"):
        write(tmp_path / "a.fold", manifest)
    assert write(tmp_path / "a.fold", manifest, b"new", overwrite=True).onnx_path.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.fold"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "keep.txt").write_text("mine")
    with pytest.raises(BundleError, match="not a bundle"):
        write(tmp_path / "photos", manifest, overwrite=True)
    assert (tmp_path / "photos" / "keep.txt").read_text() == "mine"


def test_a_file_in_the_way_is_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "a.fold").write_text("file")
    with pytest.raises(BundleError, match="is a file"):
        write(tmp_path / "a.fold", manifest, overwrite=True)


def test_an_unwritable_parent_is_named(tmp_path: Path, manifest: Manifest) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BundleError, match="cannot write"):
        write(tmp_path / "file" / "a.fold", manifest)


def test_a_missing_bundle_offers_the_nearest(tmp_path: Path, manifest: Manifest) -> None:
    write(tmp_path / "vit-r8.fold", manifest)
    with pytest.raises(BundleError, match="vit-r8.fold"):
        open_bundle(tmp_path / "vit_r8.fold")


@pytest.mark.parametrize("name", [MODEL, "recipe.toml"])
def test_one_flipped_byte_is_found(tmp_path: Path, manifest: Manifest, name: str) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    content = bytearray((bundle.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.path / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} is damaged"):
        open_bundle(bundle.path)


def test_a_truncated_and_a_missing_file_are_found(tmp_path: Path, manifest: Manifest) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    bundle.onnx_path.write_bytes(b"weight")
    with pytest.raises(BundleError, match="damaged"):
        open_bundle(bundle.path)
    bundle.onnx_path.unlink()
    with pytest.raises(BundleError, match=r"lacks the file model\.onnx"):
        open_bundle(bundle.path)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / MANIFEST).read_text())
    change(values)
    (path / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=VERSION + 1), "upgrade with"),
        (lambda v: v.update(version="1"), "not one"),
        (lambda v: v.update(format="zip"), "not a bundle"),
        (lambda v: v.pop("recipe"), "damaged"),
        (lambda v: v["spec"].update(rotary=True), "damaged"),
        (lambda v: v["files"].pop(MODEL), "does not list"),
        (lambda v: v["files"].update({"../../etc/passwd": {"sha256": "", "size_bytes": 0}}), "cannot hold"),
        (lambda v: v["files"].update({"absent.bin": {"sha256": "", "size_bytes": 0}}), "lacks the file"),
    ],
)
def test_hostile_manifests_are_refused(
    tmp_path: Path, manifest: Manifest, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    edit(bundle.path, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(bundle.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\x01", "null"])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, manifest: Manifest, text: str) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    (bundle.path / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="make the bundle again|not a bundle"):
        open_bundle(bundle.path)


def test_a_symbolic_link_is_no_file_of_a_bundle(tmp_path: Path, manifest: Manifest) -> None:
    bundle = write(tmp_path / "a.fold", manifest)
    outside = tmp_path / "outside.onnx"
    outside.write_bytes(bundle.onnx_path.read_bytes())
    bundle.onnx_path.unlink()
    bundle.onnx_path.symlink_to(outside)
    with pytest.raises(BundleError, match="lacks the file"):
        open_bundle(bundle.path)
