"""Smaller CLIP models: search on COCO pairs, five sizes, tuned, retrieval R@1 of each.

    python examples/recipes/coco.py --data /data/coco --out out/clip
    accelerate launch examples/recipes/coco.py --data /data/coco --out out/clip

`--data` has `train2017/` and `val2017/` with the images, and `annotations/captions_train2017.json`
and `annotations/captions_val2017.json`. Both towers are pruned, under one budget.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

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
from torch import Tensor, nn

from solpath import image_batches, image_text_batches, text_batches
from solpath.errors import FileError
from solpath.reading import read_json

Captions = dict[Path, list[str]]


def read_captions(data: Path, split: str) -> Captions:
    """Image files of a split, each with all of its captions, in the order of the file."""
    file = data / "annotations" / f"captions_{split}.json"
    content = read_json(file)
    try:
        files = {image["id"]: data / split / image["file_name"] for image in content["images"]}
        captions: Captions = {path: [] for path in files.values()}
        for annotation in content["annotations"]:
            captions[files[annotation["image_id"]]].append(annotation["caption"].strip())
    except (KeyError, TypeError) as error:
        raise FileError(f"{file} is not a file of COCO captions: {error!r}.") from error
    return {path: texts for path, texts in captions.items() if texts}


@torch.no_grad()
def retrieval(
    model: nn.Module, captions: Captions, processor: Any, batch_size: int, device: torch.device
) -> dict[str, float]:
    """R@1 from image to text, where any caption of the image counts, and from text to image."""
    model.eval()
    common = {"batch_size": batch_size, "seed": None, "device": device}
    tokenizer = processor.tokenizer
    length = tokenizer.model_max_length
    texts = [text for several in captions.values() for text in several]
    owner = [i for i, several in enumerate(captions.values()) for _ in several]
    images = image_batches(list(captions), processor.image_processor, **common)
    words = text_batches(texts, tokenizer, length=length, **common)
    image = embed(model.get_image_features(**batch) for batch in images)
    text = embed(model.get_text_features(**batch) for batch in words)
    similarity, index = image @ text.T, torch.tensor(owner, device=device)
    found = index[similarity.argmax(1)] == torch.arange(len(image), device=device)
    return {
        "image to text R@1": found.double().mean().item(),
        "text to image R@1": (similarity.argmax(0) == index).double().mean().item(),
    }


def embed(outputs: Iterable[Any]) -> Tensor:
    """Unit embeddings. float ``[samples, width]``."""
    parts = [out if isinstance(out, Tensor) else out.pooler_output for out in outputs]
    return nn.functional.normalize(torch.cat(parts).float(), dim=-1)


def main(
    data: Annotated[Path, typer.Option(help="Folder of COCO 2017.")],
    out: Out,
    model: Annotated[str, typer.Option(help="CLIP model.")] = "openai/clip-vit-base-patch32",
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
    """Make a family of smaller CLIP models."""
    dense, processor, place = load(model, device)
    train, val = read_captions(data, "train2017"), read_captions(data, "val2017")
    seen = [(path, text) for path, several in train.items() for text in several]
    unseen = [(path, several[0]) for path, several in val.items()]
    scored = dict(list(val.items())[:limit])
    common = {"batch_size": batch_size, "seed": seed, "device": place}
    make_family(
        dense,
        Data(
            search=list(image_text_batches(seen, processor, limit=samples, **common)),
            tune=image_text_batches(seen, processor, **common),
            heldout=list(image_text_batches(unseen, processor, limit=heldout, **common)),
            score=lambda m: retrieval(m, scored, processor, batch_size, place),
        ),
        out,
        sparsity=sparsity,
        steps=steps,
        tune_steps=tune_steps,
        seed=seed,
        processor=processor,
        about={"recipe": "coco", "model": model, "data": str(data)},
    )


if __name__ == "__main__":
    start(main)
