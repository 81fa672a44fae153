"""Where Diffusion Transformers come from: folders of diffusers, state dicts of DiT's own, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusing import build_module, write_folder
from vitfold.architectures.dit import dit
from vitfold.errors import SourceError
from vitfold.model.dit import class_rows, timestep_embedding
from vitfold.ops.run import Run
from vitfold.sources.dit import load_dit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("dit"))


def test_a_folder_of_a_pipeline_or_of_a_transformer(folder: Path, tmp_path: Path) -> None:
    first = load_dit(f"hf:{folder}")
    flat = tmp_path / "flat"
    build_module().half().save_pretrained(flat)
    (flat / "scheduler").symlink_to(folder / "scheduler")
    second = load_dit(f"hf:{flat}")
    assert first.spec == second.spec
    assert first.schedule["prediction_type"] == "v_prediction"
    assert (first.latent, first.decoder, first.origin.source) == (False, None, f"hf:{folder.resolve()}")
    for name, array in first.params.items():
        np.testing.assert_allclose(array, second.params[name], atol=1e-3)


def test_labels_and_latents_of_a_pipeline(folder: Path, tmp_path: Path) -> None:
    index = {"id2label": {"2": "dress", "0": "shirt", "1": "bag"}, "vae": ["diffusers", "AutoencoderKL"]}
    for name in ("transformer", "scheduler"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    model = load_dit(f"hf:{tmp_path}")
    assert (model.labels, model.latent, model.decoder) == (("shirt", "bag", "dress"), True, None)


def facebook_state(module: Any) -> dict[str, Any]:
    """The weights of a diffusers module whose blocks share their embedders, under the names of DiT's repository."""
    import torch

    state = module.state_dict()
    first = "transformer_blocks.0.norm1.emb"
    renamed = {
        "pos_embed": module.pos_embed.pos_embed,
        "t_embedder.mlp.0": f"{first}.timestep_embedder.linear_1",
        "t_embedder.mlp.2": f"{first}.timestep_embedder.linear_2",
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.linear": "proj_out_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
    }
    found = {"pos_embed": renamed.pop("pos_embed")}
    for i in range(len(module.transformer_blocks)):
        there = f"transformer_blocks.{i}"
        renamed[f"blocks.{i}.adaLN_modulation.1"] = f"{there}.norm1.linear"
        renamed[f"blocks.{i}.attn.proj"] = f"{there}.attn1.to_out.0"
        renamed[f"blocks.{i}.mlp.fc1"] = f"{there}.ff.net.0.proj"
        renamed[f"blocks.{i}.mlp.fc2"] = f"{there}.ff.net.2"
        for end in ("weight", "bias"):
            rows = [state[f"{there}.attn1.to_{part}.{end}"] for part in "qkv"]
            found[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(rows)
    found |= {f"{to}.{end}": state[f"{of}.{end}"] for to, of in renamed.items() for end in ("weight", "bias")}
    found["y_embedder.embedding_table.weight"] = state[f"{first}.class_embedder.embedding_table.weight"]
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("form", ["model.pt", "model.safetensors"])
def test_a_state_dict_of_the_original_repository(form: str, tmp_path: Path) -> None:
    """Oracle: diffusers' module with tied embedders, one epsilon and the timesteps of the original repository."""
    import torch
    from safetensors.torch import save_file

    module = build_module(in_channels=3, out_channels=6, norm_eps=1e-6)
    for block in module.transformer_blocks:
        block.norm1.emb = module.transformer_blocks[0].norm1.emb
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    state, path = facebook_state(module), tmp_path / form
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"ema": state, "opt": 3}, path)
    model = load_dit(str(path), heads=4)
    spec = model.spec
    assert (spec.condition, spec.freq_shift, spec.learned_sigma, spec.classes) == ("shared", 0, True, 3)
    assert model.schedule["beta_schedule"] == "linear"
    image = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    timesteps, labels = np.array([0, 437, 999]), np.array([0, 2, 3])
    with torch.inference_mode():
        (expected,) = module(image, torch.from_numpy(timesteps), torch.from_numpy(labels), return_dict=False)
        t_freq, rows = (
            torch.from_numpy(timestep_embedding(spec, timesteps)),
            torch.from_numpy(class_rows(spec, labels)),
        )
        found = dit(Run(model.params), spec, image, t_freq, rows)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def changed_config(folder: Path, to: Path, **values: Any) -> Path:
    """A copy of the folder by links, with another config."""
    (to / "transformer").mkdir(parents=True)
    (to / "scheduler").symlink_to(folder / "scheduler")
    name = "diffusion_pytorch_model.safetensors"
    (to / "transformer" / name).symlink_to(folder / "transformer" / name)
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    (to / "transformer" / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
    return to


def test_folders_that_are_refused(folder: Path, tmp_path: Path) -> None:
    other = changed_config(folder, tmp_path / "other", _class_name="PixArtTransformer2DModel")
    with pytest.raises(SourceError, match="the transformer 'PixArtTransformer2DModel'"):
        load_dit(f"hf:{other}")
    with pytest.raises(SourceError, match=r"there is no folder .*nowhere"):
        load_dit(f"hf:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        load_dit(f"hf:{tmp_path}/empty")
    with pytest.raises(SourceError, match=r"write hf:"):
        load_dit(str(folder))
    (other / "transformer" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be read as JSON"):
        load_dit(f"hf:{other}")
    unscheduled = changed_config(folder, tmp_path / "unscheduled")
    (unscheduled / "scheduler").unlink()
    with pytest.raises(SourceError, match="noise schedule"):
        load_dit(f"hf:{unscheduled}")
    (unscheduled / "scheduler").symlink_to(folder / "scheduler")
    (unscheduled / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(SourceError, match="diffusers cannot read"):
        load_dit(f"hf:{unscheduled}")


def test_other_commands_say_what_draws(folder: Path, tmp_path: Path) -> None:
    from vitfold.sources import load_source

    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    for found in (tmp_path, folder / "transformer"):
        with pytest.raises(SourceError, match="vitfold diffusion sample hf:"):
            load_source(f"hf:{found}")


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    import torch

    module = build_module()
    with torch.no_grad():
        module.proj_out_2.weight[0, 0] = float("nan")
    module.save_pretrained(tmp_path / "transformer")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match=r"weight head\.proj\.weight holds 1 values that are NaN or infinite"):
        load_dit(f"hf:{tmp_path}")


class Evil:
    """What a pickle could hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("opened"),))


def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    state = facebook_state(build_module())
    cases: dict[str, tuple[Any, str]] = {
        "evil.pt": (Evil(), "cannot be read as weights alone"),
        "list.pt": ([1, 2], "is no state dict"),
        "other.pt": ({"conv.weight": torch.zeros(3)}, "holds no weight 'x_embedder.proj.weight'"),
        "more.pt": ({**state, "extra": torch.zeros(3)}, "does not know: extra"),
        "flat.pt": ({**state, "pos_embed": torch.zeros(3)}, "where 3 axes belong"),
    }
    for name, (held, said) in cases.items():
        torch.save(held, name)
        with pytest.raises(SourceError, match=said):
            load_dit(name, heads=4)
    assert not Path("opened").exists()
    torch.save(state, "narrow.pt")
    with pytest.raises(SourceError, match="width 32 is none of the published ones.*--heads"):
        load_dit("narrow.pt")
    Path("short.safetensors").write_bytes(b"123")
    with pytest.raises(SourceError, match="cannot be read as weights alone"):
        load_dit("short.safetensors")
    for source, said in (("gone.pt", "there is no file"), ("timm:vit", "names no Diffusion Transformer")):
        with pytest.raises(SourceError, match=said):
            load_dit(source)


def test_the_demo_where_it_is_and_where_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_DEMO_DIT", str(folder))
    assert load_dit("demo-dit").origin.source == "demo-dit"
    with pytest.raises(SourceError, match="--heads 4 belongs to a file"):
        load_dit("demo-dit", heads=4)
    monkeypatch.setenv("VITFOLD_DEMO_DIT", str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"train it with examples/train_demo_dit\.py"):
        load_dit("demo-dit")
