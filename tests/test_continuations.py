"""What decoders write after prompts: each prompt alone, to the end of its text."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import solpath
from conftest import build, inputs
from plans import random_plan
from solpath.cli.main import run
from solpath.errors import BatchError, ConfigError, UnsupportedModelError
from solpath.reporting.continuations import continuations
from test_report import make_family

PROMPTS = ["w5 w7 w9", "w1"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def text(model, prompt, count):
    """The likeliest token again and again, by plain forward passes."""
    ids = [int(word[1:]) for word in prompt.split()]
    given = len(ids)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[given:]


def test_lines_are_the_likeliest_tokens_of_every_model(tokenizer):
    model = build("llama")
    small = solpath.extract(model, random_plan(model, (0.5, 0.75)))
    found = continuations({"dense": model, "s40": small}, tokenizer, PROMPTS, tokens=6)
    assert [one.prompt for one in found] == PROMPTS
    for one in found:
        tokens = [text(each, one.prompt, 6) for each in (model, small)]
        assert [line.name for line in one.lines] == ["dense", "s40"]
        for line, expected in zip(one.lines, tokens, strict=True):
            assert line.text.split() == [f"w{token}" for token in expected]
            same = [a == b for a, b in zip(expected, tokens[0], strict=True)]
            assert line.agreed == [*same, False].index(False)
            assert line.tokens == 6


def test_a_text_ends_at_its_end(tokenizer):
    model = build("llama")
    third = text(model, PROMPTS[0], 6)[2]
    model.generation_config.eos_token_id = [59, third]
    [found] = continuations({"dense": model}, tokenizer, PROMPTS[:1], tokens=6)
    assert found.lines[0].tokens == text(model, PROMPTS[0], 6).index(third) + 1


def test_what_cannot_go_on_is_refused(tokenizer):
    model = build("llama")
    for arguments in ({}, PROMPTS), ({"dense": model}, []):
        with pytest.raises(ConfigError, match="at least one model and one prompt"):
            continuations(arguments[0], tokenizer, arguments[1])
    with pytest.raises(UnsupportedModelError, match="dense: a BertModel cannot generate"):
        continuations({"dense": build("bert")}, tokenizer, PROMPTS)
    with pytest.raises(BatchError, match="prompt 1 has no tokens"):
        continuations({"dense": model}, tokenizer, ["w1", " "], tokens=2)
    with pytest.raises(ConfigError, match="a prompt of 3 tokens and 38 new ones"):
        continuations({"dense": model}, tokenizer, PROMPTS, tokens=38)


def test_the_report_command_adds_them(tokenizer, tmp_path):
    model, dense = build("llama"), tmp_path / "dense"
    path = solpath.baselines.magnitude(model, [inputs(model)])
    path.save(tmp_path / "path")
    tokenizer.save_pretrained(dense)
    model.save_pretrained(dense)
    family = make_family(path)
    family["members"] = family["members"][:2]
    [name] = [member["name"] for member in family["members"][1:]]
    small = solpath.extract(model, path.plan(sparsity=0.2))
    solpath.save(small, tmp_path / "models" / name)
    (tmp_path / "family.json").write_text(json.dumps(family))
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert run(["report", str(tmp_path), *prompts]) == 2
    assert run(["report", str(tmp_path), *prompts, "--dense", str(dense)]) == 0
    page = (tmp_path / "report.html").read_text()
    [first, _] = json.loads((tmp_path / "family.json").read_text())["continuations"]
    assert first["prompt"] == PROMPTS[0]
    assert first["lines"][1]["text"] in page
