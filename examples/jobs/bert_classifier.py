"""A BERT classifier on a CSV file with a text and a label by name in each row."""

import csv

from job import WORDS, home, solpath, tokenizer
from transformers import BertConfig, BertForSequenceClassification

folder = home()
model, data = folder / "model", folder / "reviews.csv"
config = BertConfig(
    vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=16, id2label={0: "negative", 1: "positive"},
    label2id={"negative": 0, "positive": 1}, initializer_range=0.5,
)  # fmt: skip
BertForSequenceClassification(config).save_pretrained(model)
tokenizer().save_pretrained(model)
with data.open("w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["text", "label"])
    for i in range(64):
        word, label = [("good", "positive"), ("bad", "negative")][i % 2]
        rows.writerow([f"the {'film' if i % 3 else 'song'} was {'very ' * (i % 4)}{word}", label])

solpath(
    "search", model, "--data", data, "--steps", "8", "--batch-size", "8", "--out", folder / "path"
)
solpath("extract", model, folder / "path", "--sparsity", "0.3", "--out", folder / "small")
solpath("compensate", folder / "small", model, "--data", data, "--batch-size", "8", "--out",
        folder / "better")  # fmt: skip
solpath("eval", folder / "better", "--reference", model, "--data", data, "--task", "classification")
