"""Diffusion Transformers of diffusers: `DiTTransformer2DModel`, alone or within a pipeline's folder.

Differs from DiT's own repository: every block embeds timestep and class itself.
"""

# mypy: disable-error-code="no-untyped-call,attr-defined"
# (diffusers is typed in part)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitfold.architectures.dit import dit
from vitfold.errors import ParityError, SourceError
from vitfold.model import Array, DiTModel, DiTSpec, Origin
from vitfold.model.dit import class_rows, sincos_positions, timestep_embedding, unit_norm
from vitfold.model.spec import Activation
from vitfold.ops.run import Run
from vitfold.sources.failures import load_error
from vitfold.sources.hub import read_object
from vitfold.sources.parity import TOLERANCE
from vitfold.sources.reader import refuse

CLASS = "DiTTransformer2DModel"
OLD_CLASS = "Transformer2DModel"
"""What diffusers called a DiT before it had a class of its own; it still loads those folders as one."""
_ACTIVATIONS: dict[str, Activation] = {"gelu-approximate": "gelu_tanh", "gelu": "gelu_erf"}
_OF_FRAMES = 5
_INSTEAD = "use a DiT such as hf:facebook/DiT-XL-2-256"


def read_folder(folder: Path, origin: Origin) -> DiTModel:
    """Read a folder of `save_pretrained`: of a pipeline, or of the transformer with its scheduler within.

    Raises:
        SourceError: if files are missing or damaged, or the model has a feature that vitfold does not run.
        ParityError: if the program differs from diffusers' own module.
    """
    index = read_object(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    if not (inner / "config.json").is_file():
        raise SourceError(f"{inner} holds no config.json; give the folder that diffusers' save_pretrained wrote")
    config = read_object(inner / "config.json")
    found = config.get("_class_name")
    if found != CLASS and not (found == OLD_CLASS and config.get("norm_type") == "ada_norm_zero"):
        raise refuse(f"the transformer {found!r} ({inner / 'config.json'})", _INSTEAD)
    schedule = folder / "scheduler" / "scheduler_config.json"
    if not schedule.is_file():
        raise SourceError(f"{schedule} is missing, and with it the model's noise schedule; save the scheduler there")
    decoder = folder / "vae"
    labels = index.get("id2label")
    return translate(
        _module(inner, str(inner)),
        read_object(schedule),
        origin=origin,
        labels=None if not labels else tuple(labels[key] for key in sorted(labels, key=int)),
        latent="vae" in index or decoder.is_dir(),
        decoder=str(decoder) if decoder.is_dir() else None,
    )


def read_repository(name: str, origin: Origin) -> DiTModel:
    """Read a pipeline of the Hugging Face hub: its transformer, scheduler and VAE are fetched once and kept.

    Raises:
        SourceError: if it cannot be fetched or is no pipeline of a Diffusion Transformer.
        ParityError: if the program differs from diffusers' own module.
    """
    from diffusers import DiTPipeline

    try:
        folder = DiTPipeline.download(name)
    except (OSError, ValueError) as error:
        raise load_error(origin.source, error) from None
    return read_folder(Path(folder), origin)


def translate(
    module: Any,
    schedule: dict[str, Any],
    *,
    origin: Origin,
    labels: tuple[str, ...] | None = None,
    latent: bool = False,
    decoder: str | None = None,
) -> DiTModel:
    """Read a `DiTTransformer2DModel` in memory, and check that the program computes the same.

    Raises:
        SourceError: if it has a feature that vitfold does not run, or weights that are not finite.
        ParityError: if the program differs from the module.
    """
    config = module.config
    if config.activation_fn not in _ACTIVATIONS:
        raise refuse(f"the activation {config.activation_fn!r}", f"it runs {', '.join(_ACTIVATIONS)}")
    if config.norm_elementwise_affine:
        raise refuse("norms that scale and shift beside adaLN", _INSTEAD)
    blocks = module.transformer_blocks
    spec = DiTSpec(
        image_size=config.sample_size,
        patch_size=config.patch_size,
        channels=config.in_channels,
        outputs=module.out_channels,
        embed_dim=module.inner_dim,
        num_layers=config.num_layers,
        num_heads=config.num_attention_heads,
        mlp_dim=blocks[0].ff.net[0].proj.out_features,
        classes=config.num_embeds_ada_norm,
        freq_shift=1,
        condition="block",
        activation=_ACTIVATIONS[config.activation_fn],
        mlp_norm_eps=config.norm_eps,
    )
    state = {name: _array(tensor) for name, tensor in module.state_dict().items()}
    model = DiTModel(
        spec=spec,
        params=dit_params(spec, state),
        schedule=schedule,
        labels=labels,
        origin=origin,
        latent=latent,
        decoder=decoder,
    )
    check_dit_parity(module, model)
    return model


class LatentDecoder(nn.Module):
    """What turns latents of a denoiser, (B, *latent), into images in about [-1, 1], (B, C, Y, X), by a VAE.

    `entered` is what the VAE takes, without the batch, of packed latents, whose axes `packing` says (`DenoiserSpec`).

    Equation: decode(latents / scale + shift), or decode(latents * std + mean) where the VAE has these per channel.
    """

    def __init__(self, vae: nn.Module, *, packing: Sequence[tuple[int, int]] = (), entered: Sequence[int] = ()) -> None:
        super().__init__()
        config: Any = vae.config
        self.vae = vae
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        self._scale = float(getattr(config, "scaling_factor", None) or 1.0)
        self._shift = float(getattr(config, "shift_factor", None) or 0.0)
        self._lengths, self._entered = [length for length, _ in packing], tuple(entered)
        self._order = sorted(range(len(packing)), key=lambda axis: -packing[axis][1])
        self._by_channel = mean is not None and std is not None
        for name, values in (("mean", mean), ("std", std)):
            one = torch.tensor(values if self._by_channel else [0.0], dtype=torch.float32)
            self.register_buffer(name, one.reshape(-1, *[1] * (len(entered) - 1 if entered else 2)), persistent=False)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images of latents."""
        decode: Any = self.vae.decode
        images: torch.Tensor = decode(self.entering(latents), return_dict=False)[0]
        return images[:, :, 0] if images.ndim == _OF_FRAMES else images

    def entering(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what the VAE is handed."""
        if self._entered:
            axes = latents.reshape(-1, *self._lengths).permute(0, *(1 + axis for axis in self._order))
            latents = axes.reshape(-1, *self._entered)
        if self._by_channel:
            return latents * self.get_buffer("std") + self.get_buffer("mean")
        return latents / self._scale + self._shift


def read_vae(folder: Path) -> nn.Module:
    """Return the `AutoencoderKL` of a folder, in single precision.

    Raises:
        SourceError: if diffusers cannot read it.
    """
    from diffusers import AutoencoderKL

    try:
        vae: nn.Module = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SourceError(f"diffusers cannot read {folder}: {str(error).strip().splitlines()[0]}") from None
    return vae.eval()


def check_dit_parity(module: Any, model: DiTModel, *, seed: int = 0) -> float:
    """Return max|a - b| / max|a| of original a and program b on random images at the first, a middle and the last step.

    Raises:
        ParityError: if it exceeds 1e-5.
    """
    spec = model.spec
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(3, spec.channels, spec.image_size, spec.image_size, generator=generator)
    timesteps, labels = np.array([0, 437, 999]), np.array([0, spec.classes - 1, spec.null_class])
    t_freq = torch.from_numpy(timestep_embedding(spec, timesteps))
    with torch.inference_mode():
        (expected,) = module(image, torch.from_numpy(timesteps), torch.from_numpy(labels), return_dict=False)
        actual = dit(Run(model.params), spec, image, t_freq, torch.from_numpy(class_rows(spec, labels)))
    error = float((expected - actual).abs().max()) / (float(expected.abs().max()) or 1.0)
    if not error <= TOLERANCE:
        raise ParityError(
            f"the program differs from diffusers' by {error:.2g} (relative; at most {TOLERANCE:g} is allowed); the "
            "model has a part that vitfold does not know: please report it with the model's name"
        )
    return error


def dit_params(spec: DiTSpec, state: dict[str, Array]) -> dict[str, Array]:
    """Return the parameters of a state dict of diffusers, which is emptied: names changed, projections stacked.

    Raises:
        SourceError: if a tensor has no place in the program.
    """
    params: dict[str, Array] = {"pos_embed": sincos_positions(spec.grid, spec.embed_dim), **unit_norm(spec.embed_dim)}

    def linear(name: str, *layers: str) -> None:
        for end in ("weight", "bias"):
            parts = [state.pop(f"{layer}.{end}") for layer in layers if f"{layer}.{end}" in state]
            if parts:
                params[f"{name}.{end}"] = parts[0] if len(parts) == 1 else np.concatenate(parts)

    linear("patch_embed", "pos_embed.proj")
    for block in range(spec.num_layers):
        here, there = f"blocks.{block}", f"transformer_blocks.{block}"
        embedder = f"{there}.norm1.emb"
        linear(f"{here}.condition.time.fc1", f"{embedder}.timestep_embedder.linear_1")
        linear(f"{here}.condition.time.fc2", f"{embedder}.timestep_embedder.linear_2")
        table = state.pop(f"{embedder}.class_embedder.embedding_table.weight")
        params[f"{here}.condition.label.weight"] = np.ascontiguousarray(table.T)
        linear(f"{here}.modulation", f"{there}.norm1.linear")
        linear(f"{here}.attn.qkv", *(f"{there}.attn1.to_{part}" for part in "qkv"))
        linear(f"{here}.attn.proj", f"{there}.attn1.to_out.0")
        linear(f"{here}.mlp.fc1", f"{there}.ff.net.0.proj")
        linear(f"{here}.mlp.fc2", f"{there}.ff.net.2")
    linear("head.modulation", "proj_out_1")
    linear("head.proj", "proj_out_2")
    if state:
        raise refuse(f"parameters without a place in the program: {', '.join(sorted(state)[:4])}", _INSTEAD)
    return params


def _array(tensor: torch.Tensor) -> Array:
    array: Array = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
    return array


def _module(folder: Path, shown: str) -> Any:
    from diffusers import DiTTransformer2DModel
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        module = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise SourceError(
            f"diffusers cannot read {shown}: {str(error).strip().splitlines()[0]}; the folder needs config.json and "
            "diffusion_pytorch_model.safetensors, as save_pretrained writes them"
        ) from None
    finally:
        logging.set_verbosity(before)
    return module.float().eval()
