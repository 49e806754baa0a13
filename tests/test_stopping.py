"""Long work of the command line that is stopped in the middle goes on from its state."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

import solpath
from conftest import build, inputs
from solpath.cli.main import run
from solpath.cli.state import unfinished

_LOSS = """
import pathlib, time
import torch

calls = 0

def pausing(outputs, batch):
    global calls
    calls += 1
    pause = pathlib.Path("pause")
    if pause.exists() and calls > int(pause.read_text()):
        pathlib.Path("paused").touch()
        time.sleep(120)
    return outputs.last_hidden_state.square().mean()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a model, texts and a loss that pauses in the middle."""
    torch.manual_seed(0)
    build("bert", num_hidden_layers=1, vocab_size=70).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"{i}": i for i in range(70)}, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(
        tmp_path / "model"
    )
    for name, shift in (("texts", 0), ("others", 7)):
        lines = (" ".join(str((i * j + shift) % 70) for j in range(6)) for i in range(48))
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    (tmp_path / "stopping_loss.py").write_text(_LOSS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("stopping_loss", None)


_COMMON = ["--text", "texts.txt", "--length", "8", "--batch-size", "8", "--json"]
_SEARCH = ["search", "model", *_COMMON, "--loss", "stopping_loss:pausing", "--steps", "75"]


def stopped(words, number, home, calls) -> int:
    """Run a command in a process for some calls of the loss; stop it; return its exit code."""
    (home / "pause").write_text(str(calls))
    (home / "paused").unlink(missing_ok=True)
    heard = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # even if the tests run in nohup
    command = [sys.executable, "-m", "solpath", *words]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of others differ in bits
    with subprocess.Popen(command, preexec_fn=heard, env={**os.environ, **threads}) as process:
        try:
            while not (home / "paused").exists() and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            code = process.wait(60)
        finally:
            process.kill()  # one that did not stop
    (home / "pause").unlink()
    return code


def test_a_killed_search_goes_on_to_the_same_bits(home, capsys):
    assert stopped([*_SEARCH, "--out", "path"], signal.SIGKILL, home, 80) == -signal.SIGKILL
    assert {item.name for item in (home / "path.unfinished").iterdir()} == {
        "command.json", "search.safetensors"
    }  # fmt: skip
    assert not (home / "path").exists()
    other = [word.replace("texts.txt", "others.txt") for word in _SEARCH]
    assert run([*other, "--out", "path"]) == 2
    assert "it differs in text: 'texts.txt', not 'others.txt'" in capsys.readouterr().err
    texts = (home / "texts.txt").read_text()
    (home / "texts.txt").write_text((home / "others.txt").read_text())
    assert run([*_SEARCH, "--out", "path"]) == 2
    assert "it differs in what the data holds" in capsys.readouterr().err
    (home / "texts.txt").write_text(texts)
    assert run([*_SEARCH, "--micro-batch", "8", "--out", "path"]) == 0  # may be what it takes
    assert "going on from the state in path.unfinished" in capsys.readouterr().err
    assert not (home / "path.unfinished").exists()
    assert run([*_SEARCH, "--out", "whole"]) == 0
    one, two = (solpath.SolutionPath.load(home / name) for name in ("path", "whole"))
    for name, score in one.score.items():
        assert torch.equal(score, two.score[name])
    assert torch.equal(one.history, two.history)
    assert len(one.seen) == 48
    assert torch.equal(one.seen, two.seen)
    assert run([*_SEARCH, "--out", "path"]) == 2
    assert "path is not empty" in capsys.readouterr().err


def test_tuning_in_a_closed_terminal_goes_on_to_the_same_bits(home):
    model = BertModel.from_pretrained("model")
    path = solpath.baselines.magnitude(model, [inputs(model)])
    solpath.save(solpath.extract(model, path.plan(sparsity=0.5)), "small")
    words = ["tune", "small", "model", *_COMMON, "--steps", "50"]
    words += ["--loss", "stopping_loss:pausing"]
    assert stopped([*words, "--out", "tuned"], signal.SIGHUP, home, 25) == 130
    assert (home / "tuned.unfinished" / "tune.safetensors").exists()
    assert not (home / "tuned").exists()
    assert run([*words, "--out", "tuned"]) == 0
    assert not (home / "tuned.unfinished").exists()
    assert run([*words, "--out", "whole"]) == 0
    one, two = (solpath.load(name).state_dict() for name in ("tuned", "whole"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_state_is_kept_from_others(home, capsys):
    words = [*_SEARCH[:-1], "2", "--out", "path"]
    state = unfinished(home / "path")
    state.mkdir()
    (state / "mine").touch()
    assert run(words) == 2
    assert "path.unfinished, which holds 'mine'" in capsys.readouterr().err
    (state / "mine").unlink()
    lock = os.open(state, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(words) == 2
    assert "another process works with the state in path.unfinished" in capsys.readouterr().err
    os.close(lock)
    assert run(words) == 0
    assert not state.exists()


def test_the_state_of_the_user_stays(home):
    words = [*_SEARCH[:-1], "2", "--checkpoint", "state", "--out"]
    assert run([*words, "one"]) == 0
    assert (home / "state" / "search.safetensors").exists()
    assert run([*words, "two"]) == 0
    (home / "state" / "command.json").unlink()  # as Python writes it
    assert run([*words, "three"]) == 0
    assert run([*words, "four", "--seed", "1"]) == 2


def test_a_search_that_fails_leaves_nothing_beside_its_path(home):
    (home / "stopping_loss.py").write_text("def pausing(outputs, batch):\n    raise ValueError")
    assert run([*_SEARCH, "--out", "path"]) == 2
    assert not (home / "path.unfinished").exists()
