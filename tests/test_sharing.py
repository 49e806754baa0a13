"""Extracted models go through transformers' own calls, copies and pickles, or are refused."""

import copy
import io
import json
import pickle
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import solpath
from conftest import batches, build, inputs
from plans import random_plan
from solpath.errors import ConfigError, FileError, UnsupportedModelError
from solpath.planning.plan import plan_of
from solpath.running.forward import forward
from solpath.storing.writing import contents_of, write

# A tied head, kept couples, gains of norms, a fused attention, towers, an encoder and its decoder.
LABELS = ["bert", "camembert", "qwen3", "gpt2", "clip", "siglip_vision_model", "t5", "albert"]


def shrink(label):
    model = build(label)
    return solpath.extract(model, random_plan(model, [0.5, 0.0, 1.0, 0.6]))


def output(model):
    with torch.no_grad():
        return forward(model, inputs(model))


def assert_same(one, two):
    assert type(one) is type(two)
    assert plan_of(one).to_dict() == plan_of(two).to_dict()
    for name in ("state_dict", "named_buffers"):
        ours, theirs = (dict(getattr(model, name)()) for model in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(theirs[key], value) for key, value in ours.items())
    assert torch.equal(output(one), output(two))


@pytest.mark.parametrize("label", LABELS)
def test_transformers_saves_and_loads_it(label, tmp_path):
    small = shrink(label)
    small.save_pretrained(tmp_path)
    assert_same(small, solpath.load(tmp_path))
    options = {} if label != "bert" else {"device_map": "cpu"}
    loaded = type(small).from_pretrained(tmp_path, **options)
    assert_same(small, loaded)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path)  # over what is there
    assert_same(small, solpath.load(tmp_path, verify=True))


@pytest.mark.parametrize("label", LABELS)
def test_copies_and_pickles(label):
    small = shrink(label)
    assert_same(small, copy.deepcopy(small))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert_same(small, torch.load(file, weights_only=False))


def test_a_copy_saves_itself(tmp_path):
    small = shrink("bert")
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.embeddings.word_embeddings.weight.zero_()
    other.save_pretrained(tmp_path)
    assert_same(other, solpath.load(tmp_path))


def test_another_process_gets_it(tmp_path):
    small = shrink("qwen3")
    small.save_pretrained(tmp_path / "saved")
    (tmp_path / "model").write_bytes(pickle.dumps((small, inputs(small), output(small))))
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        "model, batch, wanted = pickle.load(open(sys.argv[1] + '/model', 'rb'))\n"
        "from transformers import AutoModelForCausalLM\n"
        "again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/saved')\n"
        "for one in (model, again):\n"
        "    with torch.no_grad(): assert torch.equal(one(**batch).logits, wanted)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


def test_auto_classes_give_the_saved_model(tmp_path):
    small = shrink("camembert")
    small.save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(small, auto)
    half = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    )
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for kind in (transformers.AutoModel, transformers.AutoModelForTokenClassification):
        with pytest.raises(UnsupportedModelError, match=r"not a Camembert.*solpath\.load"):
            kind.from_pretrained(tmp_path)


def test_a_model_without_its_pooler_is_not_given_a_random_one(tmp_path):
    config = build("bert").config
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    small = solpath.extract(model, random_plan(model, [0.5]))
    small.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="add_pooling_layer=False"):
        transformers.AutoModel.from_pretrained(tmp_path)
    assert_same(small, transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False))


def test_a_folder_of_an_older_version_is_read_as_ever(tmp_path):
    small = shrink("bert")
    contents = contents_of(small)
    del contents.config["quantization_config"]
    write(contents, tmp_path, None, "5GB")
    assert_same(small, solpath.load(tmp_path, verify=True))


def test_a_changed_folder_is_refused(tmp_path):
    shrink("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    with pytest.raises(FileError, match=r"config\.json"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_other_files_stay_and_stale_shards_go(tmp_path):
    small = shrink("bert")
    (tmp_path / "training_args.bin").write_text("mine")
    small.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(small, transformers.AutoModel.from_pretrained(tmp_path))
    small.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"training_args.bin", "config.json", "model.safetensors", "solpath.json"}


def test_what_a_killed_save_left_is_swept(tmp_path):
    left = tmp_path / ".solpath-tmp-0123456789abcdef"
    left.mkdir()
    (left / "model.safetensors").write_text("half of it")
    shrink("bert").save_pretrained(tmp_path)
    assert not left.exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_a_dense_model_is_saved_as_ever(tmp_path):
    dense = build("bert")
    dense.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").exists()
    assert not (tmp_path / "solpath.json").exists()


def test_arguments_of_transformers(tmp_path):
    small = shrink("bert")
    small.save_pretrained(tmp_path / "no", is_main_process=False, token="t")
    assert not (tmp_path / "no").exists()
    for options, message in {
        "variant": ({"variant": "fp16"}, "folder of its own"),
        "push": ({"push_to_hub": True}, "push_to_hub"),
        "distributed": ({"distributed_checkpoint": True}, "gather the weights"),
        "pickle": ({"safe_serialization": False}, "safetensors"),
        "unknown": ({"sharding": 3}, "takes no sharding"),
        "partial": ({"state_dict": {}}, "state_dict lacks"),
        "shape": (
            {"state_dict": {n: t[..., :1] for n, t in small.state_dict().items()}},
            r"is torch\.float32 \[60, 1\], not torch\.float32 \[60, 32\]",
        ),
    }.values():
        with pytest.raises(ConfigError, match=message):
            small.save_pretrained(tmp_path / "no", **options)
    zeros = {name: torch.zeros_like(value) for name, value in small.state_dict().items()}
    small.save_pretrained(tmp_path, state_dict=zeros)
    assert not any(p.any() for p in solpath.load(tmp_path).parameters())


def test_push_to_hub_of_the_model_uploads_the_same_folder(monkeypatch, tmp_path):
    small, found = shrink("bert"), {}

    def upload(self, folder, *args, **kwargs):
        found["model"] = solpath.load(folder)

    monkeypatch.setattr(type(small), "_upload_modified_files", upload)
    hub = sys.modules["transformers.utils.hub"]
    monkeypatch.setattr(hub, "hf_api", lambda: _Api())
    card = huggingface_hub.ModelCard("")
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: card)
    small.push_to_hub("me/small")
    assert_same(small, found["model"])


class _Api:
    repo_id = "me/small"

    def create_repo(self, *args, **kwargs):
        return self


@pytest.fixture
def no_accelerator_left():
    """A Trainer sets accelerate up for the whole process, and other tests look at that."""
    yield
    AcceleratorState._reset_state()


def test_checkpoints_of_a_trainer(tmp_path, no_accelerator_left):
    small = shrink("camembert")
    data = [
        {name: value[0] for name, value in batch.items()} | {"labels": torch.tensor(0)}
        for batch in batches(small, 8)
    ]

    def trainer(model, steps):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        return transformers.Trainer(model, arguments, train_dataset=data)

    whole = trainer(copy.deepcopy(small), 4)
    whole.train()
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        read = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert_same(read, solpath.load(folder, verify=True))
    assert torch.equal(output(read), output(whole.model.eval()))
    again = trainer(copy.deepcopy(small), 4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(output(again.model.eval()), output(whole.model.eval()))


def test_importing_solpath_imports_neither_torch_nor_transformers():
    code = "import sys, solpath; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("label", ["llama", "qwen3"])
def test_weights_of_other_units_are_refused(label, weights_only):
    """Of rotary couples and norms, the weights do not tell which units they are."""
    dense = build(label)
    small, other = (solpath.extract(dense, random_plan(dense, [0.5], seed=s)) for s in (0, 1))
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    weights = torch.load(file, weights_only=weights_only)
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn keeps other units"):
        other.load_state_dict(weights)
    again = solpath.extract(dense, random_plan(dense, [0.5], seed=0))
    assert again.load_state_dict(weights)
    batch = inputs(dense)
    assert torch.equal(again(**batch).logits, small(**batch).logits)
    again.load_state_dict(dict(weights))  # without metadata nobody can tell
