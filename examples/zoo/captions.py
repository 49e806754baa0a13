"""A CLIP on scikit-learn's digits and captions such as "a handwritten seven".

The words are a fixed list, so no tokenizer is needed. A batch is ``{"input_ids": [B, T] int64,
"attention_mask": [B, T], "pixel_values": [B, 1, 8, 8]}``, text i describing image i.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel

import digits
from recipe import Recipe

TEMPLATES = (
    "a handwritten {}",
    "digit {}",
    "the number {}",
    "a photo of the digit {}",
    "{} written by hand",
    "a small grey image of a {}",
)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PAD, START = 0, 1


def captions(label: int) -> list[str]:
    """Every caption of a digit: each template with the word and with the numeral."""
    return [template.format(name) for template in TEMPLATES for name in (NAMES[label], str(label))]


WORDS = sorted({word for label in range(10) for text in captions(label) for word in text.split()})
VOCABULARY = {word: START + 1 + i for i, word in enumerate(WORDS)}
END = START + 1 + len(WORDS)  # the highest id; where CLIP pools
LENGTH = 2 + max(len(text.split()) for text in captions(0))


def encode(texts: list[str]) -> dict[str, Tensor]:
    """Token ids and attention mask, [texts, LENGTH] each, padded on the right."""
    rows = [[START, *(VOCABULARY[word] for word in text.split()), END] for text in texts]
    ids = torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def describe(labels: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """One random caption for every label of `labels` [B], as `encode` gives it."""
    choice = torch.randint(2 * len(TEMPLATES), (len(labels),), generator=generator)
    pairs = zip(labels.tolist(), choice.tolist(), strict=True)
    return encode([captions(label)[i] for label, i in pairs])


@torch.no_grad()
def zero_shot_accuracy(model: CLIPModel, pixels: Tensor, labels: Tensor) -> float:
    """Share of images whose embedding is nearest to the mean caption of their own digit."""
    model.eval()
    everything = encode([text for label in range(10) for text in captions(label)])
    count = len(everything["input_ids"])
    outputs = model(**everything, pixel_values=pixels)
    texts = outputs.text_embeds.view(10, count // 10, -1).mean(1)
    predicted = (outputs.image_embeds @ functional.normalize(texts, dim=-1).T).argmax(-1)
    return (predicted == labels).float().mean().item()


def scores(model: CLIPModel) -> dict[str, float]:
    """Zero-shot accuracy on both halves of the split."""
    x_train, y_train, x_test, y_test = digits.load_split()
    return {
        "test_zero_shot_accuracy": zero_shot_accuracy(model, x_test, y_test),
        "train_zero_shot_accuracy": zero_shot_accuracy(model, x_train, y_train),
    }


def contrastive_loss(model: CLIPModel, _: int, size: int) -> Tensor:
    """Cross-entropy of images to texts and back; all texts of the same digit are right."""
    pixels, labels = digits.draw(size)
    logits = model(**describe(labels), pixel_values=pixels).logits_per_image
    same = (labels[:, None] == labels).float()
    target = same / same.sum(1, keepdim=True)
    of_images = functional.cross_entropy(logits, target)
    return (of_images + functional.cross_entropy(logits.T, target)) / 2


def data_digest() -> str:
    """Sixteen hex digits of the images, labels and captions."""
    texts = repr([captions(label) for label in range(10)])
    return hashlib.sha256((digits.data_digest() + texts).encode()).hexdigest()[:16]


CLIP = Recipe(
    model=CLIPModel,
    config=CLIPConfig(
        projection_dim=32,
        vision_config={
            "image_size": 8,
            "num_channels": 1,
            "patch_size": 2,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
        text_config={
            "vocab_size": END + 1,
            "max_position_embeddings": LENGTH,
            "pad_token_id": PAD,
            "bos_token_id": START,
            "eos_token_id": END,
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 192,
        },
    ),
    loss=contrastive_loss,
    scores=scores,
    **digits.TRAINING | {"data": data_digest, "batch_size": 64},
)
