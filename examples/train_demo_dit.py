"""Train the small class-conditional Diffusion Transformer of the demo on Fashion-MNIST, on a CPU.

Diffusers' DiT on pixels: 28x28 images padded to 32x32, one channel in [-1, 1], v-prediction, classifier-free guidance.

    pip install diffusers torch safetensors pillow
    python examples/train_demo_dit.py --data fashion_mnist --work out/dit --minutes 160   # continues where it stopped
    python examples/train_demo_dit.py --work out/dit --export out/dit/export              # also while training goes on

SIGTERM and Ctrl-C save and end. A last run with a smaller --lr anneals.
"""

# mypy: disable-error-code="no-untyped-call,attr-defined"
# (diffusers is typed in part)

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from PIL import Image
from torch import Tensor, nn

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
NULL_CLASS = len(CLASSES)  # the extra row that diffusers appends to the label embedding
SIZE = 32
MODEL = {
    "sample_size": SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": 4,
    "num_layers": 10,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "num_embeds_ada_norm": NULL_CLASS,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LABEL_DROPOUT = 0.1
WARM_UP_STEPS = 500
EMA_DECAY = 0.999
LOG_STEPS = 100
CHECKPOINT = "checkpoint.pt"


@dataclass(kw_only=True)
class Run:
    """A training run: all that a checkpoint holds."""

    model: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the checkpoint; a reader sees all of the old or all of the new one."""
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "rng": torch.get_rng_state(),
        }
        partial = folder / f"{CHECKPOINT}.partial"
        torch.save(state, partial)
        partial.replace(folder / CHECKPOINT)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint of this folder; the learning rate stays the one asked for."""
        state = torch.load(folder / CHECKPOINT, weights_only=True)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        torch.set_rng_state(state["rng"])


def read_idx(path: Path) -> Tensor:
    """Return the bytes of a gzipped idx file in their shape."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).copy()).reshape(shape)


def read_images(folder: Path, part: str = "train") -> tuple[Tensor, Tensor]:
    """Return a part, train or t10k, as uint8 [N, 1, 32, 32], black around the images, and their labels."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    margin = (SIZE - images.shape[-1]) // 2
    return F.pad(images, (margin,) * 4)[:, None], read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()


def new_model() -> nn.Module:
    """Return a DiT with the initial weights of the paper; diffusers leaves PyTorch's, which train slower.

    In eval mode for good: diffusers would drop labels in each block independently, so that no image ever trained the
    unconditional model that guidance asks for. `loss` drops them instead; there is nothing else to switch.
    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, section 3.2 (adaLN-Zero).
    """
    model: nn.Module = DiTTransformer2DModel(**MODEL).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm1.linear" in name or "proj_out" in name:
            nn.init.zeros_(parameter)
        elif ".emb." in name:
            nn.init.normal_(parameter, std=0.02)
        else:
            nn.init.xavier_uniform_(parameter.flatten(1))
    return model


def loss(model: nn.Module, scheduler: Any, images: Tensor, labels: Tensor) -> Tensor:
    """Return the mean squared error of v = sqrt(a) noise - sqrt(1 - a) image at stratified random timesteps."""
    strata = (torch.arange(len(images)) + torch.rand(len(images))) / len(images)
    timesteps = (strata * scheduler.config.num_train_timesteps).long()
    labels = torch.where(torch.rand(len(labels)) < LABEL_DROPOUT, NULL_CLASS, labels)
    noise = torch.randn_like(images)
    noisy = scheduler.add_noise(images, noise, timesteps)
    (predicted,) = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)
    return F.mse_loss(predicted, scheduler.get_velocity(images, noise, timesteps))


def threads_for(load: float, threads: int, most: int) -> int:
    """Return how many threads find a core of their own; one that waits for its core would hold up all the others."""
    return max(1, min(most, round((os.cpu_count() or 1) - (load - threads))))


def train(data: Path, work: Path, *, minutes: float, batch: int, lr: float, save_minutes: float = 3) -> None:
    """Train until the time is over or a signal comes, continuing the run in the work folder if there is one."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    images, labels = read_images(data)
    model, ema = new_model(), new_model()
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    run = Run(model=model, ema=ema, optimizer=optimizer)
    if (work / CHECKPOINT).is_file():
        run.load(work)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, starts at step {run.step}", flush=True)

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stopped.append(received))
    scheduler = DDPMScheduler(**SCHEDULE)
    most_threads = torch.get_num_threads()
    started = logged = saved = time.monotonic()
    before, losses = run.seconds, []
    while not stopped and time.monotonic() - started < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (run.step + 1) / WARM_UP_STEPS)
        torch.set_num_threads(threads_for(os.getloadavg()[0], torch.get_num_threads(), most_threads))
        chosen = torch.randint(len(images), (batch,))
        value = loss(model, scheduler, images[chosen].float() / 127.5 - 1, labels[chosen])
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step += 1
        decay = min(EMA_DECAY, (1 + run.step) / (10 + run.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)

        losses.append(value.item())
        now = time.monotonic()
        run.seconds = before + now - started
        if run.step % LOG_STEPS == 0:
            mean = sum(losses) / len(losses)
            run.curve.append({"step": run.step, "loss": round(mean, 5), "seconds": round(run.seconds)})
            speed = len(losses) * batch / (now - logged)
            print(f"step {run.step}  loss {mean:.4f}  {speed:.0f} images/s  {run.seconds / 60:.1f} min", flush=True)
            losses, logged = [], now
        if now - saved > 60 * save_minutes:
            run.save(work)
            saved = now
    run.save(work)
    print(f"saved at step {run.step}", flush=True)


@torch.inference_mode()
def sample(model: nn.Module, scheduler: Any, labels: Tensor, *, steps: int, guidance: float, seed: int) -> Tensor:
    """Return images in [-1, 1], shape [B, 1, 32, 32]: v = v_null + guidance (v_class - v_null) at each DDIM step."""
    images = torch.randn(len(labels), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([labels, torch.full_like(labels, NULL_CLASS)])
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        (v,) = model(images.repeat(2, 1, 1, 1), timestep.expand(len(both)), both, return_dict=False)
        conditional, unconditional = v.chunk(2)
        images = scheduler.step(unconditional + guidance * (conditional - unconditional), timestep, images).prev_sample
    return images.clamp(-1, 1)


def export(work: Path, folder: Path, *, guidance: float = 1.5, per_class: int = 8) -> None:
    """Write the averaged weights of the run as a diffusers folder in half precision, with samples and loss curve."""
    state = torch.load(work / CHECKPOINT, weights_only=True)
    model: Any = new_model()
    model.load_state_dict(state["ema"])
    # Black backgrounds lie at the end of the range: clipping the image but not the noise adds an error at every step.
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    model.half().save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "DiTPipeline", "id2label": {str(i): name for i, name in enumerate(CLASSES)}}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    record = {"step": state["step"], "seconds": round(state["seconds"]), "curve": state["curve"]}
    (folder / "loss.json").write_text(json.dumps(record) + "\n")

    labels = torch.arange(len(CLASSES)).repeat_interleave(per_class)
    images = sample(model.float(), scheduler, labels, steps=50, guidance=guidance, seed=0)
    sheet = images.reshape(len(CLASSES), per_class, SIZE, SIZE).permute(0, 2, 1, 3).reshape(len(CLASSES) * SIZE, -1)
    Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy()).save(folder / "samples.png")
    size_mb = (folder / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6
    print(f"exported step {state['step']} to {folder}, {size_mb:.1f} MB")


def main() -> None:
    """Train, or export what is trained."""
    parser = argparse.ArgumentParser(description="Train the demo's Diffusion Transformer on Fashion-MNIST.")
    parser.add_argument("--data", type=Path, help="folder of train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=160, help="stop after that time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--export", type=Path, help="write the checkpoint as a diffusers folder there, do not train")
    arguments = parser.parse_args()
    if arguments.export is not None:
        export(arguments.work, arguments.export)
    elif arguments.data is None:
        parser.error("training needs --data")
    else:
        train(arguments.data, arguments.work, minutes=arguments.minutes, batch=arguments.batch, lr=arguments.lr)


if __name__ == "__main__":
    main()
