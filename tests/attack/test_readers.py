"""Every reader of files against damage and forgery: the right answer, or an error that says what.

``pytest tests/attack --minutes 30`` runs longer.
"""

import hashlib
import json
from collections import Counter

import pytest
import torch
from mutations import cases, damaged, forged
from safetensors import safe_open
from safetensors.torch import save

import solpath
from conftest import batches, build, inputs
from solpath.errors import SolpathError
from solpath.measuring.latency import measure_latency
from solpath.pretrained import from_pretrained
from solpath.reading import sealed
from solpath.running import checkpoint as checkpoints

SEARCH = solpath.SearchConfig(steps=3, scale_batches=1, basis="principal")
TUNE = solpath.TuneConfig(steps=2, evaluate_every=1, learning_rate=1e-3)
LEAST = 40


def same_model(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def same_path(one, other):
    fields = ("pairs", "costs", "method", "config", "fingerprint", "unreached")
    if not all(getattr(one, name) == getattr(other, name) for name in fields):
        return False
    maps = ("score", "entry_time", "energy", "basis")
    return all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("history", "seen")
    ) and all(same_tensors(getattr(one, name), getattr(other, name)) for name in maps)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, its path, and a cut model."""
    model = build("bert", num_hidden_layers=1)
    path = solpath.search(model, batches(model), SEARCH, progress=False)
    return model, path, solpath.extract(model, path.plan(sparsity=0.5))


class Model:
    """Saved models, read with all digests compared."""

    json, tensors, exact = ("solpath.json", "config.json"), ("model.safetensors",), True

    def __init__(self, made, folder):
        self.folder, self.right = folder, made[2]
        solpath.save(self.right, folder)

    def read(self):
        return solpath.load(self.folder, verify=True)

    def same(self, found):
        return same_model(found, self.right)

    def forge(self, name, draw):
        value = forged((self.folder / name).read_bytes(), draw)
        (self.folder / name).write_text(json.dumps(value))
        head = json.loads((self.folder / "solpath.json").read_text())
        if isinstance(head.get("digests"), dict):
            for file in [name for name in head["digests"] if (self.folder / name).is_file()]:
                digest = hashlib.sha256((self.folder / file).read_bytes()).hexdigest()
                head["digests"][file] = digest
        (self.folder / "solpath.json").write_text(json.dumps(sealed(head)))


class Unverified(Model):
    """Saved models, read in haste: damaged weights may pass, anything else may not."""

    exact = False

    def read(self):
        return solpath.load(self.folder)


class Path(Model):
    """Solution paths, of which a size is planned and cut."""

    json, tensors = ("path.json",), ("path.safetensors",)

    def __init__(self, made, folder):
        self.folder, self.model, self.right = folder, made[0], made[1]
        self.right.save(folder)

    def read(self):
        path = solpath.SolutionPath.load(self.folder)
        solpath.extract(self.model, path.plan(sparsity=0.4))
        return path

    def same(self, found):
        return same_path(found, self.right)

    def forge(self, name, draw):
        value = forged((self.folder / name).read_bytes(), draw)
        (self.folder / name).write_text(json.dumps(sealed(value)))


class Table(Path):
    """Latency tables, of which a size is planned."""

    json, tensors = ("table.json",), ()

    def __init__(self, made, folder):
        self.folder, self.path = folder, made[1]
        self.right = measure_latency(made[0], inputs(made[0]), repeats=1)
        self.right.save(folder / "table.json")

    def read(self):
        table = solpath.LatencyTable.load(self.folder / "table.json")
        self.path.plan(latency_ms=self.right.dense_ms, latency=table)
        return table

    def same(self, found):
        return found == self.right


class SearchState(Path):
    """Checkpoints of a search, which is resumed."""

    json, tensors = (), ("search.safetensors",)

    def __init__(self, made, folder):
        self.folder, self.model, self.right = folder, made[0], made[1]
        self.read()

    def read(self):
        options = {"checkpoint": self.folder, "progress": False}
        return solpath.search(self.model, batches(self.model), SEARCH, **options)

    def forge(self, name, draw):
        forge_state(self.folder / name, draw)


class TuneState(SearchState):
    """Checkpoints of a tuning, which is resumed."""

    tensors = ("tune.safetensors",)

    def __init__(self, made, folder):
        self.folder, self.model, self.small = folder, made[0], made[2]
        self.right = self.read()

    def read(self):
        data, held = batches(self.model), [inputs(self.model, seed=9)]
        options = {"checkpoint": self.folder, "heldout": held, "progress": False}
        return solpath.tune(self.small, self.model, data, TUNE, **options)

    def same(self, found):
        return same_model(found, self.right)


class Dense(Path):
    """Folders of dense models, as transformers writes them."""

    json, tensors, exact = ("config.json", "generation_config.json"), ("model.safetensors",), False

    def __init__(self, made, folder):
        self.folder = folder
        build("gpt2", n_layer=1).save_pretrained(folder)

    def read(self):
        return from_pretrained(self.folder)

    def same(self, found):
        return True

    def forge(self, name, draw):
        value = forged((self.folder / name).read_bytes(), draw)
        if not SIZES & changed(json.loads((self.folder / name).read_bytes()), value):
            (self.folder / name).write_text(json.dumps(value))


SIZES = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "num_labels"}
"""Sizes in a dense configuration may be large; how much memory they take is transformers' say."""


def changed(one, other):
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def forge_state(file, draw):
    """Change one tensor or the header of a checkpoint, and make the digest fit."""
    with safe_open(file, framework="pt") as stream:
        text = stream.metadata()[checkpoints._KEY]
        state = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    name = draw.choice(sorted(state))
    value = state[name]
    kind = draw.choice(("remove", "rename", "shape", "dtype", "values", "header", "long"))
    if kind == "remove":
        del state[name]
    elif kind == "rename":
        state[draw.choice(("x", "basis/x", "reached", "step/x", ""))] = state.pop(name)
    elif kind == "shape":
        state[name] = value.unsqueeze(0) if draw.random() < 0.5 else value.flatten()[:-1].clone()
    elif kind == "dtype":
        state[name] = value.to(draw.choice((torch.float32, torch.int64, torch.bool, torch.int8)))
    elif kind == "values":
        number = draw.choice((0, -1, 7, 1e30, float("nan"), float("inf"), -float("inf")))
        state[name] = torch.full(value.shape, number, dtype=torch.float64).to(value.dtype)
    elif kind == "long" and value.dim():
        state[name] = value.repeat(1000, *[1] * (value.dim() - 1))
    else:
        text = json.dumps(forged(text.encode(), draw))
    digest = checkpoints._digest(text, state)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    file.write_bytes(save(state, {checkpoints._KEY: text, checkpoints._DIGEST: digest}))


READERS = [Model, Path, Table, SearchState, TuneState, Dense]


@pytest.mark.parametrize("reader", [*READERS, Unverified], ids=lambda kind: kind.__name__)
def test_damage_is_refused_or_harmless(made, reader, seconds, tmp_path):
    kind = reader(made, tmp_path / "it")
    whole = {name: (kind.folder / name).read_bytes() for name in (*kind.json, *kind.tensors)}
    counts = Counter()
    for draw in cases(seconds / 2, LEAST, seed=1):
        name = draw.choice(sorted(whole))
        (kind.folder / name).write_bytes(damaged(whole[name], draw))
        counts[outcome(kind)] += 1
        (kind.folder / name).write_bytes(whole[name])
    print(f"{reader.__name__} damaged: {dict(counts)}")
    assert not counts["wrong"]
    assert counts["refused"]


@pytest.mark.parametrize("reader", READERS, ids=lambda kind: kind.__name__)
def test_forgery_is_refused_or_read_and_never_another_error(made, reader, seconds, tmp_path):
    kind = reader(made, tmp_path / "it")
    kind.exact = False  # a forger may well write another path
    whole = {name: (kind.folder / name).read_bytes() for name in (*kind.json, *kind.tensors)}
    counts = Counter()
    for draw in cases(seconds / 2, LEAST, seed=2):
        kind.forge(draw.choice(kind.json or kind.tensors), draw)
        counts[outcome(kind)] += 1
        for name, data in whole.items():
            (kind.folder / name).write_bytes(data)
    print(f"{reader.__name__} forged: {dict(counts)}")
    assert counts["refused"]


def outcome(kind):
    """Read, and say how it ended; any error but ours goes on."""
    try:
        found = kind.read()
    except SolpathError:
        return "refused"
    return "same" if kind.same(found) else "wrong" if kind.exact else "other"
