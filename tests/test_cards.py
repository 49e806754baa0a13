"""Every exported folder has a card: what was cut, how it is loaded, and where it came from."""

import json
import re

import huggingface_hub
import pytest
import transformers

import solpath
from conftest import build, inputs
from solpath import baselines
from solpath.cli.main import run
from solpath.errors import ConfigError
from solpath.exporting.export import FORMATS, RECORD
from solpath.exporting.origin import Origin, origin_of

NEEDS = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino",), "gguf": ("gguf",)}
TARGETS = {"hub": "vllm"}
CARD = (
    "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nbase_model: org/first\n---\n"
)


def cut(folder=None, target=None, card=CARD):
    """A small LLaMA, of a dense one that lay in a folder with a card."""
    model = build("llama", intermediate_size=128)
    if folder is not None:
        model.save_pretrained(folder)
        (folder / "README.md").write_text(card)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    path = baselines.magnitude(model, [inputs(model)])
    return solpath.extract(model, path.plan(sparsity=0.3, for_=target))


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_writes_a_card(tmp_path, format):
    for package in NEEDS.get(format, ()):
        pytest.importorskip(package)
    small = cut(tmp_path / "dense", TARGETS.get(format, format))
    made = solpath.export(small, tmp_path / "out", format)
    text = (made.folder / "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "mine", "LICENSE")
    assert data.base_model == "org/first"
    assert data.library_name == FORMATS[format].library
    share = small.solpath_plan.achieved.params_share
    assert f"# LlamaForCausalLM with {100 * share:.1f} % of its parameters\n" in text
    assert f"{max(row.difference for row in made.parity):.1e} of its largest value" in text
    assert "not measured" in text
    assert str(tmp_path) not in text
    origin = json.loads((made.folder / RECORD).read_text())["origin"]
    assert origin == {"base": "", "ancestors": ["org/first"], "license": {
        "license": "other", "license_name": "mine", "license_link": "LICENSE"}}  # fmt: skip
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "card", "exec")
        loaded = code.split("\noutputs = ")[0].split("\ntokens = ")[0]
        if "llama_cpp" not in code and "trust_remote_code" not in code:  # the latter in test_hub.py
            exec(loaded, {"folder": made.folder})


def test_a_gguf_file_says_where_it_came_from(tmp_path):
    gguf = pytest.importorskip("gguf")
    small = cut(tmp_path / "dense", "gguf")
    solpath.export(small, tmp_path / "out", "gguf")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    expected = {
        "name": "LlamaForCausalLM cut by solpath",
        "license": "other",
        "license.name": "mine",
        "license.link": "LICENSE",
        "base_model.count": 1,
        "base_model.0.name": "first",
        "base_model.0.organization": "org",
        "base_model.0.repo_url": "https://huggingface.co/org/first",
        "tags": ["pruned"],
    }
    assert {name: fields[f"general.{name}"].contents() for name in expected} == expected
    size = small.solpath_plan.achieved
    assert f"{size.params_share:.1%} of the" in fields["general.description"].contents()
    small.config._name_or_path = str(tmp_path / "out" / "model.gguf")
    found = origin_of(small)
    assert found.ancestors == ("org/first",)
    assert found.license["license_name"] == "mine"


def test_what_is_not_known_is_not_said(tmp_path):
    small = cut()
    assert origin_of(small) == Origin()
    for name in ("models/llama", "gone", "'''__import__('os')", "../up", ""):
        small.config._name_or_path = name  # a folder that is gone looks like a name on the Hub
        assert origin_of(small) == Origin()
    for card in ("no metadata", "---\nlicense: [\n---\n", "---\nbase_model: a b\n---\n"):
        assert origin_of(cut(tmp_path / "dense", card=card)) == Origin()
    solpath.export(small, tmp_path / "out", "hub")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in text.split("---")[1]
    assert "license" not in text.split("---")[1]
    assert "is not known here" in text


def test_a_name_counts_if_the_cache_of_the_hub_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--org--dense"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "snapshots" / "abc" / "config.json").write_text("{}")
    (home / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    small = cut()
    small.config._name_or_path = "org/dense"
    known = Origin("org/dense", (), {"license": "mit"})
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file, find=huggingface_hub.try_to_load_from_cache: find(
            name, file, cache_dir=tmp_path / "hub"
        ),
    )
    assert origin_of(small) == known
    solpath.save(small, tmp_path / "small")  # as the command line does, in two steps
    assert origin_of(solpath.load(tmp_path / "small")) == known


def test_an_evaluation_is_shown_and_must_be_of_this_model(tmp_path):
    model = build("bert")
    path = baselines.magnitude(model, [inputs(model)])
    small, other = (solpath.extract(model, path.plan(sparsity=s)) for s in (0.4, 0.2))
    found = solpath.evaluate({"small": small, "other": other}, model, [inputs(model)])
    solpath.export(small, tmp_path / "out", "hub", evaluation=found["small"])
    text = (tmp_path / "out" / "README.md").read_text()
    low, high = found["small"].intervals["cosine"]
    shown = f"| cosine | {found['small'].metrics['cosine']:.4g} | {low:.4g} to {high:.4g} |"
    assert shown in text
    assert f"on {found['small'].samples} held-out samples" in text
    assert "not measured" not in text
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["evaluation"]["metrics"] == found["small"].metrics
    for wrong, message in (
        (found["other"], r"of a model of [\d,]+ parameters, and a model of [\d,]+ parameters"),
        (solpath.evaluate(model, model, [inputs(model)]), "of the dense model, and"),
        ({"cosine": 1.0}, "must be what solpath.evaluate returned"),
    ):
        with pytest.raises(ConfigError, match=message):
            solpath.export(small, tmp_path / "no", "hub", evaluation=wrong)
    assert not (tmp_path / "no").exists()


def test_the_command_takes_what_eval_printed(tmp_path, capsys):
    model = build("bert")
    path = baselines.magnitude(model, [inputs(model)])
    small, other = (solpath.extract(model, path.plan(sparsity=s)) for s in (0.4, 0.2))
    solpath.save(small, tmp_path / "small")
    scores = {"model": {"accuracy": 0.875}, "dense": {"accuracy": 0.9375}}
    ends = {"model": {"accuracy": [0.75, 0.9375]}, "dense": {}}
    task = {"task": {"name": "classification", **scores, "intervals": ends}}
    value = solpath.evaluate(small, model, [inputs(model)]).to_dict() | task
    file = tmp_path / "eval.json"
    low, high = value["intervals"]["cosine"]

    def exported(written, folder="no"):
        file.write_text(json.dumps(written))
        arguments = ["export", str(tmp_path / "small"), "--out", str(tmp_path / folder)]
        code = run([*arguments, "--format", "hub", "--evaluation", str(file)])
        return code, " ".join(capsys.readouterr().err.split())

    assert exported(value, "out")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"| cosine | {value['metrics']['cosine']:.4g} | {low:.4g} to {high:.4g} |" in text
    assert "| classification accuracy | 0.875 | 0.75 to 0.9375 |" in text
    assert "| classification accuracy, dense model | 0.9375 |" in text
    record = json.loads((tmp_path / "out" / RECORD).read_text())["evaluation"]
    known = value["intervals"] | {"classification accuracy": (0.75, 0.9375)}
    assert record["intervals"] == json.loads(json.dumps(known))
    for wrong, message in (
        (solpath.evaluate(other, model, [inputs(model)]).to_dict(), "is of a model of"),
        ({}, "cost is missing"),
        (value | {"metrics": {"cosine": "1"}}, "metrics.cosine is not a number"),
        (value | {"metrics": [1]}, "metrics is no object"),
        (value | {"samples": 0}, "0 is not a whole number"),
        (value | {"cost": [1]}, "cost is no object"),
        (value | {"cost": {"params": 1}}, "achieved.bytes is missing"),
        (value | {"intervals": {"cosine": [1]}}, "intervals.cosine is not the two ends"),
        (value | {"task": {"name": "x", "model": 1}}, "task is not a name and scores"),
    ):
        code, error = exported(wrong)
        assert code == 2
        assert str(file) in error
        assert message in error
    assert not (tmp_path / "no").exists()


def test_lost_heads_are_in_the_card(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = build("vit")
    path = baselines.magnitude(model, [inputs(model)])
    small = solpath.extract(model, path.plan(sparsity=0.4, whole_groups=True))
    solpath.export(small, tmp_path / "out", "onnx")
    kept = [len(heads) for heads in small.solpath_plan.heads.values()]
    text = (tmp_path / "out" / "README.md").read_text()
    [row] = [line for line in text.splitlines() if line.startswith("| heads of value")]
    assert f" {min(kept)}" in row
