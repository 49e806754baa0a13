"""Smaller image classifiers: search on ImageNet-1k images, five sizes, tuned, top-1 of each.

    python examples/recipes/imagenet.py --data /data/imagenet --out out/deit
    accelerate launch examples/recipes/imagenet.py --data /data/imagenet --out out/deit

`--data` has the usual layout: `train/` and `val/`, each with one folder of images per class, whose
sorted names are in the order of the model's classes. Labels are used for the score only.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from family import (
    SIZES,
    BatchSize,
    Data,
    Device,
    Heldout,
    Limit,
    Out,
    Samples,
    Seed,
    Sparsity,
    Steps,
    TuneSteps,
    load,
    make_family,
    start,
)
from torch import nn

from solpath import image_batches
from solpath.data.batches import Batches
from solpath.errors import ConfigError


@torch.no_grad()
def top1(model: nn.Module, batches: Batches) -> float:
    """Share of images whose largest logit is that of their label."""
    model.eval()
    right = total = 0
    for batch in batches:
        predicted = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
        right += int((predicted == batch["labels"]).sum())
        total += len(predicted)
    return right / total


def main(
    data: Annotated[Path, typer.Option(help="Folder with train/ and val/.")],
    out: Out,
    model: Annotated[str, typer.Option(help="Classifier.")] = "facebook/deit-small-patch16-224",
    sparsity: Sparsity = SIZES,
    steps: Steps = 200,
    tune_steps: TuneSteps = 500,
    batch_size: BatchSize = 32,
    samples: Samples = 2048,
    heldout: Heldout = 1024,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Make a family of smaller image classifiers."""
    dense, processor, place = load(model, device)
    train, val = data / "train", data / "val"
    classes = sum(entry.is_dir() for entry in val.iterdir()) if val.is_dir() else 0
    if classes != dense.config.num_labels:
        raise ConfigError(
            f"{val} has {classes} folders, one per class; {model} has {dense.config.num_labels} "
            "classes."
        )
    common = {"batch_size": batch_size, "seed": seed, "device": place}
    labelled = image_batches(val, processor, label_column="label", limit=limit, **common)
    make_family(
        dense,
        Data(
            search=list(image_batches(train, processor, limit=samples, **common)),
            tune=image_batches(train, processor, **common),
            heldout=list(image_batches(val, processor, limit=heldout, **common)),
            score=lambda m: {"top-1": top1(m, labelled)},
        ),
        out,
        sparsity=sparsity,
        steps=steps,
        tune_steps=tune_steps,
        seed=seed,
        processor=processor,
        about={"recipe": "imagenet", "model": model, "data": str(data)},
    )


if __name__ == "__main__":
    start(main)
