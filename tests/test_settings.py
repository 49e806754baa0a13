"""Options of a command from a file, and the file of what a command was given."""

import tomllib

import pytest

import solpath
from conftest import build
from solpath.cli.main import run
from test_batching import PADDED, tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    build("bert", vocab_size=60, max_position_embeddings=16).save_pretrained(folder / "model")
    tokenizer(**PADDED).save_pretrained(folder / "model")
    (folder / "a.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(40)))
    return folder


def searching(home, out, *more):
    words = ["search", home / "model", "--text", home / "a.txt", "--out", out, "--json", *more]
    return [str(word) for word in words]


def test_a_run_is_repeated_from_its_settings(home, tmp_path, monkeypatch):
    options = ["--steps", "3", "--seed", "2", "--batch-size", "4", "--length", "6", "--limit", "20"]
    assert run(searching(home, tmp_path / "one", *options, "--attention", "eager")) == 0
    file = tmp_path / "one" / "settings.toml"
    kept = tomllib.loads(file.read_text())
    assert kept["model"] == str(home / "model")
    assert (kept["steps"], kept["method"], kept["attention"]) == (3, "spp", "eager")
    assert not {"out", "json", "settings", "checkpoint"} & kept.keys()
    assert run(["search", "--settings", str(file), "--out", str(tmp_path / "two")]) == 0
    assert run(searching(home, tmp_path / "three", "--settings", str(file), "--seed", "3")) == 0
    one, two, three = (solpath.SolutionPath.load(tmp_path / n) for n in ("one", "two", "three"))
    assert one.order().tolist() == two.order().tolist()
    assert three.config["seed"] == 3  # the command line wins
    assert (tmp_path / "two" / "settings.toml").read_text() == file.read_text()


def test_a_budget_on_the_command_line_takes_the_place_of_that_in_the_file(home, tmp_path):
    assert run(searching(home, tmp_path / "path", "--steps", "2", "--length", "6")) == 0
    file = tmp_path / "one" / "settings.toml"
    names = [str(home / "model"), str(tmp_path / "path")]
    assert run(["extract", *names, "--sparsity", "0.4", "--out", str(file.parent)]) == 0
    assert tomllib.loads(file.read_text())["sparsity"] == 0.4
    again = ["extract", "--settings", str(file), "--out"]
    assert run([*again, str(tmp_path / "two"), "--params", "0.9"]) == 0
    kept = tomllib.loads((tmp_path / "two" / "settings.toml").read_text())
    assert "sparsity" not in kept
    assert kept["params"] == 0.9
    assert run([*again, str(tmp_path / "three"), "--params", "0.9", "--macs", "0.9"]) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepps = 3", "search has no option 'stepps'; the nearest is steps"),
        ("batch_size = 3", "the nearest is batch-size"),
        ("xyzzyx = 3", "known are model, out, text"),
        ("steps = true", "steps must be not true or false, got True"),
        ("steps = 2.5", "'--steps'"),
        ("compensated = 1", "compensated must be true or false, got 1"),
        ('data = "a.jsonl"', "data must be a list"),
        ("steps = [3]", "steps must be one value"),
        ("[search]\nsteps = 3", "has no option 'search'"),
        ("steps = ", "cannot read"),
        ('dtype = "int4"', "int4"),
    ],
)
def test_settings_that_make_no_sense_are_named(text, words, home, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert run(searching(home, tmp_path / "path", "--settings", str(file))) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "path").exists()


def test_a_loss_of_the_user(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mylosses.py").write_text(
        "def far(outputs, batch):\n    return outputs[0].float().square().mean()\n"
    )
    more = ["--steps", "2", "--loss", "mylosses:far"]
    assert run(searching(home, tmp_path / "path", *more)) == 0
    (tmp_path / "badlosses.py").write_text("import nothing_of_this_name\n")
    for loss, words in (
        ("mylosses", "--loss is module:function"),
        ("mylosses:near", "mylosses has no function near"),
        ("badlosses:far", "cannot import badlosses"),
    ):
        capsys.readouterr()
        assert run(searching(home, tmp_path / "no", "--loss", loss)) == 2
        assert words in capsys.readouterr().err


def test_devices_and_options_that_do_not_fit(home, tmp_path, capsys):
    for more, words in (
        (["--device", "toaster"], "--device toaster"),
        (["--split", "test"], "--split is for --data"),
        (["--data", "a.txt"], "give one of --text, --images and --data"),
        (["--column", "text=a"], "--column is for --data"),
    ):
        capsys.readouterr()
        assert run(searching(home, tmp_path / "no", *more)) == 2
        assert words in capsys.readouterr().err
