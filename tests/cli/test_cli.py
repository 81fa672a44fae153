"""The command line by hand: what a user types, what comes back, and what every mistake says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from invoking import DEMO, RANDOM, ROOT, error, run, run_json
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from vitfold.cli import doctor
from vitfold.cli.app import COMMANDS, DIFFUSION, app
from vitfold.program import program_from_dict
from vitfold.program.queries import attention_of


@pytest.fixture(scope="module")
def merged(folder: Path, few: Path) -> Path:
    run("optimize", "demo", "-o", folder / "merged.fold", "--merge", "2", "--images", few)
    return folder / "merged.fold"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    run("optimize", "demo", "-o", folder / "plain.fold")
    return folder / "plain.fold"


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Path:
    run("optimize", *RANDOM, "-o", folder / "tiny.fold")
    return folder / "tiny.fold"


def test_optimize_says_what_it_made(folder: Path, few: Path) -> None:
    values = run_json("optimize", "demo", "-o", folder / "said.fold", "--merge", "3:-1", "--images", few)
    assert values["tokens"][0] == 65
    assert values["tokens"][-1] == 65 - sum(values["recipe"]["merge"]["r"])
    assert values["verified"]["median_relative_error"] < 1e-4
    assert values["fidelity"]["images"] == 20
    assert values["fidelity"]["agreement"] >= 0.8
    assert (folder / "said.fold" / "model.onnx").stat().st_size <= values["size_bytes"]


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    values = run_json("optimize", "demo", "-o", folder / "dry.fold", "--merge", "4", "--dry-run")
    assert values["tokens"] == [65 - 4 * i for i in range(13)]
    assert "bundle" not in values
    assert not (folder / "dry.fold").exists()


def test_a_recipe_repeats_a_bundle(folder: Path, merged: Path) -> None:
    again = run_json("optimize", "demo", "-o", folder / "again.fold", "--recipe", merged / "recipe.toml")
    first = run_json("inspect", merged)
    assert again["recipe"] == first["recipe"]
    onnx = [(folder / name / "model.onnx").read_bytes() for name in ("again.fold", "merged.fold")]
    assert onnx[0] == onnx[1]


def test_predict_names_the_class(merged: Path, few: Path) -> None:
    images = [next((few / name).iterdir()) for name in ("ship", "horse")]
    results = run_json("predict", merged, *images, "--top", "3")
    assert [r["image"] for r in results] == [str(path) for path in images]
    assert [r["top"][0]["label"] for r in results] == ["ship", "horse"]
    assert all(len(r["top"]) == 3 for r in results)
    assert "ship" in run("predict", merged, images[0]).stdout


def test_evaluate_reports_accuracy_and_fidelity(merged: Path, few: Path) -> None:
    values = run_json("evaluate", merged, "--images", few)
    assert {"images", "top1", "top5", "agreement", "cosine"} <= set(values)
    assert values["images"] == 20
    assert 0.7 <= values["top1"] <= 1.0
    assert values["top1"] <= values["top5"] <= 1.0
    assert 0.9 <= values["cosine"] < 1.0


def test_without_merging_nothing_differs(plain: Path, few: Path) -> None:
    values = run_json("evaluate", plain, "--images", few)
    assert values["agreement"] == 1.0
    assert values["cosine"] == pytest.approx(1.0, abs=1e-9)


def test_unlabelled_images_give_agreement_only(merged: Path, few: Path, folder: Path) -> None:
    flat = folder / "flat"
    flat.mkdir()
    for path in few.glob("*/*.jpg"):
        (flat / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    values = run_json("evaluate", merged, "--images", flat, "--limit", "7")
    assert values["images"] == 7
    assert values["top1"] is None
    assert values["agreement"] is not None


def test_a_named_reference_is_used(merged: Path, plain: Path, few: Path) -> None:
    with_origin = run_json("evaluate", merged, "--images", few)
    with_bundle = run_json("evaluate", merged, "--images", few, "--reference", plain)
    assert with_origin["cosine"] == pytest.approx(with_bundle["cosine"], abs=1e-6)


def test_gates_exit_with_three(merged: Path, few: Path, folder: Path) -> None:
    assert "agreement is" in " ".join(
        run("evaluate", merged, "--images", few, "--min-cosine", "1", "--min-agreement", "1", code=3).stderr.split()
    ) or "cosine is" in " ".join(run("evaluate", merged, "--images", few, "--min-cosine", "1", code=3).stderr.split())
    run("evaluate", merged, "--images", few, "--min-top1", "0.5")
    run("optimize", "demo", "-o", folder / "g.fold", "--merge", "5", "--images", few, "--min-agreement", "1", code=3)


def test_bench_rows_are_the_documented_interface(merged: Path, plain: Path, few: Path, folder: Path) -> None:
    raw = folder / "raw.json"
    values = run_json(
        "bench", plain, merged, "--images", few, "--trials", "2", "--seconds", "0.1", "--batch", "2", "-o", raw
    )
    assert {"processor", "cores", "threads", "packages"} <= set(values["environment"])
    rows = {(row["bundle"], row["scope"]): row for row in values["rows"]}
    assert set(rows) == {(name, scope) for name in ("plain", "merged") for scope in ("engine", "end_to_end")}
    for row in values["rows"]:
        assert set(row["latency_ms"]) == {"median", "mean", "std", "p90", "p99", "iqr"}
        assert set(row["throughput_ips"]) == {"median", "mean", "std"}
        assert row["batch"] == 2
        assert isinstance(row["noisy"], bool)
        assert row["fidelity"]["images"] == 20
        assert row["speed_up"]["baseline"] == "plain"
    samples = json.loads(raw.read_text())["measurements"]
    assert len(samples) == 4
    assert all(len(m["trials_ns"]) == 2 and all(m["trials_ns"]) for m in samples)


def test_bench_without_images_times_the_engine_only(tiny: Path) -> None:
    values = run_json("bench", tiny, "--trials", "1", "--seconds", "0.1")
    assert [row["scope"] for row in values["rows"]] == ["engine"]
    assert values["rows"][0]["fidelity"] is None
    shown = run("bench", tiny, "--trials", "1", "--seconds", "0.1")
    assert "engine only" in shown.stdout


def test_bench_takes_peers(tiny: Path) -> None:
    values = run_json("bench", tiny, "--peers", "torch", "--trials", "1", "--seconds", "0.1")
    assert [row["bundle"] for row in values["rows"]] == ["torch", "tiny"]
    assert values["rows"][0]["engine"].startswith("torch")
    turned = run_json("bench", tiny, "--peers", "torch", "--baseline", "tiny", "--trials", "1", "--seconds", "0.1")
    assert turned["rows"][1]["speed_up"]["baseline"] == "tiny"


@pytest.mark.parametrize("peer", ["onnxruntime-int8", "nncf"])
def test_bench_calibrates_quantized_peers(peer: str, tiny: Path, few: Path) -> None:
    quick = ("--trials", "1", "--seconds", "0.1")
    said = error("bench", tiny, "--peers", peer, *quick)
    if "pip install" in said:
        pytest.skip(said)
    assert "--calibration-images" in said
    assert "no such folder" in error("bench", tiny, "--peers", peer, "--calibration-images", few / "absent", *quick)
    calibration = ("--calibration-images", few, "--calibration-size", "4")
    rows = run_json("bench", tiny, "--peers", peer, *calibration, *quick)["rows"]
    assert [row["bundle"] for row in rows] == [peer, "tiny"]
    assert 0 < rows[0]["size_bytes"] < 0.65 * rows[1]["size_bytes"]  # a quarter of the weights, and the text of a graph
    assert rows[0]["engine"].startswith("onnxruntime" if peer.startswith("onnxruntime") else "openvino")


def test_bench_keeps_the_files_of_peers_in_a_new_folder(tiny: Path, tmp_path: Path) -> None:
    quick = ("--trials", "1", "--seconds", "0.1")
    (tmp_path / "mine.txt").touch()
    assert "is not empty" in error("bench", tiny, "--keep-peers", tmp_path, *quick)
    kept = tmp_path / "new" / "kept"
    pytest.importorskip("onnxscript")
    shown = run("bench", tiny, "--peers", "onnxruntime", "--keep-peers", kept, *quick)
    assert (kept / "plain.onnx").exists()
    assert "files of the peers" in shown.stderr


def test_bench_says_when_calibration_images_serve_no_peer(tiny: Path, few: Path) -> None:
    shown = run("bench", tiny, "--calibration-images", few, "--trials", "1", "--seconds", "0.1")
    assert "--calibration-images was not used" in " ".join(shown.stderr.split())


def test_inspect_shows_the_program(merged: Path) -> None:
    listing = run("inspect", merged, "--program")
    assert "%0 = input pixel_values" in listing.stdout
    assert "merge_rows(" in listing.stdout
    program = program_from_dict(run_json("inspect", merged, "--program"))
    assert str(program).strip() == listing.stdout.strip()
    assert attention_of(program, 0)


def test_inspect_prints_the_documented_fields(merged: Path) -> None:
    values = run_json("inspect", merged)
    assert {"recipe", "target", "tokens", "macs", "size_bytes", "origin"} <= set(values)
    assert values["origin"]["source"] == "demo"
    assert "demo" in run("inspect", merged).stdout


def test_cache_says_what_is_kept_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_packages: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(broken_packages))  # doctor imports none of them then, which takes seconds
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path))
    assert run_json("cache") == {
        "folder": str(tmp_path),
        "bytes": 0,
        "limit_bytes": 8_000_000_000,
        "freed_bytes": 0,
        "kinds": {},
    }
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / f"{'a' * 64}.safetensors").write_bytes(b"x" * 3_000_000)
    shown = run("cache").stdout
    assert "reference" in shown
    assert "3.0" in shown
    held = run_json("doctor")["cache_bytes"]
    assert 0 <= held - 3_000_000 < 100, "and what doctor itself measured and kept"
    cleared = run_json("cache", "--clear")
    assert (cleared["freed_bytes"], cleared["bytes"]) == (held, 0)
    monkeypatch.setenv("VITFOLD_CACHE_GB", "much")
    assert "VITFOLD_CACHE_GB='much' is no number of gigabytes" in error("cache")


def test_doctor_says_what_is_there(monkeypatch: pytest.MonkeyPatch, broken_packages: Path) -> None:
    values = run_json("doctor")
    assert values["environment"]["cores"] >= 1
    packages = {part["package"]: part for part in values["packages"]}
    assert {"onnxruntime", "torch", "openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13"} <= set(packages)
    assert packages["onnxruntime"]["problem"] is None
    monkeypatch.setenv("PYTHONPATH", str(broken_packages))
    shown = "".join(run("doctor").stdout.split())
    assert "OSError" in shown
    assert "vitfold[peers]" in shown


def test_doctor_names_the_extra_of_what_is_missing() -> None:
    rows = doctor.package_rows(lambda package: None, lambda modules: {})
    assert {part["problem"] for part in rows} == {"not installed"}
    cures = {part["package"]: part["cure"] for part in rows}
    assert cures["tensorrt"] == "pip install -U 'vitfold[tensorrt]'"
    assert cures["tensorrt-rtx-cu13"] == "pip install -U 'vitfold[audit]'"


def test_doctor_finds_tensorrt_under_the_name_of_a_cuda_version() -> None:
    installed = {"tensorrt-cu12": "10.8"}.get
    assert doctor._version("tensorrt", installed) == "10.8"
    assert doctor._version("onnxruntime", installed) is None


def test_a_file_with_an_architecture(folder: Path, few: Path) -> None:
    out = folder / "file.fold"
    source = (DEMO / "model.safetensors", "--arch", "vit_small_patch14_dinov2", "--num-classes", "10")
    values = run_json("optimize", *source, "--image-size", "112", "-o", out, "--merge", "1")
    assert values["tokens"][:2] == [65, 64]


# Mistakes.


def test_usage_errors_exit_with_two(merged: Path) -> None:
    assert "Invalid value for -o: give -o OUT.fold" in error("optimize", "demo", code=2)
    both = ("-o", "x.fold", "--merge", "2", "--recipe", "r.toml")
    assert "Invalid value for --recipe: give either --recipe or --merge" in error("optimize", "demo", *both, code=2)
    assert "Missing option '--images'" in error("evaluate", merged, code=2)
    assert "Invalid value for BUNDLE: give at least one bundle" in error("bench", code=2)
    assert "Missing argument 'IMAGE...'" in error("predict", merged, code=2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (("timm:vit_base_patch16_242", "--weights", "random"), "vit_base_patch16_224"),
        (("tim:vit_base_patch16_224",), "timm"),
        (("nosuchfile.safetensors", "--arch", "vit_tiny_patch16_224"), "nosuchfile"),
        (("timm:resnet18", "--weights", "random"), "no attention"),
    ],
)
def test_unknown_models_offer_what_is_near(folder: Path, source: tuple[str, ...], expected: str) -> None:
    assert expected in error("optimize", *source, "-o", folder / "never.fold")
    assert not (folder / "never.fold").exists()


def test_weights_that_do_not_fit_name_the_key(folder: Path) -> None:
    state = load_file(DEMO / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "blocks.3.attn.qkv.bias"}, folder / "short.safetensors")
    options = ("--arch", "vit_small_patch14_dinov2", "--num-classes", "10", "--image-size", "112")
    assert "blocks.3.attn.qkv.bias" in error(
        "optimize", folder / "short.safetensors", *options, "-o", folder / "never.fold"
    )
    state["blocks.2.mlp.fc1.weight"][3, 5] = np.nan
    save_file(state, folder / "nan.safetensors")
    said = error("optimize", folder / "nan.safetensors", *options, "-o", folder / "never.fold")
    assert "blocks.2.mlp.fc1.weight" in said
    assert "NaN" in said
    (folder / "cut.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes()[:100_000])
    assert "cut.safetensors" in error("optimize", folder / "cut.safetensors", *options, "-o", folder / "never.fold")


@pytest.mark.parametrize(
    ("merge", "expected"),
    [("40", "block 0"), ("2,2,2,2,2,2", "block 1"), ("eight", "eight"), ("2:-3", "-1"), ("-1", "-1")],
)
def test_schedules_that_do_not_fit_name_the_block(folder: Path, merge: str, expected: str) -> None:
    assert expected in error("optimize", *RANDOM, "-o", folder / "never.fold", f"--merge={merge}")


def test_unknown_targets_and_peers_offer_the_nearest(folder: Path, tiny: Path) -> None:
    assert "portable" in error("optimize", "demo", "-o", folder / "never.fold", "--target", "portabel")
    assert "torch-compile" in error("bench", tiny, "--peers", "torch-compil")
    assert "tiny" in error("bench", tiny, "--trials", "1", "--seconds", "0.1", "--baseline", "tyni")


def test_bad_images_are_named_and_skipped_only_on_request(few: Path, small: tuple[str, ...], folder: Path) -> None:
    mixed, path = folder / "mixed", folder / "bad.fold"
    mixed.mkdir()
    good = sorted(few.glob("*/*.jpg"))[:4]
    for image in good:
        (mixed / image.name.replace(".jpg", f"-{image.parent.name}.jpg")).write_bytes(image.read_bytes())
    (mixed / "broken.jpg").write_bytes(good[0].read_bytes()[:300])
    (mixed / "text.png").write_text("no image")
    readable = len({image.name for image in mixed.iterdir()}) - 2
    assert "--skip-bad" in error("optimize", *small, "-o", path, "--images", mixed)
    assert not path.exists()
    made = run("optimize", *small, "-o", path, "--images", mixed, "--skip-bad", "--json")
    assert json.loads(made.stdout)["fidelity"]["images"] == readable
    assert "skipped" in made.stderr
    assert "text.png" in made.stderr
    said = error("evaluate", path, "--images", mixed)
    assert "broken.jpg" in said
    assert "--skip-bad" in said
    values = run_json("evaluate", path, "--images", mixed, "--skip-bad")
    assert values["images"] == readable
    assert len(values["skipped"]) == 2
    assert "broken.jpg" in error("predict", path, mixed / "broken.jpg")
    timed = run_json("bench", path, "--images", mixed, "--skip-bad", "--trials", "1", "--seconds", "0.1")
    assert timed["rows"][0]["fidelity"]["images"] == readable


def test_folders_without_images_say_so(merged: Path, folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "no images" in error("evaluate", merged, "--images", folder / "empty")
    assert "no such folder" in error("evaluate", merged, "--images", folder / "absent")


def test_class_folders_that_do_not_fit_say_so(merged: Path, folder: Path) -> None:
    (folder / "classes" / "zebra").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "classes" / "zebra" / "a.png")
    assert "zebra" in error("evaluate", merged, "--images", folder / "classes")


def test_a_damaged_bundle_is_refused_everywhere(tiny: Path, folder: Path) -> None:
    import shutil

    broken = folder / "broken.fold"
    shutil.copytree(tiny, broken)
    content = bytearray((broken / "model.onnx").read_bytes())
    content[-100] ^= 1
    (broken / "model.onnx").write_bytes(content)
    for arguments in (("inspect", broken), ("bench", broken), ("predict", broken, DEMO / "images")):
        assert "damaged" in error(*arguments)


def test_an_existing_bundle_is_kept_unless_told(tiny: Path) -> None:
    before = run_json("inspect", tiny)["digest"]
    assert "--overwrite" in error("optimize", *RANDOM, "-o", tiny, "--merge", "1")
    assert run_json("inspect", tiny)["digest"] == before


def test_interrupting_leaves_no_half_written_bundle(tmp_path: Path) -> None:
    # A shell ignores the signal for what it runs in the background, and children inherit that.
    heeding = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from vitfold.cli import main; main()"
    )
    command = [sys.executable, "-c", heeding, "optimize", "demo", "-o", str(tmp_path / "a.fold"), "--merge", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if any(tmp_path.iterdir()):  # the partial folder is there: emission has begun
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [(), ("diffusion",), *((name,) for name in COMMANDS), *(("diffusion", name) for name in DIFFUSION)],
    ids=" ".join,
)
def test_help_fits_a_screen(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert len(done.stdout.rstrip().splitlines()) <= 40


def test_help_needs_no_torch(broken_packages: Path) -> None:
    script = (
        "import contextlib, io, os, sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'timm', 'onnx_ir', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vitfold.cli import main\n"
        f"os.environ['PYTHONPATH'] = {str(broken_packages)!r}\n"
        "for arguments in (['--help'], ['optimize', '--help'], ['--version'], ['doctor', '--json']):\n"
        "    sys.argv = ['vitfold', *arguments]\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as shown:\n"
        "        try:\n"
        "            main()\n"
        "        except SystemExit as left:\n"
        "            assert not left.code, (arguments, left.code)\n"
        "    assert shown.getvalue().strip(), arguments\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
