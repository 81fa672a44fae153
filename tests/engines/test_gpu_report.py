"""The report on a GPU, on the CPU: whatever does not need one to fail is found here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitfold.gpu import checks, report, samplers, speed, study
from vitfold.gpu.children import Children
from vitfold.gpu.kernels import kind_of
from vitfold.gpu.report import Ready, Report, Study, Subject

ROOT = Path(__file__).parents[2]
ABSENT = "openvino diffusers open_clip nncf onnxscript tensorrt tensorrt_rtx cuda plotly torchao"


@pytest.mark.slow
def test_every_section_writes_its_file_on_a_bare_machine(tmp_path: Path) -> None:
    """With what a machine with a GPU has: other packages cannot be imported."""
    (tmp_path / "site").mkdir()
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in ABSENT.split())]
    (tmp_path / "site" / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "vitfold.gpu", "--device", "cpu", "--seconds", "1"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "results")],
        env={**os.environ, "PYTHONPATH": path, "VITFOLD_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").glob("gpu-*.json")}
    sections = ["accuracy", "contract", "dit", "end-to-end", "lengths", "profile", "vit-b16"]
    assert sorted(found) == [f"gpu-{name}" for name in sections]
    assert all(document["rows"] for document in found.values())
    assert found["gpu-contract"]["rows"][0]["passed"]
    assert found["gpu-accuracy"]["rows"][0]["from_cpu"] < 1e-4
    ends = {row["name"]: row for row in found["gpu-end-to-end"]["rows"]}
    subjects = ["torch-fp32", "torch-compile-fp16", "fp16-r8"]
    assert list(ends) == [
        *subjects,
        *(f"{name}, resized on the device" for name in subjects),
        "decoding alone",
        *(f"{name}, stream" for name in subjects),
    ]
    assert not [row for row in ends.values() if "error" in row]
    assert all(row["faster_than_torch-fp32"] for name, row in ends.items() if name != "decoding alone")
    products = {f"{layer}-{kind}" for layer in ("qkv", "proj", "fc1", "fc2") for kind in ("fp16", "int8", "fp8")}
    lengths = found["gpu-lengths"]["rows"]
    assert all({*row["ms"], *row.get("errors", ())} == products | {"attention-fp16"} for row in lengths)
    drawn = found["gpu-dit"]["rows"]
    assert [(row["name"], row["reuse"]) for row in drawn] == list(samplers.SAMPLERS)
    assert not [row for row in drawn if "error" in row]
    assert {row["weights"] for row in drawn[:3]} == {"the demo's weights"}
    assert 0 < drawn[1]["from_none"] < 1
    timed = {row["name"]: row for row in found["gpu-vit-b16"]["rows"]}
    assert not [row for row in timed.values() if "error" in row]
    assert {"torch-compile-fp16", "torch-fp32", "fp16-r8", "int8-r8", "int8-r8-max-autotune"} == set(timed)
    assert {row["batch"] for row in found["gpu-vit-b16"]["rows"]} == {1, 2}
    assert all(document["environment"]["torch_compile"] == "works" for document in found.values())
    assert set(found["gpu-vit-b16"]["blocks"]["schedules"]) == {"r0", "r8"}, "for `vitfold forecast --measured`"


@pytest.mark.slow
def test_where_nothing_compiles_the_rest_is_measured_and_every_file_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitfold.gpu", "--device", "cpu", "--seconds", "1"]
    done = subprocess.run(
        [*command, "--sections", "prepare,speed", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "CXX": "/absent/g++"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu-vit-b16.json").read_text())
    assert "InvalidCxxCompiler" in found["environment"]["torch_compile"]
    assert {row["how"] for row in found["rows"]} == {"eager"}
    assert "int8-r8" in {row["name"] for row in found["rows"]}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="no /proc")
def test_what_compiles_stops_while_something_is_timed() -> None:
    children = Children()
    children.start("absent", ["subject", "cpu", "", "/absent.onnx", "float32", "eager", 1])
    try:
        while not children._running:
            time.sleep(0.01)
        with children.paused():
            process = children._running["absent"]
            deadline = time.monotonic() + 20
            while (state := Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "T":
                assert time.monotonic() < deadline, state
            children.start("later", ["preflight", "cpu"])
            time.sleep(0.2)
            assert list(children._running) == ["absent"]
            assert children.said("absent") is children.said("later") is None
        children.wait(["absent"], 120.0)
        assert children.said("absent").startswith("exit 1: ")
        assert "/absent.onnx" in children.said("absent")
        assert children.said("never asked for") == ""
    finally:
        children.end()
    assert not children._running


def test_a_driver_that_hangs_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    properties = type(
        "Properties", (), {"name": "X", "major": 9, "minor": 0, "multi_processor_count": 1, "total_memory": 1}
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(report, "environment", dict)
    monkeypatch.setattr(subprocess, "run", hang)
    assert "TimeoutExpired" in report.gpu_environment(torch.device("cuda"))["nvidia_smi"]["said"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_tem_fused_addmm_gelu_view_3", "product"),
        ("triton_poi_fused__to_copy_add_addmm_clamp_mul_round_7", "fused elementwise"),
        ("triton_red_fused__to_copy_add_addmm_gelu_native_layer_norm_4", "fused elementwise"),
        ("triton_per_fused__int_mm_add_copy_native_layer_norm_view_12", "fused elementwise"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_transpose_6", "fused elementwise"),
        ("triton_per_fused_sort_21", "sort"),
        ("graph_0_cpp_fused__int_mm_add_gelu_view_5", "fused elementwise"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "product"),
        (
            "sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
            "product",
        ),
        ("sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x128x128_warpgroupsize1x1x1_kernel__5x_cublas", "product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_i16832gemm_s8_256x128_64x3_tn_align16>(Params)", "product"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __half, float, false, __half>(...)", "product"),
        ("ampere_sgemm_128x64_tn", "product"),
        ("void gemv2T_kernel_val<int, int, __half, __half, __half, float, 128, 16, 4, 4, false>(...)", "product"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)", "attention"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, cutlass::half_t>>",
            "attention",
        ),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x64x64_4x1x1", "attention"),
        ("void at::native::radixSortKVInPlace<-1, -1, 32, 4, float, long, unsigned int>(...)", "sort"),
        ("void at_cuda_detail::cub::DeviceSegmentedRadixSortKernel<Policy, false, float, long>(...)", "sort"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("Memset (Device)", "copy"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copy"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<unsigned int, 3, 128, 1>(...)", "copy"),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(...)",
            "single elementwise",
        ),
        ("void at::native::_scatter_gather_elementwise_kernel<128, 8, ReduceAdd>(...)", "single elementwise"),
        ("aten::_int_mm", "product"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("## Call CompiledFxGraph ##", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_the_demo_s_diffusion_transformer_needs_no_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    import numpy as np

    from vitfold.sources.dit import load_dit

    spec, params, weights = samplers.dit_of("demo-dit", small=False)
    loaded = load_dit("demo-dit")
    assert weights == "the demo's weights"
    assert spec == loaded.spec
    assert set(params) == set(loaded.params)
    assert all(np.array_equal(values, loaded.params[name]) for name, values in params.items())
    monkeypatch.setenv("VITFOLD_DEMO_DIT", "/absent")
    spec, params, weights = samplers.dit_of("demo-dit", small=False)
    assert (spec, weights) == (loaded.spec, "random weights")
    assert set(params) == set(loaded.params)


def test_what_is_not_compiled_in_time_is_timed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what took its own process along is not tried in this one."""

    def made_ready(_: Any, subject: Any, __: int) -> Any:
        if subject.name == "refused":
            raise ValueError("no such kernel")
        return Ready(subject, torch.nn.Identity(), lambda: None, "eager")

    said: dict[str, str | None] = {"slow@2": None, "fatal@2": "exit -11: ", "sick@2": "exit 1: CUDA error: misaligned"}
    children = Children()
    monkeypatch.setattr(children, "said", lambda name: said.get(name, ""))
    monkeypatch.setattr(speed, "made_ready", made_ready)
    monkeypatch.setattr(speed, "start_samplers", lambda _: None)
    names = ["torch-compile-fp16", "torch-fp32", "fp16-r0", "slow", "fatal", "sick", "refused"]
    subjects = [Subject(name, None, "float16") for name in names]
    planned = Study("", 2, (1,), subjects, 2, subjects[:1], {}, children)
    given = Report(tmp_path, torch.device("cpu"), time.monotonic() + 60, tmp_path, True, {}, study=planned)
    speed.speed(given)
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu-vit-b16.json").read_text())["rows"]}
    assert list(rows) == ["slow", "fatal", "sick", "refused", "torch-compile-fp16", "torch-fp32", "fp16-r0"]
    errors = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert errors == {
        "slow": speed.LATE,
        "fatal": "exit -11: ",
        "sick": "exit 1: CUDA error: misaligned",
        "refused": "ValueError: no such kernel",
    }
    said["slow@2"] = ""
    speed.late(given)
    rows = {row["name"]: row for row in json.loads((tmp_path / "gpu-vit-b16.json").read_text())["rows"]}
    assert list(rows) == ["fatal", "sick", "refused", "torch-compile-fp16", "torch-fp32", "fp16-r0", "slow"]
    assert rows["slow"]["faster_than_torch-fp32"]
    children.end()


def test_every_subject_that_fails_leaves_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(speed, "made_ready", fail)
    monkeypatch.setattr(speed, "start_samplers", lambda _: None)
    children = Children()
    planned = Study("", 2, (1,), [Subject("a", None, "float16")], 1, [], {}, children)
    speed.speed(Report(tmp_path, torch.device("cpu"), time.monotonic(), tmp_path, True, {}, study=planned))
    (row,) = json.loads((tmp_path / "gpu-vit-b16.json").read_text())["rows"]
    assert row["error"] == "RuntimeError: out of memory"
    children.end()


@pytest.mark.parametrize("here", [True, False])
def test_a_gpu_that_is_lent_to_one_process_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool
) -> None:
    def compile_a_line(_: str) -> None:
        if not here:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(Children, "start", lambda *_, **__: None)
    monkeypatch.setattr(Children, "said", lambda *_: "exit 1: all CUDA-capable devices are busy")
    monkeypatch.setattr(study, "study_of", lambda _, children: Study("", 2, (1,), [], 0, [], {}, children))
    monkeypatch.setattr(study, "compile_a_line", compile_a_line)
    given = Report(tmp_path, torch.device("cpu"), time.monotonic() + 60, tmp_path, True, {})
    study.prepare(given)
    assert given.compiles == here
    said = given.environment["torch_compile"]
    assert said == "works in this process alone: " * here + "exit 1: all CUDA-capable devices are busy"
    given.study.children.end()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--gpu-report", "DIR"], 1, "the report on the GPU is not whole"),
        (["--gpu-report", "DIR", "a.fold"], 2, "leave bundles out"),
        ([], 2, "give at least one bundle"),
    ],
)
def test_the_command_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    from typer.testing import CliRunner

    from vitfold.cli.app import app

    words = [str(tmp_path / "results") if word == "DIR" else word for word in arguments]
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == code
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "results").exists()


def test_a_package_without_a_checkout_says_where_the_contract_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    checks.contract(Report(tmp_path, torch.device("cpu"), time.monotonic() + 60, tmp_path, True, {}))
    (row,) = json.loads((tmp_path / "gpu-contract.json").read_text())["rows"]
    assert row["passed"] is None
    assert "run it from a checkout" in row["said"]
