"""A SentenceTransformer on pairs of texts, once more from the settings of the first search."""

import json

from job import WORDS, home, solpath, tokenizer
from transformers import BertConfig, BertModel

folder = home()
model, data = folder / "model", folder / "pairs.jsonl"
config = BertConfig(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, initializer_range=0.5,
)  # fmt: skip
BertModel(config).save_pretrained(model)  # the folder of a SentenceTransformer holds this, too
tokenizer().save_pretrained(model)
with data.open("w") as file:
    for i in range(48):
        thing, kind = WORDS[9 + i % 4], WORDS[5 + i % 2]
        row = {
            "anchor": f"the {kind} {thing}",
            "positive": f"a {thing} is {'very ' * (i % 3)}{kind}",
        }
        file.write(json.dumps(row) + "\n")

solpath("search", model, "--data", data, "--steps", "8", "--length", "8", "--out", folder / "path")
settings = folder / "path" / "settings.toml"
solpath("search", "--settings", settings, "--seed", "1", "--out", folder / "again")
solpath("extract", model, folder / "path", "--sparsity", "0.3", "--out", folder / "small")
solpath("eval", folder / "small", "--reference", model, "--data", data, "--task", "retrieval")
