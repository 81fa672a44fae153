"""Train the judge of the demo's Diffusion Transformer on a CPU: a small vision transformer that tells garments apart.

    pip install 'vitfold[optimize,diffusion]'
    python examples/train_demo_judge.py --data fashion_mnist --output judge

Writes a folder of timm (config.json, model.safetensors), the statistics of its features of the 10,000 test images
(real.safetensors), and what it says of real images and of noise (figures.json). As the folder `judge` beside the
weights of a Diffusion Transformer, `vitfold diffuse` takes it by itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from train_demo_dit import CLASSES, SIZE, read_images

from vitfold.bench.pictures import moments
from vitfold.pipeline.judging import Judge, features
from vitfold.sources import load_source
from vitfold.sources.dit import REAL

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL = {
    "img_size": SIZE,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "class_token": False,
    "global_pool": "avg",
}
PREPROCESSING = {
    "input_size": [3, SIZE, SIZE],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
}
PATCH_DROP = 0.5
WHOLE_SHARE = 0.2
SHIFT = 2
WARM_UP = 0.05
LABEL_SMOOTHING = 0.1
LOG_STEPS = 100
PER_CLASS = (10, 100, 1000)


def as_input(images: Tensor) -> Tensor:
    """Return bytes [B, 1, 32, 32] as the model reads them: grey repeated, in [-1, 1]."""
    return (images.float() / 127.5 - 1).expand(-1, 3, -1, -1)


def augment(images: Tensor) -> Tensor:
    """Mirror half of the images, and move each by up to its black margin."""
    count = len(images)
    places, shifts = torch.arange(SIZE), torch.randint(-SHIFT, SHIFT + 1, (2, count, 1))
    rows, columns = (places + shifts) % SIZE
    columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
    return images[torch.arange(count)[:, None, None, None], 0, rows[:, None, :, None], columns[:, None, None, :]]


def train(images: Tensor, labels: Tensor, *, epochs: int, batch: int, lr: float) -> nn.Module:
    """Train from scratch; patches are dropped at random to halve the work until the last fifth of the steps.

    Source: PatchDropout (2208.07220).
    """
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), patch_drop_rate=PATCH_DROP, **MODEL)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=WARM_UP)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {steps} steps", flush=True)
    began, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if step == round((1 - WHOLE_SHARE) * steps):
            model.patch_drop = nn.Identity()
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch], order[batch:]
        found = model(as_input(augment(images[chosen])))
        loss = F.cross_entropy(found, labels[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_STEPS == 0:
            minutes = (time.monotonic() - began) / 60
            print(f"step {step + 1}  loss {loss.item():.3f}  {minutes:.1f} min", flush=True)
    return model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights in half precision and what timm needs to know about them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(CLASSES),
        "model_args": MODEL,
        "pretrained_cfg": {**PREPROCESSING, "num_classes": len(CLASSES), "label_names": CLASSES},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def measure(data: Path, folder: Path) -> None:
    """Write the statistics of the test images, and what the judge says of them, of training images and of noise.

    Distances depend on how many images they are of, so the floor (real images) and the ceiling (noise) have several.
    """
    model = load_source(f"timm:local-dir:{folder.resolve()}").model
    test, labels = read_images(data, "t10k")
    judge = Judge(model=model, real=moments(features(model, [Image.fromarray(image[0].numpy()) for image in test])))
    judge.save(folder / REAL)
    verdict = judge(test.numpy() / np.float32(255), tuple(labels.tolist()), len(CLASSES))
    train_images, train_labels = read_images(data, "train")
    rows = []
    for per_class in PER_CLASS:
        places = torch.cat([torch.nonzero(train_labels == label)[:per_class, 0] for label in range(len(CLASSES))])
        asked = tuple(train_labels[places].tolist())
        real = train_images[places].numpy() / np.float32(255)
        noise = np.random.default_rng(0).uniform(size=real.shape).astype(np.float32)
        for name, images in (("training images", real), ("uniform noise", noise)):
            rows.append({"images": name, "count": len(images), **judge(images, asked, len(CLASSES)).to_dict()})
    found = {"test_images": len(test), **verdict.to_dict(), "distances": rows}
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"accuracy {verdict.class_accuracy:.4f} on {len(test)} test images")


def main() -> None:
    """Train, write, and test what was written."""
    parser = argparse.ArgumentParser(description="Train the judge of the demo's Diffusion Transformer.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--measure", action="store_true", help="measure what is in that folder, do not train")
    arguments = parser.parse_args()
    if not arguments.measure:
        images, labels = read_images(arguments.data, "train")
        save(train(images, labels, epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr), arguments.output)
    measure(arguments.data, arguments.output)


if __name__ == "__main__":
    main()
