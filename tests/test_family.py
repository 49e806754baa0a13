"""Families judged at their task, and choices of compensated members, as a user types them."""

import csv
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import conftest
import solpath
from conftest import build
from solpath.cli.arguments import Data
from solpath.cli.main import run
from solpath.cli.splits import choice_batches, split_batches
from solpath.data.samples import sample_digests
from solpath.data.source import batch_size
from solpath.errors import ConfigError
from solpath.reporting import tasks
from solpath.reporting.family import Family
from solpath.reporting.scores import Scores

pytest.importorskip("datasets")
pytest.importorskip("sklearn")


def saved(model, folder: Path, pad: bool = True) -> str:
    """Save a model with a tokenizer of numbers, and return its folder."""
    names = ["[PAD]", "[UNK]", "[END]", *map(str, range(3, 70))]
    known = {name: i for i, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given = {"pad_token": "[PAD]"} if pad else {}
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]", **given).save_pretrained(
        folder
    )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a classifier, a decoder without padding, rows with labels, and pairs."""
    folder = tmp_path_factory.mktemp("families")
    torch.manual_seed(0)
    dense = build("bert", num_hidden_layers=1, vocab_size=70)
    sized = {**dense.config.to_dict(), "num_labels": 2, "initializer_range": 0.5}
    sized = type(dense.config)(
        **{k: v for k, v in sized.items() if k not in ("id2label", "label2id")}
    )
    saved(BertForSequenceClassification(sized), folder / "bert")
    config = build("llama", vocab_size=70, num_hidden_layers=1).config
    saved(LlamaForCausalLM(config), folder / "llama", pad=False)
    rows = random.Random(0)
    texts = [" ".join(str(rows.randrange(3, 70)) for _ in range(3 + i % 5)) for i in range(400)]
    texts[200:210] = texts[:10]  # some rows come twice
    with (folder / "rows.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "label"])
        lines.writerows((text, i % 2) for i, text in enumerate(texts))
    pairs = [{"anchor": texts[i], "positive": texts[i + 1] if i % 9 else " "} for i in range(240)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    for name, model in (("bert", BertForSequenceClassification), ("llama", LlamaForCausalLM)):
        loaded = model.from_pretrained(folder / name)
        batch = [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]
        solpath.baselines.magnitude(loaded, batch).save(folder / f"{name}-path")
    return folder


_SIZE = ["--length", "8", "--batch-size", "8"]


def test_a_classifier_is_judged_by_its_accuracy(home, tmp_path, capsys):
    words = ["family", str(home / "bert"), str(home / "bert-path"), *_SIZE]
    words += ["--data", str(home / "rows.csv"), "--sizes", "0.4", "--compensate"]
    out = tmp_path / "family"
    assert run([*words, "--task", "classification", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("accuracy") < shown.index(" kl")
    family = Family.read(out)
    assert [one.key for one in family.metrics][:3] == ["accuracy", "f1_macro", "kl"]
    held = split_batches(
        str(home / "bert"), BertForSequenceClassification.from_pretrained(home / "bert"),
        Data(data=[str(home / "rows.csv")], length=8, batch_size=8), 0, labels=True,
    ).heldout  # fmt: skip
    member = family.members[1]
    found = tasks.classification(solpath.load(out / "models" / "s40"), held)
    assert member.metrics["accuracy"] == pytest.approx(found.metrics["accuracy"])
    low, high = member.intervals["accuracy"]
    assert 0 <= low < found.metrics["accuracy"] < high <= 1
    assert [low, high] == pytest.approx(found.intervals["accuracy"])
    assert family.judged.samples == sum(map(batch_size, held))
    page = (out / "report.html").read_text()
    assert page.index("<h3>Accuracy</h3>") < page.index("<h3>KL from the dense model")


def test_a_decoder_is_judged_by_its_perplexity(home, tmp_path):
    words = ["family", str(home / "llama"), str(home / "llama-path"), *_SIZE]
    words += ["--data", str(home / "rows.csv"), "--sizes", "0.4", "--task", "language-modeling"]
    assert run([*words, "--out", str(tmp_path / "family")]) == 0
    family = Family.read(tmp_path / "family")
    assert family.metrics[0].key == "perplexity"
    assert family.metrics[0].lower
    low, high = family.members[1].intervals["perplexity"]
    assert low < family.members[1].metrics["perplexity"] < high
    assert "Perplexity, lower is better" in (tmp_path / "family" / "report.html").read_text()


def test_texts_are_found_by_the_other_half_of_their_pair(home, tmp_path):
    """By an encoder, which takes both halves as rows; the pairs are those held out, no others."""
    name = saved(build("bert", num_hidden_layers=1, vocab_size=70), tmp_path / "encoder")
    model = solpath.pretrained.from_pretrained(name)
    solpath.baselines.magnitude(model, conftest.batches(model)).save(tmp_path / "path")
    words = ["family", name, str(tmp_path / "path"), "--data", str(home / "pairs.jsonl"), *_SIZE]
    words += ["--sizes", "0.4", "--task", "retrieval", "--out", str(tmp_path / "family")]
    assert run(words) == 0
    assert Family.read(tmp_path / "family").metrics[0].key == "recall@1"
    data = Data(data=[str(home / "pairs.jsonl")], length=8, batch_size=8)
    split = split_batches(name, model, data, 0)
    tokenizer = solpath.pretrained.load_processor(name)

    def known(batches):
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for b in batches
                 for ids in b["input_ids"])  # fmt: skip
        return {" ".join(text.split()) for text in texts}

    held = known(split.heldout)
    assert len(split.pairs) >= 5
    assert all(text in held for pair in split.pairs for text in pair)


def test_members_are_refitted_apart_from_what_they_are_chosen_by(home, tmp_path, capsys):
    for name in ("bert", "llama"):
        model = solpath.pretrained.from_pretrained(str(home / name))
        data = Data(data=[str(home / "rows.csv")], length=8, batch_size=8)
        split = choice_batches(str(home / name), model, data, labels=False, fit=True, device="cpu")
        fitted, judged = (
            {digest for batch in part for digest in sample_digests(batch)}
            for part in (split.batches, split.heldout)
        )
        assert len(judged) >= 190  # a row each, of a decoder too
        assert not fitted & judged
        assert split.heldout[0]["attention_mask"].sum(1).unique().numel() > 1
    choice, member = tmp_path / "choice.json", tmp_path / "member"
    words = ["choose", str(home / "llama"), str(home / "llama-path"), *_SIZE, "--compensate"]
    words += ["--data", str(home / "rows.csv"), "--max-loss", "0.9", "--sizes", "0.1"]
    capsys.readouterr()
    assert run([*words, "--out", str(choice), "--save", str(member)]) == 0
    assert f"Next: solpath export {member}" in capsys.readouterr().out
    found = json.loads(choice.read_text())
    assert found["sparsity"] == 0.1
    assert any("is compensated" in text for text in found["assumptions"])
    small = solpath.load(member)
    cut = solpath.extract(model, solpath.SolutionPath.load(home / "llama-path").plan(sparsity=0.1))
    changed = [name for name, value in cut.state_dict().items()
               if not torch.equal(value, small.state_dict()[name])]  # fmt: skip
    assert changed
    assert (member / "settings.toml").exists()
    assert run([*words, "--limit", "30"]) == 2
    assert "members are fitted on half of the data" in capsys.readouterr().err


def test_data_of_the_search_is_named(home, tmp_path, capsys):
    path = tmp_path / "path"
    words = [str(home / "bert"), "--data", str(home / "rows.csv"), *_SIZE]
    assert run(["search", *words, "--method", "random", "--out", str(path)]) == 0
    words.insert(1, str(path))
    capsys.readouterr()
    choice = tmp_path / "choice.json"
    bound = ["--max-loss", "0.9", "--sizes", "0.1", "--out", str(choice)]
    assert run(["choose", *words, *bound]) == 0
    said = capsys.readouterr().err
    assert "was searched on this data, too" in said
    assert "was searched on this data, too" in json.loads(choice.read_text())["assumptions"][-1]
    [left] = re.findall(r"left out (\d+) rows that the search saw", said)
    assert int(left) >= len(solpath.SolutionPath.load(path).seen) > 0
    words[1] = str(tmp_path / "all")
    assert run(["search", *words[:1], *words[2:], "--steps", "100", "--out", words[1]]) == 0
    assert run(["choose", *words, "--max-loss", "0.9"]) == 2
    assert "the search saw all 400 rows of the data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "data", "words"),
    [
        ("classification", "pairs.jsonl", "no column that could be the label"),
        ("classification", None, "there are no labels without data"),
        ("language-modeling", "rows.csv", "does not predict the next token"),
        ("retrieval", "rows.csv", "retrieval needs pairs"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(task, data, words, home, tmp_path, capsys):
    given = [] if data is None else ["--data", str(home / data), *_SIZE]
    arguments = ["family", str(home / "bert"), str(home / "bert-path"), "--task", task, *given]
    assert run([*arguments, "--out", str(tmp_path / "family")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "family").exists()


def test_any_task_comes_first_and_a_family_is_whole_or_not_there(tmp_path):
    model = build("bert", num_hidden_layers=1)
    data = conftest.batches(model)
    path = solpath.baselines.magnitude(model, data)
    options = {"sizes": [0.5], "repeats": 1, "progress": False}
    family = solpath.make_family(
        model, path, data, tmp_path / "one", task=lambda model: 0.25, **options
    )
    assert [one.key for one in family.metrics][:2] == ["task", "cosine"]
    assert family.members[1].metrics["task"] == 0.25
    family = solpath.make_family(
        model, path, data, tmp_path / "two", **options,
        task=lambda model: Scores({"errors @1": 3}, {"errors @1": [2, 4]}, {"errors @1"}),
    )  # fmt: skip
    assert family.metrics[0].lower
    assert Family.read(tmp_path / "two") == family
    assert "errors @1, lower is better" in (tmp_path / "two" / "report.html").read_text()
    for task, words in (
        (lambda model: {"cosine": 1.0}, "both the task and the distance give 'cosine'"),
        (lambda model: float("nan"), "task=nan for dense"),
        (lambda one: {"a": 1} if one is model else {"b": 1}, "same metrics for all models"),
    ):
        with pytest.raises(ConfigError, match=words):
            solpath.make_family(model, path, data, tmp_path / "no", task=task, **options)
        assert not (tmp_path / "no").exists()


def test_a_tie_is_no_find():
    found = tasks._recall(torch.ones(4, 4))
    assert found.metrics == {"recall@1": 0.0}
    found = tasks._recall(torch.eye(6))
    assert found.metrics == {"recall@1": 1.0, "recall@5": 1.0}
    assert found.intervals["recall@1"][0] < 1


def test_rows_of_one_document_are_one_draw(home, tmp_path, capsys):
    """By a column, and both texts of a pair; no group is both fitted on and judged by."""
    with (home / "rows.csv").open() as stream:
        rows = list(csv.DictReader(stream))[:200]  # of which none comes twice
    for i, row in enumerate(rows):
        row["patient"] = f"p{i // 4}"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Data(data=[str(tmp_path / "rows.jsonl")], column=["group=patient"], length=8,
                batch_size=8, batches=5)  # fmt: skip
    name, path = str(home / "bert"), str(home / "bert-path")
    model = BertForSequenceClassification.from_pretrained(name)
    for fit in (False, True):
        split = choice_batches(name, model, data, labels=False, fit=fit, device="cpu")
        assert len(split.groups) == sum(map(batch_size, split.heldout)) == 40
        tokenizer = solpath.pretrained.load_processor(name)
        of = {row["text"]: row["patient"] for row in rows}

        def patients(batches, tokenizer=tokenizer, of=of):
            return [of[tokenizer.decode(ids, skip_special_tokens=True)] for batch in batches
                    for ids in batch["input_ids"]]  # fmt: skip

        assert patients(split.heldout) == list(split.groups)
        assert not set(patients(split.batches)) & set(split.groups)
        assert bool(split.batches) == fit
    words = ["choose", name, path, "--data", str(tmp_path / "rows.jsonl"), *_SIZE, "--json"]
    words += ["--max-loss", "0.9", "--sizes", "0.1"]
    capsys.readouterr()
    assert run([*words, "--column", "group=patient"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["groups"] == len({row["patient"] for row in rows})
    assert "groups are independent" in found["assumptions"][0]
    encoder = saved(build("bert", num_hidden_layers=1, vocab_size=70), tmp_path / "encoder")
    pairs = Data(data=[str(home / "pairs.jsonl")], length=8, batch_size=8)
    dense = solpath.pretrained.from_pretrained(encoder)
    split = choice_batches(encoder, dense, pairs, labels=False, fit=False, device="cpu")
    assert (len(set(split.groups)), len(split.groups)) == (240, 480 - 27)  # 27 halves are blank
    assert run(["search", name, "--out", str(tmp_path / "path"), *words[3:7],
                "--column", "group=patient"]) == 2  # fmt: skip
    assert "is for solpath choose" in capsys.readouterr().err


def test_the_score_at_a_task_has_an_interval(home, capsys):
    words = ["eval", str(home / "bert"), "--reference", str(home / "bert"), *_SIZE]
    words += ["--data", str(home / "rows.csv"), "--task", "classification"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["task"]
    low, high = found["intervals"]["model"]["accuracy"]
    assert 0 <= low < found["model"]["accuracy"] < high <= 1
    assert run(words) == 0
    assert f"{low:.4f} to {high:.4f}" in " ".join(capsys.readouterr().out.split())
