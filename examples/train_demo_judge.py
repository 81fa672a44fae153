"""Train the judge of the demo's Diffusion Transformer on a CPU: a small vision transformer that tells garments apart.

    pip install 'vitfold[optimize,diffusion]' 'torch>=2.9'
    python examples/train_demo_judge.py --data fashion_mnist --output judge

Writes a folder of timm (config.json, model.safetensors), the statistics of its features of the 10,000 test images
(real.safetensors), and what it says of real images and of noise (figures.json). As the folder `judge` beside the
weights of a Diffusion Transformer, `vitfold diffusion sample` takes it by itself.
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
from vitfold.diffusion.judge import Judge, features
from vitfold.model import Array
from vitfold.sources import load_source
from vitfold.sources.dit import REAL

ARCHITECTURE = "vit_tiny_patch16_224"
MEAN, STD = 0.22, 0.33  # of all pixels of the training images
MODEL = {
    "img_size": SIZE,
    "patch_size": 8,
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
    "mean": [MEAN] * 3,
    "std": [STD] * 3,
}
WARM_UP = 0.05
LABEL_SMOOTHING = 0.1
LOG_STEPS = 100
PER_CLASS = (10, 100, 1000)
NOISE_PER_CLASS, SETS = (10, 50), 30


def as_input(images: Tensor) -> Tensor:
    """Return bytes [B, 1, 32, 32] as the model reads them: grey repeated, of mean 0 and deviation 1."""
    return ((images.float() / 255 - MEAN) / STD).expand(-1, 3, -1, -1)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, and AdamW for all else.

    Source: Jordan, Muon: An optimizer for hidden layers in neural networks (2024).
    """
    inner = {name: p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    others = [p for name, p in model.named_parameters() if name not in inner]
    decay = {"weight_decay": 0.01}
    return [
        torch.optim.Muon(inner.values(), lr=lr, momentum=0.95, **decay),
        torch.optim.AdamW(others, lr=lr / 10, **decay),
    ]


def train(images: Tensor, labels: Tensor, *, epochs: int, batch: int, lr: float) -> nn.Module:
    """Train from scratch on images half of which are mirrored; the rate rises, stays, and falls to nothing."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(ARCHITECTURE, num_classes=len(CLASSES), **MODEL)
    steps = epochs * (len(images) // batch)
    both = optimizers(model, lr)
    rates = [
        torch.optim.lr_scheduler.LambdaLR(
            one, lambda step: min(1, (step + 1) / (WARM_UP * steps), 1.5 * (1 - step / steps))
        )
        for one in both
    ]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {steps} steps", flush=True)
    began, order = time.monotonic(), torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images))
        chosen, order = order[:batch], order[batch:]
        mirrored = torch.rand(batch, 1, 1, 1) < 0.5
        given = torch.where(mirrored, images[chosen].flip(3), images[chosen])
        loss = F.cross_entropy(model(as_input(given)), labels[chosen], label_smoothing=LABEL_SMOOTHING)
        for one in both:
            one.zero_grad()
        loss.backward()
        for one, rate in zip(both, rates, strict=True):
            one.step()
            rate.step()
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
    images, classes = read_images(data, "train")
    rows = []
    for per_class in PER_CLASS:
        real, asked = some(images, classes, per_class)
        noise = np.random.default_rng(0).uniform(size=real.shape).astype(np.float32)
        for name, shown in (("training images", real), ("uniform noise", noise)):
            rows.append({"images": name, "count": len(shown), **judge(shown, asked, len(CLASSES)).to_dict()})
    verdict = judge(test.numpy() / np.float32(255), tuple(labels.tolist()), len(CLASSES)).to_dict()
    found = {
        "test_images": len(test),
        "class_accuracy": verdict["class_accuracy"],
        "class_accuracy_interval": verdict["class_accuracy_interval"],
        "distances": rows,
        "noises": [noise_of_sets(judge, images, classes, per_class) for per_class in NOISE_PER_CLASS],
    }
    (folder / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"accuracy {verdict['class_accuracy']:.4f} on {len(test)} test images")


def some(images: Tensor, labels: Tensor, per_class: int, skip: int = 0) -> tuple[Array, tuple[int, ...]]:
    """Return so many images of each class in [0, 1], and their labels."""
    found = [torch.nonzero(labels == label)[skip : skip + per_class, 0] for label in range(len(CLASSES))]
    places = torch.cat(found)
    return images[places].numpy() / np.float32(255), tuple(labels[places].tolist())


def noise_of_sets(judge: Judge, images: Tensor, labels: Tensor, per_class: int) -> dict[str, float]:
    """Return how the distances of different sets of real images vary, and what resamples of one set say of that."""
    sets = [some(images, labels, per_class, skip=per_class * number) for number in range(SETS)]
    verdicts = [judge(shown, asked, len(CLASSES)) for shown, asked in sets]
    return {
        "count": per_class * len(CLASSES),
        "sets": SETS,
        "deviation": float(np.std([verdict.frechet for verdict in verdicts], ddof=1)),
        "frechet_noise": float(np.mean([verdict.frechet_noise for verdict in verdicts])),
    }


def main() -> None:
    """Train, write, and test what was written."""
    parser = argparse.ArgumentParser(description="Train the judge of the demo's Diffusion Transformer.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon; AdamW takes a tenth")
    parser.add_argument("--measure", action="store_true", help="measure what is in that folder, do not train")
    arguments = parser.parse_args()
    if not arguments.measure:
        images, labels = read_images(arguments.data, "train")
        save(train(images, labels, epochs=arguments.epochs, batch=arguments.batch, lr=arguments.lr), arguments.output)
    measure(arguments.data, arguments.output)


if __name__ == "__main__":
    main()
