"""A ViT, a DeiT and a Swin on scikit-learn's bundled 8x8 digits.

1200 digits train them, the other 597 test them. A batch is
``{"pixel_values": [B, 1, 8, 8] float32}``.
"""

import functools
import hashlib
import math

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from recipe import Recipe

TRAIN_COUNT = 1200
IMAGE = {"image_size": 8, "num_channels": 1, "num_labels": 10}


@functools.cache
def load_split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_train [1200, 1, 8, 8], y_train, x_test [597, 1, 8, 8], y_test; pixels in 0..1.

    The split is a fixed shuffle and does not depend on the training seed.
    """
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)[order]
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    n = TRAIN_COUNT
    return pixels[:n], labels[:n], pixels[n:], labels[n:]


def data_digest() -> str:
    """Sixteen hex digits of the images and labels."""
    parts = [part.numpy().tobytes() for part in load_split()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def augment(pixels: Tensor) -> Tensor:
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


def draw(size: int) -> tuple[Tensor, Tensor]:
    """Random training images [size, 1, 8, 8], augmented, and their labels [size]."""
    pixels, labels, _, _ = load_split()
    pick = torch.randint(len(pixels), (size,))
    return augment(pixels[pick]), labels[pick]


@torch.no_grad()
def accuracy(model: PreTrainedModel, pixels: Tensor, labels: Tensor) -> float:
    """Return the share of images classified right."""
    model.eval()
    predicted = model(pixel_values=pixels).logits.argmax(-1)
    return (predicted == labels).float().mean().item()


def scores(model: PreTrainedModel) -> dict[str, float]:
    """Accuracy on both halves of the split."""
    x_train, y_train, x_test, y_test = load_split()
    return {
        "test_accuracy": accuracy(model, x_test, y_test),
        "train_accuracy": accuracy(model, x_train, y_train),
    }


def label_loss(model: PreTrainedModel, _: int, size: int) -> Tensor:
    """Cross-entropy to the labels, smoothed."""
    pixels, labels = draw(size)
    logits = model(pixel_values=pixels).logits
    return functional.cross_entropy(logits, labels, label_smoothing=0.05)


def distillation_loss(
    model: PreTrainedModel, _: int, size: int, teacher: PreTrainedModel
) -> Tensor:
    """The class token learns the labels, the distillation token the teacher's probabilities."""
    pixels, labels = draw(size)
    outputs = model(pixel_values=pixels)
    with torch.no_grad():
        taught = teacher(pixel_values=pixels).logits.softmax(-1)
    of_class = functional.cross_entropy(outputs.cls_logits, labels, label_smoothing=0.05)
    of_teacher = functional.cross_entropy(outputs.distillation_logits, taught)
    return (of_class + of_teacher) / 2


ENCODER = {
    "patch_size": 2,
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TRAINING = {
    "data": data_digest,
    "steps": 2000,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "optimizer": {"weight_decay": 0.05},
    "schedule": {"pct_start": 0.1},
}

VIT = Recipe(
    model=ViTForImageClassification,
    config=ViTConfig(**IMAGE, **ENCODER),
    loss=label_loss,
    scores=scores,
    **TRAINING,
)
DEIT = Recipe(
    model=DeiTForImageClassificationWithTeacher,
    config=DeiTConfig(**IMAGE, **ENCODER),
    loss=distillation_loss,
    scores=scores,
    teacher="vit",
    **TRAINING,
)
# 8x8 patches in windows of 3, so windows are padded to 9x9; then 4x4, padded to 6x6. The second
# block of each stage has shifted windows.
SWIN = Recipe(
    model=SwinForImageClassification,
    config=SwinConfig(
        **IMAGE,
        patch_size=1,
        embed_dim=48,
        depths=[2, 2],
        num_heads=[3, 6],
        window_size=3,
        drop_path_rate=0.0,
    ),
    loss=label_loss,
    scores=scores,
    **TRAINING,
)
