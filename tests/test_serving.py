"""Exported members where they are served: by what users call there, beside the model in torch."""

import json
import socket
import time
import urllib.request

import numpy
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import solpath
from conftest import build, inputs
from plans import random_plan, stock_plan

WORDS = "red blue green"
OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def tokenizer():
    """Splits at spaces, for models of 60 tokens."""
    known = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS.split()])}
    known |= {f"w{i}": i for i in range(len(known), 60)}
    made = Tokenizer(models.WordLevel(known, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=32,
        model_input_names=["input_ids", "attention_mask"],
    )


def decoder():
    model = build("llama")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return solpath.extract(model, stock_plan(model, "llama", "both"))


def words_of(model):
    """What a model writes after the words."""
    batch = tokenizer()(WORDS, return_tensors="pt")
    return tokenizer().decode(model.generate(**batch, **OPTIONS)[0]).split()[3:]


def folder_of(model, folder, format):
    if format == "solpath":
        solpath.save(model, folder, tokenizer=tokenizer())
    else:
        solpath.export(model, folder, format, tokenizer=tokenizer())
    return folder


@pytest.mark.parametrize("format", ["solpath", "stock", "hub"])
def test_a_pipeline_writes_the_text_of_the_model(tmp_path, format):
    """A folder of solpath needs `import solpath` and one of hub trust; one of stock needs neither.

    That nothing of solpath is needed for it is in test_stock.py.
    """
    small = decoder()
    folder = folder_of(small, tmp_path / "out", format)
    trust = format == "hub"
    writer = transformers.pipeline("text-generation", str(folder), trust_remote_code=trust)
    [found] = writer(WORDS, **OPTIONS)
    assert found["generated_text"].removeprefix(WORDS).split() == words_of(small)


def test_transformers_serve_answers(tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    from transformers.cli.serve import Serve

    small = decoder()
    folder = str(folder_of(small, tmp_path / "out", "stock"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=folder, non_blocking=True, device="cpu", port=port)
    try:
        asked = {"model": folder, "prompt": WORDS, "max_tokens": 5, "temperature": 0}
        found = post(f"http://localhost:{port}/v1/completions", asked)
    finally:
        server.kill_server()
    assert found["choices"][0]["text"].split() == words_of(small)


def post(url, body):
    """The answer to a request; the server may not be up yet."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for _ in range(100):
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except ConnectionError:
            time.sleep(0.2)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.2)
    raise AssertionError("the server is not up")


def test_sentence_transformers_embeds_by_a_stock_folder(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    model = build("bert")
    small = solpath.extract(model, stock_plan(model, "bert", "mlp"))
    solpath.export(small, tmp_path / "out", "stock", tokenizer=tokenizer())
    texts = [WORDS, "green"]
    found = sentences.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    batch = tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = small(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = (states * mask).sum(1) / mask.sum(1)
    assert numpy.abs(found - expected.numpy()).max() < 1e-5


def test_onnxruntime_runs_what_the_card_says(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    dense = build("bert", num_hidden_layers=1)
    small = solpath.extract(dense, random_plan(dense, (0.5, 0.25)))
    solpath.export(small, tmp_path / "out", "onnx")
    batch = inputs(small) | {"token_type_ids": torch.zeros_like(inputs(small)["input_ids"])}
    names = {
        "folder": tmp_path / "out",
        "inputs": {name: value.numpy() for name, value in batch.items()},
    }
    card = (tmp_path / "out" / "README.md").read_text()
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    with torch.no_grad():
        expected = small(**batch).last_hidden_state
    seen = batch["attention_mask"].bool()
    assert (torch.from_numpy(names["outputs"][0])[seen] - expected[seen]).abs().max() < 1e-5
