"""A decoder on two jsonl files, one of which counts twice as much."""

import json

from job import WORDS, home, solpath, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

folder = home()
model, mixed = folder / "model", []
config = LlamaConfig(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, intermediate_size=64, max_position_embeddings=64,
    pad_token_id=0, eos_token_id=2, bos_token_id=2, initializer_range=0.5,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(model)
tokenizer().save_pretrained(model)
for name, weight in (("film", 2), ("song", 1)):
    rows = [{"content": f"the {name} was {'very ' * (i % 5)}good"} for i in range(90)]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mixed += ["--data", f"{folder / name}.jsonl:{weight}"]

size = ["--length", "16", "--batch-size", "4"]
solpath(
    "search", model, *mixed, *size, "--steps", "8", "--micro-batch", "2", "--out", folder / "path"
)
solpath("extract", model, folder / "path", "--sparsity", "0.3", "--out", folder / "small")
solpath("tune", folder / "small", model, *mixed, *size, "--steps", "4", "--out", folder / "tuned")
solpath("eval", folder / "tuned", "--reference", model, *mixed, *size, "--task",
        "language-modeling")  # fmt: skip
