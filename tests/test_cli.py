"""The command line, as a user runs it, on the real model where that takes seconds."""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

import solpath
from conftest import build, inputs
from solpath.cli.main import run
from solpath.data.feeding import takes
from solpath.reporting.retrieval import installed_model


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(f"Sentence number {i} says something else." for i in range(64)))
    return file


@pytest.fixture(scope="module")
def path(tmp_path_factory, texts) -> Path:
    """A path of the installed model from the cheapest method that reads no batch."""
    out = tmp_path_factory.mktemp("path") / "path"
    model = str(installed_model())
    arguments = ["search", model, "--out", str(out), "--method", "magnitude", "--text", str(texts)]
    assert run(arguments) == 0
    return out


def out_of(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_inspect(capsys):
    assert run(["inspect", str(installed_model()), "--json"]) == 0
    found = out_of(capsys)
    assert found["params"] == 22_713_216
    assert len(found["pairs"]) == 18
    assert found["pairs"][0]["heads"] == 12
    assert run(["inspect", str(installed_model())]) == 0
    assert "12 × 32" in capsys.readouterr().out


def test_search_plan_extract_eval_bench(path, texts, tmp_path, capsys):
    model, small = str(installed_model()), str(tmp_path / "small")
    capsys.readouterr()
    assert run(["plan", str(path), "--sparsity", "0.5", "--json"]) == 0
    planned = out_of(capsys)
    assert abs(planned["achieved"]["sparsity"] - 0.5) < 0.005
    assert run(["extract", model, str(path), "--out", small, "--sparsity", "0.5", "--json"]) == 0
    made = out_of(capsys)
    loaded = solpath.load(small)
    assert sum(p.numel() for p in loaded.parameters()) == made["params"]
    assert (tmp_path / "small" / "tokenizer.json").exists()
    arguments = ["eval", small, "--reference", model, "--text", str(texts), "--json"]
    assert run(arguments) == 0
    assert 0 < out_of(capsys)["metrics"]["cosine"] < 1
    arguments = ["bench", model, small, "--samples", "1", "--tokens", "8", "--repeats", "2"]
    assert run([*arguments, "--json"]) == 0
    figures = out_of(capsys)["models"]
    assert figures[small]["params"] == made["params"] < figures[model]["params"]


def test_choose(path, tmp_path, capsys):
    model, file = str(installed_model()), tmp_path / "choice.json"
    texts = tmp_path / "heldout.txt"
    texts.write_text("\n".join(f"Line {i} of a held-out text, which is new." for i in range(40)))
    arguments = ["choose", model, str(path), "--max-loss", "0.4", "--sizes", "0.1,0.8"]
    arguments += ["--text", str(texts), "--multiple-of", "mlp=32", "--protect", "*layer.0.*"]
    capsys.readouterr()
    assert run([*arguments, "--out", str(file)]) == 0
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["samples"] == 40
    assert found["sparsity"] == 0.1
    assert [test["passed"] for test in found["tests"]] == [True, False]
    line = printed.splitlines()[-1]
    assert line.startswith(f"Next: solpath extract {model} {path} --sparsity 0.1 --multiple-of")
    _, *words = shlex.split(line.removeprefix("Next: "))
    small = str(tmp_path / "small")
    assert run([*words[:-1], small]) == 0
    params = sum(p.numel() for p in solpath.load(small).parameters())
    assert params == found["tests"][0]["params"]
    assert run([*arguments, "--json", "--metric", "accuracy"]) == 2
    assert "is no classifier" in capsys.readouterr().err


def test_a_latency_is_measured_once_and_planned_again(tmp_path, monkeypatch, capsys):
    """On a stopwatch that counts parameters, so that nothing depends on the machine."""
    from solpath.measuring import latency as timing

    def latencies(functions, *, repeats):
        models = {name: function.args[0] for name, function in functions.items()}
        return {
            name: [1e-6 * sum(p.numel() for p in model.parameters())] * repeats
            for name, model in models.items()
        }

    monkeypatch.setattr(timing, "latencies", latencies)
    model = build("bert")
    model.save_pretrained(tmp_path / "model")
    path = solpath.baselines.magnitude(model, [inputs(model)])
    path.save(tmp_path / "path")
    dense, paths = str(tmp_path / "model"), str(tmp_path / "path")
    file, asked = tmp_path / "table.json", 1e-3 * 0.8 * path.costs.dense["params"]
    options = ["--latency-ms", str(asked), "--latency", str(file), "--multiple-of", "2", "--json"]
    shape = ["--samples", "2", "--tokens", "5"]
    out = ["--out", str(tmp_path / "small")]
    assert run(["extract", dense, paths, *options, *shape, *out]) == 0
    made = out_of(capsys)
    assert abs(made["latency_ms"]["measured"] / asked - 1) < 0.05
    small = solpath.load(tmp_path / "small")
    assert sum(p.numel() for p in small.parameters()) == made["params"]
    assert small.solpath_plan.latency_ms == made["latency_ms"]
    written = file.read_bytes()
    assert json.loads(written)["conditions"]["batch"]["input_ids"] == [2, 5]
    assert run(["plan", paths, *options]) == 0
    assert out_of(capsys)["latency_ms"]["predicted"] == pytest.approx(
        made["latency_ms"]["predicted"]
    )
    out = ["--out", str(tmp_path / "again")]
    assert run(["extract", dense, paths, *options, *shape, *out]) == 0
    assert file.read_bytes() == written
    assert out_of(capsys)["params"] == made["params"]
    assert run(["extract", dense, paths, *options, *out, "--samples", "3"]) == 2


def test_dtypes(texts, tmp_path, capsys):
    dense = tmp_path / "dense"
    build("bert", num_hidden_layers=1, vocab_size=70).bfloat16().save_pretrained(dense)
    words = Tokenizer(models.WordLevel({f"{i}": i for i in range(70)}, unk_token="1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0").save_pretrained(dense)
    (tmp_path / "texts.txt").write_text((texts.read_text() + "\n") * 2)
    text, float32 = ["--text", tmp_path / "texts.txt", "--json"], ["--dtype", "float32"]

    def command(*arguments):
        assert run([*map(str, arguments)]) == 0
        return out_of(capsys)

    path, half, whole = (tmp_path / name for name in ("path", "half", "whole"))
    search = "search", dense, "--method", "magnitude", "--out", path, *text
    command(*search, *float32)
    cut = "extract", dense, path, "--sparsity", 0.5, "--json", "--out"
    command(*cut, whole, *float32)
    command(*cut, half)  # the same numbers
    assert solpath.load(whole).dtype == torch.float32
    assert solpath.load(half).dtype == torch.bfloat16
    bench = "bench", dense, half, "--samples", 1, "--tokens", 8, "--repeats", 1, "--json"
    stored, wide = (command(*bench, *more)["models"][str(half)] for more in ([], float32))
    assert stored["bytes_on_disk"] < wide["bytes_on_disk"]
    assert command("eval", half, "--reference", dense, *text, *float32)["metrics"]["cosine"] > 0
    fit = "compensate", half, dense, "--batches", 4, "--out", tmp_path / "fit", *text
    command(*fit, *float32)
    assert solpath.load(tmp_path / "fit").dtype == torch.float32
    tune = "tune", half, dense, "--out", tmp_path / "tuned", "--steps", 1, *text
    assert run([*map(str, tune)]) == 2
    assert "--dtype float32" in capsys.readouterr().err
    command(*tune, *float32)
    assert solpath.load(tmp_path / "tuned").dtype == torch.float32


def test_tune(path, texts, tmp_path, capsys):
    model, small = str(installed_model()), str(tmp_path / "small")
    assert run(["extract", model, str(path), "--out", small, "--sparsity", "0.5"]) == 0
    capsys.readouterr()
    arguments = ["tune", small, model, "--text", str(texts), "--steps", "3", "--json"]
    arguments += ["--lora-rank", "2", "--checkpoint", str(tmp_path / "state")]
    assert run([*arguments, "--out", str(tmp_path / "tuned")]) == 0
    found = out_of(capsys)
    assert (found["config"]["steps"], found["config"]["lora_rank"]) == (3, 2)
    assert found["after"]["relative_error"] < found["before"]["relative_error"]
    start, tuned = solpath.load(small), solpath.load(tmp_path / "tuned")
    assert [(n, t.shape) for n, t in start.state_dict().items()] == [
        (n, t.shape) for n, t in tuned.state_dict().items()
    ]
    assert (tmp_path / "tuned" / "tokenizer.json").exists()
    assert (tmp_path / "state" / "tune.safetensors").exists()


def test_compensate(path, texts, tmp_path, capsys):
    model, small = str(installed_model()), str(tmp_path / "small")
    assert run(["extract", model, str(path), "--out", small, "--sparsity", "0.5"]) == 0
    capsys.readouterr()
    many = tmp_path / "many.txt"
    many.write_text(
        "\n".join(f"{i}. {line}" for i in range(40) for line in texts.read_text().splitlines())
    )
    arguments = ["compensate", small, model, "--text", str(many), "--batches", "4", "--json"]
    assert run([*arguments, "--out", str(tmp_path / "better")]) == 0
    found = out_of(capsys)
    assert found["after"]["relative_error"] < found["before"]["relative_error"]
    assert (tmp_path / "better" / "tokenizer.json").exists()


def test_a_search_along_principal_axes_says_which_pairs_have_none(texts, tmp_path, capsys):
    arguments = ["search", str(installed_model()), "--steps", "2", "--text", str(texts)]
    assert run([*arguments, "--basis", "principal", "--out", str(tmp_path / "path")]) == 0
    assert "6 of 18 pairs keep their axes: an activation" in capsys.readouterr().out


def test_a_short_search_goes_on_from_its_checkpoint(texts, tmp_path, capsys):
    arguments = ["search", str(installed_model()), "--steps", "2", "--text", str(texts), "--json"]
    checkpoint = ["--checkpoint", str(tmp_path / "state")]
    assert run([*arguments, *checkpoint, "--out", str(tmp_path / "one")]) == 0
    assert out_of(capsys)["units"] == 13_824
    assert run([*arguments, *checkpoint, "--out", str(tmp_path / "two")]) == 0
    one, two = (solpath.SolutionPath.load(tmp_path / name) for name in ("one", "two"))
    assert one.order().tolist() == two.order().tolist()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "{path}"], "exactly one of --sparsity, --params"),
        (["plan", "{path}", "--latency-ms", "5"], "--latency-ms needs --latency FILE"),
        (["plan", "{path}", "--latency-ms", "5", "--latency", "{tmp}/no.json"], "no.json"),
        (["plan", "{path}", "--sparsity", "1.5"], "[0, 1)"),
        (["plan", "{path}", "--sparsity", "0.5", "--params", "0.5"], "exactly one"),
        (["plan", "{path}", "--sparsity", "0.5", "--protect", "zzz"], "'zzz' matches no pair"),
        (["plan", "{tmp}/nothing", "--sparsity", "0.5"], "nothing does not exist"),
        (["extract", "{model}", "{path}", "--sparsity", "0.5", "--out", "{path}"], "is not empty"),
        (["inspect", "{tmp}/nothing"], "nothing"),
        (["search", "{model}", "--out", "{tmp}/p", "--method", "best"], "method must be one of"),
        (["search", "{model}", "--out", "{tmp}/p", "--basis", "best"], "basis must be one of"),
        (
            ["search", "{model}", "--out", "{tmp}/p", "--method", "random", "--basis", "principal"],
            "not of random",
        ),
        (["plan", "{path}", "--cache", "0.5"], "cache is no budget"),
        (["search", "{model}", "--out", "{tmp}/p", "--steps", "0"], "steps must be an integer"),
        (
            ["search", "{model}", "--out", "{tmp}/p", "--method", "random", "--steps", "9"],
            "not of random",
        ),
        (
            ["compensate", "{tmp}", "{model}", "--out", "{tmp}/c", "--batches", "3"],
            "batches must be at least 4",
        ),
        (["search", "{model}", "--out", "{tmp}/p", "--text", "{tmp}/no.txt"], "no.txt"),
        (["search", "{model}"], "--out"),
        (["demo", "--out", "{path}"], "is not empty"),
        (["report", "{tmp}"], "family.json"),
        (["tune", "{model}", "{model}", "--out", "{tmp}/t"], "solpath.json"),
        (
            ["tune", "{tmp}", "{model}", "--out", "{tmp}/t", "--lora-rank", "0"],
            "--lora-rank must",
        ),
        (["dance"], "dance"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, path, tmp_path, capsys):
    capsys.readouterr()
    values = {"path": path, "tmp": tmp_path, "model": installed_model()}
    assert run([a.format(**values) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback(path):
    with pytest.raises(solpath.SolpathError):
        run(["--debug", "plan", str(path), "--sparsity", "7"])


def test_interrupt_exits_130_with_a_hint(texts, tmp_path, monkeypatch, capsys):
    import solpath.searching.search

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(solpath.searching.search, "search", interrupted)
    arguments = ["search", str(installed_model()), "--text", str(texts)]
    arguments += ["--out", str(tmp_path / "path"), "--checkpoint", str(tmp_path / "state")]
    assert run(arguments) == 130
    assert "stopped; nothing is kept: run the same command again" in capsys.readouterr().err
    (tmp_path / "state" / "search.safetensors").touch()
    assert run(arguments) == 130
    assert f"the state is in {tmp_path / 'state'}: run the same" in capsys.readouterr().err


def test_no_arguments_show_the_help(capsys):
    assert run([]) == 0
    assert capsys.readouterr().out.count("\n") > 10


def test_a_model_with_a_decoder_of_its_own_is_for_python(texts, tmp_path, capsys):
    build("t5").save_pretrained(tmp_path / "t5")
    for command in (
        ["search", str(tmp_path / "t5"), "--text", str(texts), "--out", str(tmp_path / "path")],
        ["eval", str(tmp_path / "t5"), "--reference", str(tmp_path / "t5")],
        ["bench", str(tmp_path / "t5"), str(tmp_path / "t5")],
    ):
        assert run(command) == 2
        assert "takes decoder input and text; " in capsys.readouterr().err


def test_the_text_half_of_a_model_that_sees_takes_text():
    kinds = {label: takes(build(label)) for label in ("gemma3", "gemma3_text", "bert", "vit")}
    assert kinds == {
        "gemma3": {"image", "text"}, "gemma3_text": {"text"}, "bert": {"text"}, "vit": {"image"}
    }  # fmt: skip


def test_a_decoder_without_padding_is_compared_on_blocks(tmp_path, capsys):
    words = Tokenizer(models.WordLevel({"the": 0, "a": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="?").save_pretrained(tmp_path)
    build("gpt2").save_pretrained(tmp_path)
    assert run(["eval", str(tmp_path), "--reference", str(tmp_path), "--json"]) == 0
    assert out_of(capsys)["metrics"]["kl"] == 0


def test_bench_of_a_decoder_generates(tmp_path, capsys):
    folder = str(tmp_path)
    build("gpt2").save_pretrained(tmp_path)
    arguments = ["bench", folder, folder, "--samples", "1", "--repeats", "1", "--generate", "3"]
    assert run([*arguments, "--tokens", "37", "--json"]) == 0
    found = out_of(capsys)["models"][folder]["generation"]
    assert (found["prompt"], found["tokens"], found["cache_tokens"]) == (37, 3, 39)
    assert run([*arguments, "--tokens", "37"]) == 0
    assert "without cache" in capsys.readouterr().out
    assert run([*arguments, "--tokens", "38"]) == 2
    assert "tokens must be at most 40 for this model, less 3 new ones" in capsys.readouterr().err


def test_the_attention_that_was_asked_for_is_saved(path, tmp_path):
    model = str(installed_model())
    for attention in ("sdpa", "eager"):
        out = str(tmp_path / attention)
        options = ["--sparsity", "0.5", "--attention", attention, "--json"]
        assert run(["extract", model, str(path), "--out", out, *options]) == 0
        assert json.loads((tmp_path / attention / "solpath.json").read_text())["attention"] == (
            attention
        )


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A tiny ViT with its image processor, and a folder of images."""
    folder = tmp_path_factory.mktemp("vit")
    build("vit", num_channels=3).save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (10, 10), (40 * i, 0, 200)).save(folder / "images" / f"{i}.png")
    return folder


def test_a_model_of_images(vit, tmp_path, capsys):
    model, images = str(vit / "model"), ["--images", str(vit / "images")]
    path, small = str(tmp_path / "path"), str(tmp_path / "small")
    assert run(["search", model, *images, "--steps", "3", "--out", path, "--json"]) == 0
    assert out_of(capsys)["method"] == "spp"
    assert run(["extract", model, path, "--sparsity", "0.4", "--out", small, "--json"]) == 0
    assert (tmp_path / "small" / "preprocessor_config.json").exists()
    capsys.readouterr()
    assert run(["eval", small, "--reference", model, *images, "--json"]) == 0
    assert 0 < out_of(capsys)["metrics"]["kl"] < 10


def test_a_model_takes_what_it_takes(vit, texts, tmp_path, capsys):
    out = ["--out", str(tmp_path / "path")]
    assert run(["search", str(vit / "model"), "--text", str(texts), *out]) == 2
    assert "takes images; give a folder of them with --images" in capsys.readouterr().err
    assert run(["search", str(installed_model()), "--images", str(vit / "images"), *out]) == 2
    assert "takes text, not images" in capsys.readouterr().err


def test_a_path_of_another_model_is_refused(path, tmp_path, capsys):
    build("bert").save_pretrained(tmp_path / "other")
    arguments = ["extract", str(tmp_path / "other"), str(path), "--sparsity", "0.5"]
    assert run([*arguments, "--out", str(tmp_path / "small")]) == 2
    assert "solpath: " in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, solpath.cli.main; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_quick_demo(tmp_path):
    """The whole demo with very few steps, in a process of its own, as the README starts it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "solpath", "demo", "--quick", "--steps", "3", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    family = json.loads(done.stdout)
    assert family == json.loads((out / "family.json").read_text())
    assert [member["name"] for member in family["members"]] == ["dense", "s20", "s40", "s60", "s75"]
    assert [run["name"] for run in family["methods"]] == ["spp", "random", "magnitude", "taylor"]
    stages = ["read", "search", "compensate", "score", "measure", "compare"]
    assert [stage["name"] for stage in family["stages"]] == stages
    assert all(re.search(rf"^{name}: \d+ s", done.stderr, re.M) for name in stages)
    assert (out / "report.html").stat().st_size > 10_000
    weights = (installed_model() / "model.safetensors").read_bytes()
    assert family["model"]["sha256"] == hashlib.sha256(weights).hexdigest()
    sizes = []
    for percent in (20, 40, 60, 75):
        model = solpath.load(out / "models" / f"s{percent}")
        assert abs(model.solpath_plan.achieved.sparsity - percent / 100) < 0.005
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes == sorted(sizes, reverse=True)
    assert solpath.SolutionPath.load(out / "path").method == "spp"
