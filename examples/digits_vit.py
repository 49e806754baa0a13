"""Train a small stock ViT on scikit-learn's bundled 8x8 digits, on CPU and offline.

The model is an unmodified `transformers.ViTForImageClassification` (6 layers, hidden size 64,
4 heads) over 2x2 patches. 1200 digits train it, the other 597 test it; it reaches about .97.

    python examples/digits_vit.py --out models/digits_vit

The folder gets `config.json`, `model.safetensors` and `train.json` (accuracy, seed, versions,
wall time). A batch is `{"pixel_values": [B, 1, 8, 8] float32, "labels": [B] int64}`.
"""

import json
import math
import platform
import time
from pathlib import Path
from typing import Annotated

import sklearn
import torch
import transformers
import typer
from rich.progress import track
from sklearn.datasets import load_digits
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

TRAIN_COUNT = 1200


def load_split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x_train [1200, 1, 8, 8], y_train, x_test [597, 1, 8, 8], y_test; pixels in 0..1.

    The split is a fixed shuffle and does not depend on the training seed.
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)[order]
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    n = TRAIN_COUNT
    return pixels[:n], labels[:n], pixels[n:], labels[n:]


def build() -> ViTForImageClassification:
    """Return the untrained model."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Rotate, scale and shift each image a little, and add pixel noise."""
    n = len(pixels)
    angle = (torch.rand(n) - 0.5) * math.radians(10)
    scale = 1 + (torch.rand(n) - 0.5) * 0.1
    shift = (torch.rand(n, 2) - 0.5) * 0.25  # in half-image units: half a pixel at most
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = functional.affine_grid(rows.view(n, 2, 3), list(pixels.shape), align_corners=False)
    moved = functional.grid_sample(pixels, grid, align_corners=False)
    return moved + 0.03 * torch.randn_like(moved)


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images classified right."""
    model.eval()
    predicted = model(pixel_values=pixels).logits.argmax(-1)
    return (predicted == labels).float().mean().item()


def main(
    out: Annotated[Path, typer.Option(help="Folder to save the model in.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Train the digits ViT and save it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    x_train, y_train, x_test, y_test = load_split()
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.1
    )
    start = time.perf_counter()
    for _ in track(range(steps), description="digits_vit"):
        pick = torch.randint(len(x_train), (batch_size,))
        logits = model(pixel_values=augment(x_train[pick])).logits
        loss = functional.cross_entropy(logits, y_train[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    report = {
        "test_accuracy": accuracy(model, x_test, y_test),
        "train_accuracy": accuracy(model, x_train, y_train),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scikit_learn": sklearn.__version__,
    }
    model.save_pretrained(out)
    (out / "train.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
