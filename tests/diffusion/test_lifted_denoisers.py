"""Transformers of text pipelines as bundles: the pipeline's own latents, with all steps and with a plan."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipelining import tiny_pipe, tiny_vae
from vitfold.artifacts.bundle import open_bundle
from vitfold.artifacts.steps import SamplingPlan
from vitfold.audit.audit import audit_graph
from vitfold.diffusion import every_step, find_method
from vitfold.diffusion.compare import SamplingConfig, check_asked, draw
from vitfold.diffusion.compression import compress, network_of_step, states_along
from vitfold.diffusion.conditions import Prompts, load_prompts
from vitfold.diffusion.decoding import lift_decoder, open_decoder, write_decoder
from vitfold.diffusion.denoiser_parts import inner_layers
from vitfold.diffusion.exporting import decoded_latents, export_steps
from vitfold.diffusion.lifting import embed_prompts, lift_pipeline
from vitfold.diffusion.opening import find_step_target, method_of, open_steps
from vitfold.diffusion.pipelines import StepPlan, accelerate, plan_steps, restore
from vitfold.diffusion.sampling import pack
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.writing import save_steps
from vitfold.errors import (
    BundleError,
    EngineError,
    ParityError,
    RecipeError,
    SourceError,
    TargetError,
    UnsupportedError,
)
from vitfold.model import Array, DenoiserModel, DenoiserSpec, Origin
from vitfold.model.denoiser import denoiser_spec_from_dict, denoiser_spec_to_dict
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.program import program_from_dict

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
STEPS, FULL = 10, 5
TOLERANCE = 1e-4
ORIGIN = Origin(source="tests:pipe", loader="tests", arguments={})


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A pipeline with its plan, and the bundle of both."""

    pipe: Any
    prompts: list[dict[str, Any]]
    call: dict[str, Any]
    plan: StepPlan
    path: Path
    bank: Prompts


VAES = {"pixart": (4, None), "flux": (1, 0.3)}
"""Channels of latents in front of packing, and what is added to them."""


@pytest.fixture(scope="module", params=["pixart", "sd3", "flux"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pipe, prompts, call = tiny_pipe(request.param, tiny_vae(*VAES[request.param]) if request.param in VAES else None)
    if request.param == "flux":
        pipe.scheduler = type(pipe.scheduler)(use_dynamic_shifting=True)
    plan = plan_steps(pipe, prompts[:2], steps=STEPS, full=FULL, seeds=1, **call)
    path = tmp_path_factory.mktemp("bundle") / "fast.fold"
    export_steps(pipe, plan, prompts, path, **_sizes(call))
    return Exported(
        pipe=pipe, prompts=prompts, call=call, plan=plan, path=path, bank=embed_prompts(pipe, prompts, **call)
    )


def _sizes(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "output_type"}


def _drawn(exported: Exported, label: int, seed: int, *, rests: bool) -> Array:
    steps = open_bundle(exported.path, steps=True).manifest.steps
    asked = SamplingConfig(
        labels=(label,),
        seed=seed,
        steps=STEPS,
        sampler=steps.plan.sampler,
        guidance=steps.plan.guidance,
        batch=1,
        conditions=exported.bank,
    )
    method = method_of(steps)
    with open_steps(open_bundle(exported.path, steps=True)) as session:
        return draw(steps, session, method if rests else every_step(method), asked).samples


def _expected(exported: Exported, label: int, seed: int, kind: str = "latent") -> Array:
    given = {**exported.call, **exported.prompts[label], "num_inference_steps": STEPS, "output_type": kind}
    made = exported.pipe(**given, generator=torch.Generator().manual_seed(seed))[0]
    return np.asarray(made)


def _apart(a: Array, b: Array) -> float:
    return float(np.abs(a - b).max() / np.abs(a).max())


def test_all_steps_are_the_pipelines_own(exported: Exported) -> None:
    restore(exported.pipe)
    assert _apart(_expected(exported, 2, 5), _drawn(exported, 2, 5, rests=False)) < TOLERANCE


def test_a_plan_draws_what_it_draws_in_the_pipeline(exported: Exported) -> None:
    every = _expected(exported, 1, 7)
    accelerate(exported.pipe, exported.plan)
    try:
        planned = _expected(exported, 1, 7)
    finally:
        restore(exported.pipe)
    found = _drawn(exported, 1, 7, rests=True)
    assert _apart(planned, found) < TOLERANCE
    assert _apart(every, found) > 2 * _apart(planned, found)  # steps did rest


def test_prompts_and_seeds_decide(exported: Exported) -> None:
    first = _drawn(exported, 0, 0, rests=True)
    assert _apart(first, _drawn(exported, 3, 0, rests=True)) > TOLERANCE
    assert _apart(first, _drawn(exported, 0, 1, rests=True)) > 0.1


def test_images_are_the_pipelines_own_and_need_no_folder(exported: Exported) -> None:
    bundle = open_bundle(exported.path, steps=True)
    if exported.pipe.vae is None:
        assert (bundle.manifest.steps.decode, bundle.decode_bytes) == (None, 0)
        with pytest.raises(SourceError, match="--latents"):
            open_decoder(bundle)
        return
    restore(exported.pipe)
    decode = open_decoder(bundle)
    images = np.concatenate([_expected(exported, label, 3, "np") for label in (1, 2)])
    latents = np.concatenate([_drawn(exported, label, 3, rests=False) for label in (1, 2)])
    assert np.abs(np.moveaxis(images, -1, 1) - decode(latents)).max() < TOLERANCE
    assert bundle.manifest.steps.decoder is None
    assert bundle.decode_bytes > 0


def test_a_decoder_that_the_pipeline_does_not_use_so_is_refused() -> None:
    for name, adds in (("pixart", False), ("sd3", True)):
        pipe, prompts, call = tiny_pipe(name, tiny_vae(shift=0.5))
        given = {**_sizes(call), **prompts[0], "num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
        if adds:
            assert decoded_latents(pipe, given)[0].shape == (1, 4, 8, 8)
            continue
        with pytest.raises(UnsupportedError, match="--no-vae"):
            decoded_latents(pipe, given)


def test_a_decoder_without_attention_and_a_damaged_one(exported: Exported, tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3].tanh()

    decoder = lift_decoder(Twice(), (4, 8, 8))
    assert write_decoder(decoder, tmp_path).image_shape == (3, 16, 16)
    with pytest.raises(ParityError, match="--no-vae"):
        write_decoder(replace(decoder, module=torch.nn.Identity()), tmp_path)
    copy = tmp_path / "copy.fold"
    shutil.copytree(exported.path, copy)
    values = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    decode = {"image_shape": [3, 16, 16], "relative_error": 0.0}
    wrong = [{**decode, "image_shape": [3, 16]}, {**decode, "relative_error": -1.0}, "yes"]
    for one in [*wrong, *([] if "decode" in values else [decode])]:  # whose graph is not there
        (copy / "manifest.json").write_text(json.dumps({**values, "decode": one}), encoding="utf-8")
        with pytest.raises(BundleError):
            open_bundle(copy, steps=True)


@pytest.fixture(scope="module")
def lifted() -> tuple[DenoiserModel, Prompts]:
    pipe, prompts, call = tiny_pipe("sd3")
    return lift_pipeline(pipe, prompts[0], origin=ORIGIN, **_sizes(call)), embed_prompts(pipe, prompts, **call)


@pytest.mark.parametrize("method", ["gptq", "minmax", "smooth", "vitfold"])
def test_a_lifted_denoiser_takes_methods_of_quantization(lifted: tuple[DenoiserModel, Prompts], method: str) -> None:
    model, bank = lifted
    how = {"steps": 4, "guidance": 3.0, "sampler": "flow-euler", "conditions": bank}
    found = compress(model, quant="w8a8", method=method, **how)
    layers = {site.removesuffix(".w") for site in found.quantizers or {} if site.endswith(".w")}
    assert layers == inner_layers(model)
    assert found.params is not None
    network, states = network_of_step(model, 0), states_along(model, 24, r=0, seed=5, **how)
    (one,) = states.batches(24)
    with torch.inference_mode():
        exact = network.run(Run(model.params), one.inputs)
        rounded = network.run(Simulate(found.params, found.quantizers or {}), one.inputs)
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("name", ["tensorrt-fp16", "tensorrt-int8"])
def test_steps_are_written_for_tensorrt(lifted: tuple[DenoiserModel, Prompts], name: str, tmp_path: Path) -> None:
    model, bank = lifted
    target, method = find_step_target(name), find_method("stack:2")
    how = {"steps": 4, "guidance": 3.0, "sampler": "flow-euler"}
    compression = compress(model, quant=target.implied_quant, target=target, conditions=bank, **how)
    plan = SamplingPlan(reuse=method.text, **how, **compression.to_dict())
    bundle = save_steps(model, plan, method, compression, tmp_path / "a.fold", conditions=bank, target=target)
    steps, verified = bundle.manifest.steps, bundle.manifest.verified
    assert bundle.manifest.target == {"name": name, "engine": "tensorrt"}
    assert steps.fidelity is not None
    assert 30 < (steps.fidelity.psnr_db or 0) < 120
    assert 0 < verified["largest_value"] < 65504
    types = {value.type.tensor_type.elem_type for value in onnx.load(bundle.graphs["full"]).graph.output}
    assert types == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT16 in {one.data_type for one in onnx.load(bundle.graphs["full"]).graph.initializer}
    with pytest.raises(EngineError, match=r"build full.onnx and resume.onnx by trtexec"):
        open_steps(bundle)
    with open_steps(bundle, engine="onnxruntime") as session:
        assert set(session.parts) == {"full", "resume"}
    pytest.importorskip("tensorrt_rtx", reason="NVIDIA's compiler is not installed")
    compiled = [audit_graph(path, gpu="sm86", batch=2) for path in bundle.graphs.values()]
    assert all(one.kernels and not one.to_dict()["not_understood"] for one in compiled)


def test_steps_are_not_written_for_every_target() -> None:
    for name in ("torch", "openvino", "tensorrt-fp8", "simulation"):
        with pytest.raises(TargetError, match=f"not written for {name}; they are for cpu, cpu-amx"):
            find_step_target(name)


def test_layers_of_tokens_that_met_the_image_are_quantized(lifted: tuple[DenoiserModel, Prompts]) -> None:
    """Of SD3's dual blocks: six of the image and, behind the first attention, of the text; the last has no text MLP."""
    model, _ = lifted
    program, inner = program_from_dict(json.loads(model.program)), inner_layers(model)
    rows = [program.shapes[node.source][1] for node in program.nodes if node.site in inner]
    assert sorted(set(rows)) == [5, 16]
    assert rows.count(16) == 3 * 6
    assert rows.count(5) == 3 + 6 + 3
    with pytest.raises(RecipeError, match="--merge 2 is out of range"):
        compress(model, r=2)


def test_embeddings_go_through_a_file(exported: Exported, tmp_path: Path) -> None:
    spec = open_bundle(exported.path, steps=True).manifest.steps.spec
    assert isinstance(spec, DenoiserSpec)
    path = exported.bank.save(tmp_path / "prompts.safetensors")
    found = load_prompts(path, spec)
    assert found.names == exported.bank.names
    assert found.time_scale == exported.bank.time_scale
    for name, rows in exported.bank.given.items():
        assert np.array_equal(found.given[name], rows)
    assert set(found.negative) == set(exported.bank.negative)
    for name, rows in exported.bank.negative.items():
        assert np.array_equal(found.negative[name], rows)
    with pytest.raises(RecipeError, match="holds no embeddings"):
        load_prompts(exported.path / "manifest.json", spec)


def test_embeddings_of_another_model_are_refused(exported: Exported) -> None:
    steps = open_bundle(exported.path, steps=True).manifest.steps
    asked = SamplingConfig(
        labels=(0,),
        seed=0,
        steps=STEPS,
        sampler=steps.plan.sampler,
        guidance=steps.plan.guidance,
        batch=1,
        conditions=exported.bank,
    )
    check_asked(steps, asked)
    shorter = {name: rows[:, :-1] for name, rows in exported.bank.given.items()}
    with pytest.raises(RecipeError, match="of shape"):
        check_asked(steps, replace(asked, conditions=replace(exported.bank, given=shorter, negative={})))
    with pytest.raises(RecipeError, match="negative embeddings"):
        check_asked(steps, replace(asked, guidance=3.0, conditions=replace(exported.bank, negative={})))
    with pytest.raises(RecipeError, match="--embeddings"):
        check_asked(steps, replace(asked, conditions=None))
    with pytest.raises(RecipeError, match="prompt 4 is out of range"):
        check_asked(steps, replace(asked, labels=(4,)))


def test_a_plan_belongs_to_its_weights_and_guidance(exported: Exported, tmp_path: Path) -> None:
    sizes = _sizes(exported.call)
    other = replace(exported.plan, weights="0" * 64)
    with pytest.raises(RecipeError, match="other weights"):
        export_steps(exported.pipe, other, exported.prompts, tmp_path / "no.fold", **sizes)
    with pytest.raises(RecipeError, match="guidance_scale = 9"):
        export_steps(
            exported.pipe, exported.plan, exported.prompts, tmp_path / "no.fold", **{**sizes, "guidance_scale": 9}
        )
    with pytest.raises(RecipeError, match="cut around all blocks"):
        export_steps(exported.pipe, "first-block:0.1", exported.prompts, tmp_path / "no.fold", steps=9, **sizes)
    assert not list(tmp_path.iterdir())


def test_a_damaged_spec_is_refused(exported: Exported, tmp_path: Path) -> None:
    copy = tmp_path / "copy.fold"
    shutil.copytree(exported.path, copy)
    values = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    for change in (
        {"image_shape": [4, 8, 8, 8]},
        {"packing": [[2, 3], [4, 1]]},
        {"conditions": [{"name": "image", "shape": [2]}]},
        {"later": 1},
    ):
        damaged = {**values, "spec": {**values["spec"], **change}}
        (copy / "manifest.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(BundleError):
            open_bundle(copy, steps=True)
    whole = {"of": "latents", "images": 4, "seed": 7, "psnr_db": 40.0}
    (copy / "manifest.json").write_text(json.dumps({**values, "fidelity": whole}), encoding="utf-8")
    fidelity = open_bundle(copy, steps=True).manifest.steps.fidelity
    assert fidelity is not None
    assert fidelity.to_dict() == whole
    for change in ({"of": "sketches"}, {"images": 0}, {"psnr_db": "high"}):
        damaged = {**values, "fidelity": {**whole, **change}}
        (copy / "manifest.json").write_text(json.dumps(damaged), encoding="utf-8")
        with pytest.raises(BundleError):
            open_bundle(copy, steps=True)


def test_samplers_go_with_schedules_of_their_kind() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert len(build_scheduler("flow-euler", flow, 5).timesteps) == 5
    for sampler, schedule in (("flow-euler", {"beta_schedule": "linear"}), ("ddim", flow)):
        with pytest.raises(RecipeError, match="does not go with this model's schedule"):
            build_scheduler(sampler, schedule, 5)
    with pytest.raises(SourceError, match="use_dynamic_shifting"):
        build_scheduler("flow-euler", {**flow, "use_dynamic_shifting": True}, 5)


def test_packed_latents_have_one_order() -> None:
    spec = DenoiserSpec(
        module="Packed",
        image_shape=(6, 8),
        outputs=8,
        tokens=6,
        embed_dim=4,
        num_layers=1,
        conditions=(),
        packing=((2, 12), (3, 2), (2, 24), (2, 6), (2, 1)),
    )
    drawn = torch.arange(48.0)
    expected = drawn.reshape(2, 2, 2, 3, 2).permute(1, 3, 0, 2, 4).reshape(6, 8)  # channels, rows, 2, columns, 2
    assert torch.equal(pack(drawn, spec), expected)
    assert denoiser_spec_from_dict(json.loads(json.dumps(denoiser_spec_to_dict(spec)))) == spec
    wrong: list[dict[str, Any]] = [
        {"packing": ()},
        {"packing": ((2, 12), (3, 2), (2, 24), (2, 6))},
        {"packing": ((2, 12), (3, 2), (2, 24), (2, 6), (2, 2))},
    ]
    for change in wrong:
        with pytest.raises(SourceError, match="which is no order"):
            replace(spec, **change)
    with pytest.raises(SourceError, match="not packed"):
        replace(spec, outputs=16)


def test_what_a_scheduler_is_told_is_followed_or_refused() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    own.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=0.8)
    made = build_scheduler("flow-euler", {**flow, "_mu": 0.8, "_sigmas": "even"}, 7)
    assert torch.equal(made.sigmas, own.sigmas)
    pipe, prompts, call = tiny_pipe("flux")
    with pytest.raises(UnsupportedError, match="sigmas of its own"):
        lift_pipeline(pipe, prompts[0], origin=ORIGIN, sigmas=[1.0, 0.9, 0.1], **_sizes(call))


@pytest.mark.parametrize(("name", "said"), [("wan", "2 transformers"), ("cogvideox", r"no latents of \(batch")])
def test_pipelines_of_frames_are_refused_by_what_is_missing(name: str, said: str) -> None:
    pipe, prompts, call = tiny_pipe(name)
    with pytest.raises(UnsupportedError, match=said):
        embed_prompts(pipe, prompts, **call)
