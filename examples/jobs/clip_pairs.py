"""CLIP on images with captions, in the layout of imagefolder."""

import json

from job import WORDS, home, solpath, tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

folder = home()
model, data = folder / "model", folder / "captioned"
tower = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
config = CLIPConfig(
    text_config=tower
    | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 2},
    vision_config=tower | {"image_size": 16, "patch_size": 8},
    projection_dim=16,
    initializer_factor=9.0,
)
CLIPModel(config).save_pretrained(model)
images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
CLIPProcessor(images, tokenizer()).save_pretrained(model)
data.mkdir(parents=True, exist_ok=True)
with (data / "metadata.jsonl").open("w") as file:
    for i in range(24):
        name, color = [("red", (200, 9 * i, 0)), ("blue", (0, 9 * i, 200))][i % 2]
        Image.new("RGB", (20, 20), color).save(data / f"{i}.png")
        file.write(json.dumps({"file_name": f"{i}.png", "text": f"a {name} cat"}) + "\n")

solpath(
    "search", model, "--data", data, "--steps", "8", "--batch-size", "8", "--out", folder / "path"
)
solpath("extract", model, folder / "path", "--sparsity", "0.3", "--out", folder / "small")
solpath("eval", folder / "small", "--reference", model, "--data", data, "--task", "retrieval")
