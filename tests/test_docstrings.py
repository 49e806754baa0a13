"""Every example in a docstring runs, with the few names that a reader has by then."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import solpath

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(solpath.__path__, "solpath.")
    if module.name != "solpath.__main__"
)


@pytest.fixture(scope="module")
def names():
    """`model`, `batches` and `batch` for it, a `path`, and `small`, cut from the model by it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=100, intermediate_size=64, **sizes)
    model = BertForSequenceClassification(config).eval()
    batches = [{"input_ids": torch.randint(1, 100, (8, 16))} for _ in range(12)]
    path = solpath.search(model, batches, solpath.SearchConfig(steps=4), progress=False)
    small = solpath.extract(model, path.plan(sparsity=0.5))
    found = {"model": model, "batches": batches, "batch": batches[0], "path": path, "small": small}
    return found | {"solpath": solpath, "torch": torch}


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, globs={**vars(module), **names})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for test in tests:
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


def test_every_public_function_has_an_example():
    lacking = [
        name
        for name in solpath.__all__
        if callable(value := getattr(solpath, name))
        and not isinstance(value, type)
        and ">>>" not in (value.__doc__ or "")
    ]
    assert not lacking
    skipped = [n for n in solpath.__all__ if "+SKIP" in (getattr(solpath, n).__doc__ or "")]
    assert not skipped
