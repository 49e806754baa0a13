"""What wraps a model is taken off where one model is inside, or refused with what to pass."""

import pytest
import torch
import transformers
from torch import nn

import solpath
from conftest import batches, build
from plans import random_plan
from solpath.errors import UnsupportedModelError
from solpath.measuring.evaluation import reference_outputs

STEPS = solpath.SearchConfig(steps=2)
QUIET = {"progress": False}


def compiled(model):
    return torch.compile(model, backend="eager")


def calls(wrap, folder):
    """Every public function that takes a model, on one that `wrap` wrapped."""
    dense = build("bert")
    plan, some = random_plan(dense, [0.5]), batches(dense, 4)
    small = solpath.extract(dense, plan)
    tuning = solpath.TuneConfig(steps=1, learning_rate=1e-3)
    targets = reference_outputs(dense, some)

    def masked():
        with solpath.masked(wrap(dense), plan):
            return solpath.evaluate(dense, targets, some).metrics

    return {
        "find_pairs": lambda: solpath.find_pairs(wrap(dense)),
        "search": lambda: solpath.search(wrap(dense), some, STEPS, **QUIET).score,
        "random": lambda: solpath.baselines.random(wrap(dense), some).score,
        "extract": lambda: solpath.extract(wrap(dense), plan).state_dict(),
        "masked": masked,
        "compensate": lambda: solpath.compensate(
            wrap(small), wrap(dense), some, **QUIET
        ).state_dict(),
        "tune": lambda: solpath.tune(
            wrap(small), wrap(dense), some, tuning, heldout=some, **QUIET
        ).state_dict(),
        "evaluate": lambda: solpath.evaluate(wrap(small), wrap(dense), some).metrics,
        "save": lambda: saved(wrap(small), folder),
    }


def saved(model, folder):
    solpath.save(model, folder, overwrite=True)
    return solpath.load(folder).state_dict()


NAMES = [*calls(lambda model: model, None)]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_changes_nothing(name, tmp_path):
    expected = calls(lambda model: model, tmp_path)[name]()
    found = calls(lambda model: compiled(nn.DataParallel(model)), tmp_path)[name]()
    if isinstance(expected, dict) and isinstance(next(iter(expected.values())), torch.Tensor):
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    else:
        assert found == expected


def pipe(model):
    return transformers.pipeline("feature-extraction", model=model, tokenizer=object())


def adapted(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


class InPlace(nn.Module):
    def __new__(cls, model):
        model.compile(backend="eager")
        return model


REFUSED = {
    "pipeline": (pipe, r"pass pipe\.model"),
    "peft": (adapted, r"pass model\.merge_and_unload\(\)"),
    "compiled in place": (InPlace, r"without model\.compile\(\)"),
    "a number": (lambda model: 3, "a int is no model"),
}


@pytest.mark.parametrize("wrapper", REFUSED)
def test_what_to_pass_instead(wrapper, tmp_path):
    wrap, message = REFUSED[wrapper]
    for name in ("masked", "compensate") if wrapper == "compiled in place" else ("extract", "save"):
        with pytest.raises(UnsupportedModelError, match=message):
            calls(wrap, tmp_path)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_refused_everywhere(name, tmp_path):
    wrap, message = REFUSED["pipeline"]
    with pytest.raises(UnsupportedModelError, match=message):
        calls(wrap, tmp_path)[name]()


def test_what_was_compiled_in_place_is_cut_and_evaluated(tmp_path):
    """Hooks are all that it cannot run."""
    for name in ("extract", "evaluate", "save"):
        assert calls(InPlace, tmp_path)[name]()


def test_only_what_takes_batches_is_measured():
    model = build("bert")
    some = batches(model)
    with pytest.raises(UnsupportedModelError, match=r"pass pipe\.model"):
        solpath.measure({"pipe": pipe(model)}, some[0], repeats=1)
    assert solpath.measure({"it": compiled(model)}, some[0], repeats=1)["it"].params


def test_merged_adapters_leave_an_extracted_model(tmp_path):
    dense = build("bert")
    small = solpath.extract(dense, random_plan(dense, [0.5]))
    merged = adapted(small).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert solpath.load(tmp_path).solpath_plan.widths == small.solpath_plan.widths


def test_inside_a_sentence_transformer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    build("bert").save_pretrained(tmp_path)
    whole = library.SentenceTransformer(str(tmp_path), device="cpu")
    with pytest.raises(UnsupportedModelError, match=r"takes texts; pass st\[0\]\.(auto_)?model"):
        solpath.search(whole, ["a b", "c"])
    dense = whole[0].auto_model
    small = solpath.extract(dense, random_plan(dense, [0.5]))
    [name] = [name for name, child in whole[0].named_children() if child is dense]
    setattr(whole[0], name, small)
    texts, folder = ["a b c", "d e"], str(tmp_path / "out")
    wanted = whole.encode(texts)
    whole.save(folder)
    again = library.SentenceTransformer(folder, device="cpu")
    assert (again.encode(texts) == wanted).all()
    assert again[0].auto_model.solpath_plan.widths == small.solpath_plan.widths
    assert solpath.load(folder, verify=True).solpath_plan.widths == small.solpath_plan.widths
