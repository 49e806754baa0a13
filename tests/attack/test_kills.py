"""Processes killed at any moment: nothing is lost or torn, and the next run goes on.

``pytest tests/attack --minutes 30`` runs longer.
"""

import os
import signal
import time
from collections import Counter

import pytest
import torch
from mutations import cases
from test_readers import same_model, same_path

import solpath
from conftest import batches, build, inputs

SEARCH = solpath.SearchConfig(steps=12, scale_batches=1)
TUNE = solpath.TuneConfig(steps=8, evaluate_every=4, learning_rate=1e-3)
QUIET = {"progress": False}


class Work:
    """What one process does in a folder, again and again until it is killed."""

    def __init__(self, model, path, small):
        self.model, self.path, self.small = model, path, small

    def prepare(self, folder):
        """Make the folder what an earlier run left."""

    def run(self, folder):
        """Write into the folder; return what is right."""

    def again(self, folder):
        """Do it from the beginning."""
        for file in folder.glob(
            "*.safetensors"
        ):  # a checkpoint, which would have nothing left to do
            file.unlink()
        self.run(folder)

    def check(self, folder):
        """Fail unless what is there now is whole."""


class Search(Work):
    """A search with a checkpoint after every step."""

    def run(self, folder):
        options = {"checkpoint": folder, "checkpoint_every": 1, **QUIET}
        path = solpath.search(self.model, batches(self.model), SEARCH, **options)
        assert same_path(path, self.path)

    check = run  # it goes on to the same path


class Tune(Work):
    """A tuning with a checkpoint after every step."""

    def __init__(self, *made):
        super().__init__(*made)
        self.right = self.tuned(None)

    def tuned(self, folder):
        options = {"checkpoint": folder, "checkpoint_every": 1, **QUIET}
        held = [inputs(self.model, seed=9)]
        return solpath.tune(
            self.small, self.model, batches(self.model), TUNE, heldout=held, **options
        )

    def run(self, folder):
        assert same_model(self.tuned(folder), self.right)

    check = run


class Save(Work):
    """A model that replaces another one, in turns."""

    def __init__(self, *made):
        super().__init__(*made)
        other = solpath.extract(self.model, self.path.plan(sparsity=0.3))
        self.models = {model.solpath_plan.achieved.params: model for model in (self.small, other)}

    def prepare(self, folder):
        solpath.save(self.small, folder / "out")

    def run(self, folder):
        for model in self.models.values():
            solpath.save(model, folder / "out", overwrite=True)

    def check(self, folder):
        found = solpath.load(folder / "out", verify=True)
        assert same_model(found, self.models[found.solpath_plan.achieved.params])


class Path(Work):
    """A path that replaces another one, in turns."""

    def __init__(self, *made):
        super().__init__(*made)
        other = solpath.baselines.random(self.model, batches(self.model))
        self.paths = {path.method: path for path in (self.path, other)}

    def prepare(self, folder):
        self.path.save(folder / "out")

    def run(self, folder):
        for path in self.paths.values():
            path.save(folder / "out", overwrite=True)

    def check(self, folder):
        found = solpath.SolutionPath.load(folder / "out")
        assert same_path(found, self.paths[found.method])


class Members(Work):
    """Members that are cut, compensated and saved in new folders."""

    def __init__(self, *made):
        super().__init__(*made)
        self.right = self.member()

    def member(self):
        small = solpath.extract(self.model, self.path.plan(sparsity=0.5))
        return solpath.compensate(small, self.model, batches(self.model, 4), **QUIET)

    def run(self, folder):
        solpath.save(self.member(), folder / str(len(visible(folder))))

    def check(self, folder):
        for name in visible(folder):
            assert same_model(solpath.load(folder / name, verify=True), self.right)


@pytest.fixture(scope="module")
def made():
    model = build("bert", num_hidden_layers=1)
    path = solpath.search(model, batches(model), SEARCH, **QUIET)
    return model, path, solpath.extract(model, path.plan(sparsity=0.5))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("kind", [Search, Tune, Save, Path, Members], ids=lambda k: k.__name__)
def test_a_kill_loses_nothing(made, kind, seconds, tmp_path):
    work, counts = kind(*made), Counter()
    for number, draw in enumerate(cases(seconds / 2, 2, seed=3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        work.prepare(folder)
        before = time.monotonic()
        work.again(folder)
        whole = time.monotonic() - before
        for _ in range(4):
            counts["ended" if killed(work, folder, whole * draw.random()) else "killed"] += 1
            counts["leftovers"] += len(hidden(folder))
            work.check(folder)
        work.run(folder)
        assert not hidden(folder)
    print(f"{kind.__name__}: {dict(counts)}")
    assert counts["killed"]


def visible(folder):
    return [name for name in os.listdir(folder) if not name.startswith(".")]


def hidden(folder):
    return [name for name in os.listdir(folder) if name.startswith(".")]


def killed(work, folder, seconds):
    """Run in a child that is killed after some seconds; return whether it failed by itself."""
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            while True:
                work.again(folder)
        except BaseException:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] != signal.SIGKILL
