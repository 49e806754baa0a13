"""What block a public function is called in changes nothing that it returns."""

import contextlib

import pytest
import torch

import solpath
from conftest import batches, build
from plans import random_plan
from solpath.errors import BatchError, UnsupportedModelError
from solpath.measuring.evaluation import reference_outputs
from solpath.running.modes import plain_torch


@contextlib.contextmanager
def default(dtype):
    found = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(found)


BLOCKS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
}
STEPS = solpath.SearchConfig(steps=2)


def everything(label, folder):
    """The tensors and figures of one call of every function."""
    model = build(label)
    some, quiet = batches(model, 4), {"progress": False}
    targets = reference_outputs(model, some)

    def work():
        path = solpath.search(model, some, STEPS, **quiet)
        plan = path.plan(sparsity=0.5)
        small = solpath.extract(model, plan)
        refitted = solpath.compensate(small, model, some, **quiet)
        config = solpath.TuneConfig(steps=2, learning_rate=1e-3)
        tuned = solpath.tune(small, model, some, config, heldout=some[:1], **quiet)
        solpath.save(tuned, folder, overwrite=True)
        loaded = solpath.load(folder)
        macs = solpath.measure({"it": loaded}, some[0], repeats=1)["it"].macs
        with solpath.masked(model, plan):
            figures = solpath.evaluate(model, targets, some).metrics
        rival = solpath.baselines.taylor(model, some, scale_batches=2)
        models = {"small": small, "refitted": refitted, "tuned": tuned, "loaded": loaded}
        tensors = {f"score.{name}": score for name, score in path.score.items()}
        tensors |= {f"rival.{name}": score for name, score in rival.score.items()}
        for name, one in models.items():
            tensors |= {f"{name}.{key}": value for key, value in one.state_dict().items()}
        return tensors, figures | {"macs": macs}

    return work


def test_blocks_of_the_caller_change_nothing(tmp_path):
    work = everything("bert", tmp_path / "saved")
    tensors, figures = work()
    for name, block in BLOCKS.items():
        with block():
            found = torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(0).device
            there, numbers = work()
            after = torch.get_default_dtype(), torch.is_grad_enabled(), torch.empty(0).device
        assert found == after
        assert numbers == figures, name
        assert there.keys() == tensors.keys()
        for key, value in tensors.items():
            assert there[key].dtype == value.dtype, (name, key)
            assert torch.equal(there[key], value), (name, key)
            assert not there[key].is_inference(), (name, key)


def test_a_default_device_of_the_caller_changes_nothing(tmp_path):
    model = build("bert")
    plan = random_plan(model, [0.5])
    small = solpath.extract(model, plan)
    some = batches(model)
    path = solpath.search(model, some, STEPS, progress=False)
    with torch.device("meta"):
        again = solpath.search(model, some, STEPS, progress=False)
        solpath.save(solpath.extract(model, plan), tmp_path / "saved")
        loaded = solpath.load(tmp_path / "saved")
        assert torch.empty(0).device.type == "meta"
    assert all(torch.equal(again.score[name], path.score[name]) for name in path.score)
    there = loaded.state_dict()
    assert all(torch.equal(there[name], value) for name, value in small.state_dict().items())


def test_a_plan_made_in_inference_mode_gives_a_model_that_can_be_trained():
    model = build("qwen3")
    with torch.inference_mode():
        small = solpath.extract(model, random_plan(model, [0.5]))
    small(**batches(model)[0]).logits.sum().backward()


def test_inference_tensors_are_refused_where_gradients_are_taken():
    with torch.inference_mode():
        model = build("vit")
        some = batches(model)
    with pytest.raises(UnsupportedModelError, match=r"made in torch\.inference_mode"):
        solpath.search(model, some, STEPS, progress=False)
    model = build("vit")
    with pytest.raises(BatchError, match=r"pixel_values was made in torch\.inference_mode"):
        solpath.search(model, some, STEPS, progress=False)


def test_what_is_inside_keeps_the_gradient_mode_of_the_caller():
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with plain_torch():
                assert torch.is_grad_enabled() is grad
            with torch.inference_mode(), plain_torch():
                assert not torch.is_grad_enabled()
                assert not torch.is_inference_mode_enabled()


def autocasting():
    nesting = torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()
    casting = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return nesting, casting, torch.is_autocast_cache_enabled()


def test_an_autocast_that_was_never_left_does_not_stay():
    found = autocasting()
    with plain_torch():
        torch.autocast("cpu", torch.float16, cache_enabled=False).__enter__()
        assert autocasting() != found
    assert autocasting() == found
