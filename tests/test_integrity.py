"""What is read was written as it is: digests, one version at a time, and values that can be."""

import hashlib
import json
import os
import random
import shutil
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import solpath
from conftest import batches, build, inputs
from solpath.errors import FileError, FingerprintError, SolpathError
from solpath.planning.path import SolutionPath
from solpath.pretrained import from_pretrained, load_processor
from solpath.reading import one_version, sealed
from solpath.running import checkpoint as checkpoints

SEARCH = solpath.SearchConfig(steps=4, scale_batches=1, basis="principal")
TUNE = solpath.TuneConfig(steps=2, evaluate_every=1, learning_rate=1e-3)


def search(model, folder):
    return solpath.search(model, batches(model), SEARCH, checkpoint=folder, progress=False)


def tune(model, small, folder):
    held = [inputs(model, seed=9)]
    options = {"heldout": held, "checkpoint": folder, "progress": False}
    return solpath.tune(small, model, batches(model), TUNE, **options)


@pytest.fixture
def path(bert, tmp_path):
    """A path in ``tmp_path / "path"``, whose search left its checkpoint beside it."""
    found = search(bert, tmp_path / "state")
    found.save(tmp_path / "path")
    return found


@pytest.mark.parametrize("name", ["path.json", "path.safetensors"])
def test_no_changed_bit_of_a_path_is_accepted(path, tmp_path, name):
    file, draw = tmp_path / "path" / name, random.Random(0)
    data = file.read_bytes()
    for _ in range(200):
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        with pytest.raises(FileError):
            SolutionPath.load(tmp_path / "path")
    file.write_bytes(data)
    assert SolutionPath.load(tmp_path / "path").order().equal(path.order())


def test_no_changed_bit_of_a_checkpoint_is_accepted(bert, path, tmp_path):
    small = solpath.extract(bert, path.plan(sparsity=0.5))
    tune(bert, small, tmp_path / "state")
    draw = random.Random(0)
    runs = {"search": search, "tune": lambda model, folder: tune(model, small, folder)}
    for name, run in runs.items():
        file = tmp_path / "state" / f"{name}.safetensors"
        data = file.read_bytes()
        for _ in range(15):
            at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
            file.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            with pytest.raises((FileError, FingerprintError)):
                run(bert, tmp_path / "state")


def test_readers_during_a_rewrite_see_one_version(bert, path, tmp_path):
    other = solpath.baselines.random(bert, batches(bert))
    orders = {one.method: one.order() for one in (path, other)}
    cut = [solpath.extract(bert, path.plan(sparsity=size)) for size in (0.3, 0.6)]
    models = {model.solpath_plan.achieved.params: model for model in cut}
    solpath.save(cut[0], tmp_path / "model")
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for one, model in zip((other, path), cut, strict=True):
                one.save(tmp_path / "path", overwrite=True)
                solpath.save(model, tmp_path / "model", overwrite=True)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        seen, end = set(), time.monotonic() + 20
        while len(seen) < 4 and time.monotonic() < end:
            for _ in range(15):
                found = SolutionPath.load(tmp_path / "path")
                assert found.order().equal(orders[found.method])
                model = solpath.load(tmp_path / "model")
                right = models[model.solpath_plan.achieved.params]
                assert all(map(torch.equal, model.parameters(), right.parameters()))
                seen |= {found.method, model.solpath_plan.achieved.params}
    finally:
        stop.set()
        writer.join()
    assert len(seen) == 4


def test_a_folder_that_always_changes_is_an_error(tmp_path):
    file = tmp_path / "path.json"
    calls = []

    def read():
        calls.append(0)
        file.write_text(str(len(calls)))

    with pytest.raises(FileError, match="replaced 100 times"):
        one_version(file, read)


def test_what_a_folder_lacks_is_said_at_once(tmp_path):
    calls = []

    def read():
        calls.append(0)
        raise FileError("lacks it")

    with pytest.raises(FileError, match="lacks it"):
        one_version(tmp_path / "path.json", read)
    assert len(calls) == 1


def forge_path(folder, change):
    head = json.loads((folder / "path.json").read_text())
    change(head)
    (folder / "path.json").write_text(json.dumps(sealed(head)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda head: head["costs"].update(macs=0), "macs"),
        (lambda head: head["costs"].update(params=-1), "-1"),
        (lambda head: head["costs"].update(params=1), "less than all units"),
        (lambda head: head["costs"]["unit_macs"].update(x=1), "every pair"),
        (lambda head: head["costs"].update(macs=10**300), "whole number"),
        (lambda head: head.update(pairs=[]), "there are none"),
        (lambda head: head["pairs"].append(head["pairs"][0]), "two have one name"),
        (lambda head: head["pairs"][0].update(heads=0), "0 is not a whole number"),
        (lambda head: head["pairs"][0].update(kind="x"), "kind"),
        (lambda head: head["pairs"][0].update(left=[]), "layers on its left"),
        (lambda head: head["pairs"][0]["right"].update(axis=2), "axis"),
        (lambda head: head["pairs"][0]["right"].update(repeat=True), "True"),
        (lambda head: head["fingerprint"].update(digests={"a": 1}), "texts"),
        (lambda head: head.update(basis=["x"]), "'x'"),
        (lambda head: head.update(steps_recorded=5), "history"),
        (lambda head: head.update(digests={}), "path.safetensors"),
        (lambda head: head.update(samples_seen=3), "tensor 'seen' is"),
        (lambda head: head.update(samples_seen=-1), "whole number"),
        (lambda head: head.pop("samples_seen"), "'seen' is not expected"),
    ],
)
def test_values_that_cannot_be_are_refused(path, tmp_path, change, words):
    forge_path(tmp_path / "path", change)
    with pytest.raises(FileError, match=words):
        SolutionPath.load(tmp_path / "path")


def forge_tensors(folder, change):
    file = folder / "path.safetensors"
    with safe_open(file, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.offset_keys()}
    change(tensors)
    data = save(tensors)
    file.write_bytes(data)
    digests = {"path.safetensors": hashlib.sha256(data).hexdigest()}
    forge_path(folder, lambda head: head.update(digests=digests))


@pytest.mark.parametrize(
    "change", [lambda seen: seen.flip(0), lambda seen: seen * 0, lambda seen: seen.double()]
)
def test_digests_of_samples_that_cannot_be_are_refused(path, tmp_path, change):
    forge_tensors(tmp_path / "path", lambda t: t.update(seen=change(t["seen"])))
    with pytest.raises(FileError, match="seen"):
        SolutionPath.load(tmp_path / "path")


def test_paths_and_checkpoints_of_before_do_not_know_their_samples(bert, path, tmp_path):
    """They are read as ever; a search goes on to the same path, which does not know them either."""
    forge_tensors(tmp_path / "path", lambda tensors: tensors.pop("seen"))
    forge_path(tmp_path / "path", lambda head: head.pop("samples_seen"))
    found = SolutionPath.load(tmp_path / "path")
    assert found.order().equal(path.order())
    assert found.seen.equal(torch.zeros(0, dtype=torch.int64))
    found.save(tmp_path / "path", overwrite=True)
    assert SolutionPath.load(tmp_path / "path").seen.equal(found.seen)

    def stopped():
        yield from [*batches(bert), *batches(bert)][:3]
        raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        solpath.search(bert, stopped(), SEARCH, checkpoint=folder, progress=False)
    forge_state(folder / "search.safetensors", lambda state: state.pop("seen"))
    found = search(bert, folder)
    assert found.history.equal(path.history)
    assert found.order().equal(path.order())
    assert not len(found.seen)


def test_a_path_with_other_layers_does_not_cut(bert, path, tmp_path):
    def change(head):
        head["pairs"][0]["left"][0]["module"] = head["pairs"][1]["left"][0]["module"]

    forge_path(tmp_path / "path", change)
    plan = SolutionPath.load(tmp_path / "path").plan(sparsity=0.5)
    for check in (True, False):
        with pytest.raises(FingerprintError, match="described otherwise"):
            solpath.extract(bert, plan, check=check)
    with pytest.raises(FingerprintError, match="described otherwise"), solpath.masked(bert, plan):
        pass


def test_axes_without_an_inverse_are_refused(path, tmp_path):
    name = next(iter(path.basis))
    path.basis[name].zero_()
    path.save(tmp_path / "path", overwrite=True)
    with pytest.raises(FileError, match=f"basis of {name} has no inverse"):
        SolutionPath.load(tmp_path / "path")


@pytest.mark.parametrize("part", ["", "config", "fingerprint"])
def test_a_field_is_compared_whatever_else_has_its_name(part, tmp_path):
    header = {"version": 2, "config": {"dtype": "a"}, "fingerprint": {"version": 2, "dtype": "b"}}
    checkpoints.write_checkpoint(tmp_path / "state", header, {"x": torch.ones(1)})
    assert checkpoints.read_checkpoint(tmp_path / "state", header)
    other = json.loads(json.dumps(header))
    inner = other[part] if part else other
    inner["version" if part != "config" else "dtype"] = "other"
    with pytest.raises(FingerprintError, match="differs in"):
        checkpoints.read_checkpoint(tmp_path / "state", other)


def forge_state(file, change):
    with safe_open(file, framework="pt") as stream:
        text = stream.metadata()[checkpoints._KEY]
        state = {name: stream.get_tensor(name) for name in stream.offset_keys()}
    change(state)
    metadata = {checkpoints._KEY: text, checkpoints._DIGEST: checkpoints._digest(text, state)}
    file.write_bytes(save(state, metadata))


def repeated(state, name):
    state[name] = state[name].repeat(*[1] * (state[name].dim() - 1), 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("history"), "history.*missing"),
        (lambda state: state.update(history=torch.zeros(3).double()), r"history|steps"),
        (lambda state: repeated(state, "history"), "36 steps are done in a search of 4"),
        (lambda state: state.update(mask=torch.zeros(3).double()), r"mask.*expected"),
        (lambda state: state["history"].fill_(0), "a size beyond 0 and 1"),
        (lambda state: state["history"][0].fill_(float("inf")), "a loss that is not finite"),
        (lambda state: state["mask"].fill_(7), "not between 0 and 1"),
        (lambda state: state["noise"].fill_(float("nan")), "not a number"),
        (lambda state: state.update(masks=state["masks"][:-1]), "masks"),
        (lambda state: [state.pop(n) for n in [*state] if n.startswith("basis/")], "missing"),
        (lambda state: [v.zero_() for n, v in state.items() if "basis/" in n], "no inverse"),
        (lambda state: state.update(reached=torch.zeros(2).bool()), "reached"),
        (lambda state: state.update(other=torch.zeros(2)), "other"),
        (lambda state: state.update(seen=state["seen"].double()), "seen"),
        (lambda state: state.update(seen=state["seen"].unsqueeze(0)), "seen"),
        (lambda state: state.update(seen=state["seen"].flip(0)), "seen are not ascending"),
        (lambda state: state.update(seen=state["seen"].repeat(2).sort().values), "seen are not"),
    ],
)
def test_states_that_no_search_can_have_are_refused(bert, path, tmp_path, change, words):
    forge_state(tmp_path / "state" / "search.safetensors", change)
    with pytest.raises(FileError, match=words):
        search(bert, tmp_path / "state")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("losses"), "losses.*missing"),
        (lambda state: repeated(state, "losses"), "not of 2 steps"),
        (lambda state: state["losses"].fill_(float("inf")), "not of 2 steps"),
        (lambda state: state["checks"][1:, 0].fill_(0), "not of 2 steps"),
        (lambda state: state["checks"][:, 0].add_(0.5), "not of 2 steps"),
        (lambda state: state.update(checks=state["checks"][1:]), "before the first step"),
        (lambda state: state.update({n: v[:1] for n, v in state.items() if "best/" in n}), "best/"),
        (lambda state: [state.pop(n) for n in [*state] if "exp_avg/" in n], "missing"),
    ],
)
def test_states_that_no_tuning_can_have_are_refused(bert, path, tmp_path, change, words):
    small = solpath.extract(bert, path.plan(sparsity=0.5))
    tune(bert, small, tmp_path / "state")
    forge_state(tmp_path / "state" / "tune.safetensors", change)
    with pytest.raises(FileError, match=words):
        tune(bert, small, tmp_path / "state")


@pytest.mark.parametrize("kind", ["link", "pipe", "deep"])
def test_a_checkpoint_that_is_no_file_of_its_folder_is_refused(bert, path, tmp_path, kind):
    file = tmp_path / "state" / "search.safetensors"
    if kind == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        text = "[" * 10**5
        file.write_bytes(save({"a": torch.ones(1)}, {checkpoints._KEY: text}))
    with pytest.raises(FileError, match=r"search\.safetensors"):
        search(bert, tmp_path / "state")


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("gpt2", {"num_hidden_layers": 10**6, "n_layer": 2}),
        ("gpt2", {"n_layer": 10**6}),
        ("distilbert", {"n_layers": 10**6}),
        ("t5", {"num_decoder_layers": 10**6}),
        ("whisper", {"decoder_layers": 10**6}),
        ("clip", {"vision_config": {"num_hidden_layers": 10**6}}),
        ("clip", {"text_config": {"num_hidden_layers": 10**6}}),
        ("gemma3", {"vision_config": {"num_hidden_layers": 10**6}}),
        ("swin", {"depths": [10**5, 1]}),
        ("vit", {"num_hidden_layers": 10**6}),
    ],
)
def test_a_million_layers_are_not_built(label, change, tmp_path):
    """Whatever a configuration calls its layers, they are held against the weights."""
    model = build(label)
    path = solpath.baselines.random(model, batches(model))
    solpath.save(solpath.extract(model, path.plan(sparsity=0.5)), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    head = json.loads((tmp_path / "out" / "solpath.json").read_text())
    head["digests"]["config.json"] = solpath.reading.file_digest(file)
    (tmp_path / "out" / "solpath.json").write_text(json.dumps(sealed(head)))
    built = []
    handle = torch.nn.modules.module.register_module_module_registration_hook(
        lambda *module: built.append(0)
    )
    try:
        with pytest.raises(FileError, match="do not describe a model"):
            solpath.load(tmp_path / "out")
    finally:
        handle.remove()
    assert len(built) < 5000


@pytest.fixture
def dense(tmp_path):
    build("gpt2", n_layer=1).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("reader", [from_pretrained, load_processor])
@pytest.mark.parametrize("name", ["vocab.txt", "config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_files_of_a_dense_folder_are_its_own(dense, tmp_path, reader, name, kind):
    (tmp_path / "elsewhere").write_bytes(
        (dense / name).read_bytes() if name != "vocab.txt" else b""
    )
    (dense / name).unlink(missing_ok=True)
    if kind == "link":
        (dense / name).symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(dense / name)
    with pytest.raises(FileError, match=name.replace(".", r"\.")):
        reader(dense)


def test_a_snapshot_of_the_cache_may_link_to_its_blobs(dense, tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "main"
    shutil.copytree(dense, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert type(from_pretrained(snapshot)).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    "place", ["pytorch_model.bin", "../model.safetensors", "/x.safetensors", 3]
)
def test_an_index_names_safetensors_only(dense, place):
    index = dense / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": place}}))
    with pytest.raises(FileError, match="only safetensors are read"):
        from_pretrained(dense)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attn_implementation": "someone/kernel"}, "kernel from the Hub"),
        ({"_attn_implementation": "someone/kernel:attention"}, "kernel from the Hub"),
        ({"_attn_implementation_internal": "someone/kernel"}, "kernel from the Hub"),
        ({"attn_implementation": {"text_config": "someone/kernel"}}, "kernel from the Hub"),
        ({"text_config": {"attn_implementation": "someone/kernel"}}, "kernel from the Hub"),
        ({"experts_implementation": "someone/kernel"}, "kernel from the Hub"),
        ({"transformers_weights": "pytorch_model.bin"}, "transformers_weights"),
    ],
)
def test_settings_that_fetch_are_refused(dense, fields, words):
    edit(dense / "config.json", **fields)
    with pytest.raises(FileError, match=words):
        from_pretrained(dense)


def test_a_folder_of_adapters_is_refused(dense):
    (dense / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(FileError, match="merge_and_unload"):
        from_pretrained(dense)


@pytest.mark.parametrize("fields", [{"dtype": "x"}, {"n_layer": "two"}, {"pad_token_id": [[]]}])
def test_a_configuration_that_makes_transformers_stumble_is_one_error(dense, fields):
    edit(dense / "config.json", **fields)
    with pytest.raises(SolpathError, match="dense"):
        from_pretrained(dense)
