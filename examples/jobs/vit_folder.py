"""A ViT on a folder of images, whose subfolders are the labels."""

from job import home, solpath
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

folder = home()
model, data = folder / "model", folder / "photos"
config = ViTConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    image_size=16, patch_size=8, num_labels=2, initializer_range=0.5,
)  # fmt: skip
ViTForImageClassification(config).save_pretrained(model)
ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
    (data / name).mkdir(parents=True, exist_ok=True)
    for i in range(12):
        shade = tuple(min(255, part + 4 * i) for part in color)
        Image.new("RGB", (20, 20), shade).save(data / name / f"{i}.png")

solpath(
    "search", model, "--data", data, "--steps", "8", "--batch-size", "8", "--out", folder / "path"
)
solpath("extract", model, folder / "path", "--sparsity", "0.3", "--out", folder / "small")
solpath("eval", folder / "small", "--reference", model, "--data", data, "--task", "classification")
