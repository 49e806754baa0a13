"""The zoo's models train, are cached and are what the benchmarks need."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

import captions
import denoising
import digits
import stdlib_bytes
import train
import workloads

WORKLOADS = {"vit": "digits"}


@pytest.fixture(autouse=True)
def _train_briefly(monkeypatch):
    """Three steps of four samples, and no scores."""
    for name, recipe in train.ZOO.items():
        brief = dataclasses.replace(recipe, steps=3, batch_size=4, scores=lambda model: {})
        monkeypatch.setitem(train.ZOO, name, brief)


@pytest.mark.parametrize("name", train.ZOO)
def test_trains_once_and_serves_the_benchmarks(name, tmp_path, monkeypatch):
    folder = train.train(name, tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(train, "fit", None)
    assert train.train(name, tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before

    work = workloads.workload(WORKLOADS.get(name, name), folder, heldout=4)
    assert type(work.model) is train.ZOO[name].model
    assert math.isfinite(work.task(work.model))
    for batch in [*work.batches(0, 2, 3), *work.heldout]:
        assert "labels" not in batch
        outputs = work.model(**batch)
        output = outputs.image_embeds if name == "clip" else outputs.logits
        assert len({len(output), *map(len, batch.values())}) == 1
    same, again, other = (work.batches(seed, 2, 3) for seed in (0, 0, 1))
    key = work.model.main_input_name
    assert all(torch.equal(a[key], b[key]) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[0][key], other[0][key])


def test_same_seed_same_bits(tmp_path):
    found = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)  # what was drawn before does not matter
        folder = train.train("vit", tmp_path / str(i), seed)
        found.append(json.loads((folder / "train.json").read_text())["weights_sha256"])
    assert found[0] == found[1] != found[2]


def test_other_settings_are_trained_anew(tmp_path, monkeypatch):
    folder = train.train("vit", tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    changed = dataclasses.replace(train.ZOO["vit"], learning_rate=1e-2)
    monkeypatch.setitem(train.ZOO, "vit", changed)
    train.train("vit", tmp_path)
    assert (folder / "model.safetensors").read_bytes() != before


def test_a_model_that_is_not_there_says_how_to_train_it(tmp_path):
    with pytest.raises(SystemExit, match=r"train\.py swin"):
        train.load("swin", tmp_path)


def test_cut_spans_fit_into_their_gaps():
    batch, said = denoising.examples("test", 20, seed=3)
    text = stdlib_bytes.sequences("test", 20, denoising.LENGTH, seed=3)
    for kept, spans, original in zip(batch["input_ids"], said, text, strict=True):
        pieces = {}
        for token in spans.tolist():
            if token >= denoising.PAD:
                piece = pieces.setdefault(token, [])
            else:
                piece.append(token)
        assert pieces.pop(denoising.END) == []
        assert len(pieces) == denoising.SPANS
        restored = [b for token in kept.tolist() for b in pieces.get(token, [token])]
        assert restored == original.tolist()


def test_a_uniform_model_needs_eight_bits():
    tokens = stdlib_bytes.sequences("test", 4)

    def opt(input_ids, labels):
        logits = torch.zeros(*labels.shape, 256)[:, 1:].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss)

    opt.eval = lambda: None
    assert stdlib_bytes.bits_per_byte(opt, tokens, batch_size=3) == pytest.approx(8)

    batch, said = denoising.examples("test", 4)
    model = train.ZOO["t5"].model(train.ZOO["t5"].config)
    torch.nn.init.zeros_(model.lm_head.weight)
    bits = denoising.bits_per_byte(model, batch, said)
    assert bits == pytest.approx(math.log2(denoising.SENTINEL + denoising.SPANS), rel=1e-5)


def test_zero_shot_finds_the_nearest_caption():
    labels = torch.arange(10)

    class Oracle:
        """Embeds a caption by the digit it names, and image i as digit i + `off`."""

        def __init__(self, off):
            self.off = off

        def eval(self):
            return self

        def __call__(self, input_ids, attention_mask, pixel_values):
            words = {index: word for word, index in captions.VOCABULARY.items()}
            texts = [[words[i] for i in row if i in words] for row in input_ids.tolist()]
            named = [
                next(i for i in range(10) if {captions.NAMES[i], str(i)} & set(text))
                for text in texts
            ]
            eye = torch.eye(10)
            images = eye[(torch.arange(len(pixel_values)) + self.off) % 10]
            return SimpleNamespace(text_embeds=eye[named], image_embeds=images)

    pixels = digits.load_split()[0][:10]
    assert captions.zero_shot_accuracy(Oracle(0), pixels, labels) == 1
    assert captions.zero_shot_accuracy(Oracle(1), pixels, labels) == 0


def test_captions_end_where_clip_pools():
    ids = captions.describe(torch.arange(10))["input_ids"]
    assert train.ZOO["clip"].config.text_config.eos_token_id == captions.END != 2
    assert ((ids == captions.END).sum(1) == 1).all()
    assert (ids.max(1).values == captions.END).all()
