"""A model that is being worked on is left alone by every other call."""

import threading

import pytest
import torch

import solpath
from conftest import batches, build, inputs
from plans import random_plan
from solpath.errors import ModelInUseError, UnsupportedModelError
from solpath.measuring.evaluation import reference_outputs
from solpath.running.claims import _claims, claimed

STEPS = solpath.SearchConfig(steps=2)


@pytest.fixture
def dense():
    return build("bert")


@pytest.fixture
def plan(dense):
    return random_plan(dense, [0.5])


def uses(dense, plan, small):
    """Every public call that would copy, search or change a model, by name."""
    some, tuning = batches(dense, 4), solpath.TuneConfig(steps=1)
    quiet = {"progress": False}
    return {
        "search": lambda: solpath.search(dense, some, STEPS, **quiet),
        "random": lambda: solpath.baselines.random(dense, some),
        "extract": lambda: solpath.extract(dense, plan, check=False),
        "masked": lambda: solpath.masked(dense, plan).__enter__(),
        "compensate": lambda: solpath.compensate(small, dense, some, **quiet),
        "tune": lambda: solpath.tune(small, dense, some, tuning, heldout=some[:1], **quiet),
        "compare": lambda: solpath.evaluate(small, dense, some),
        "measure": lambda: solpath.measure({"dense": dense}, some[0], repeats=1),
        "time": lambda: solpath.measure_latency(dense, some[0], repeats=1),
    }


NAMES = [*uses(build("bert"), None, None)]


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_model_is_only_run(name, dense, plan):
    small = solpath.extract(dense, plan)
    with solpath.masked(dense, plan), pytest.raises(ModelInUseError, match="it is masked further"):
        uses(dense, plan, small)[name]()
    assert not _claims
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    again = solpath.extract(dense, plan)
    batch = inputs(dense)
    assert torch.equal(again(**batch)[0], small(**batch)[0])


def test_a_part_of_a_masked_model_is_masked_too(plan):
    dense = build("camembert")
    plan = random_plan(dense, [0.5])
    inner = random_plan(dense.roberta, [0.5])
    with solpath.masked(dense, plan), pytest.raises(ModelInUseError, match="cannot be cut"):
        solpath.extract(dense.roberta, inner)


def test_an_extracted_model_is_not_masked(dense, plan):
    small = solpath.extract(dense, plan)
    with (
        pytest.raises(UnsupportedModelError, match="mask the dense model"),
        solpath.masked(small, plan),
    ):
        pass


def test_a_masked_model_is_evaluated_by_what_it_gives(dense, plan):
    small, some = solpath.extract(dense, plan), batches(dense)
    targets = reference_outputs(dense, some)
    with solpath.masked(dense, plan):
        found = solpath.evaluate(dense, targets, some).metrics
        with pytest.raises(ModelInUseError, match="cannot be compared with"):
            solpath.evaluate(dense, dense, some)
    expected = solpath.evaluate(small, dense, some).metrics
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_task_may_evaluate_and_measure(dense, plan):
    small, some = solpath.extract(dense, plan), batches(dense)

    def task(model):
        solpath.measure({"it": model}, some[0], repeats=1)
        solpath.extract(dense, plan)
        return solpath.evaluate(model, dense, some).metrics["cosine"]

    metrics = solpath.evaluate(small, dense, some, task=task).metrics
    assert metrics["task"] == metrics["cosine"]


def test_one_of_two_threads_searches_and_the_other_is_refused(dense):
    some, outcomes = batches(dense), []
    start = threading.Barrier(4)
    alone = solpath.search(dense, some, STEPS, progress=False)

    def work():
        start.wait()
        try:
            outcomes.append(solpath.search(dense, some, STEPS, progress=False))
        except ModelInUseError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=work, name=f"worker {i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = [found for found in outcomes if isinstance(found, solpath.SolutionPath)]
    assert paths  # those that did not meet come one after the other
    assert len(outcomes) == 4
    for path in paths:
        assert all(torch.equal(path.score[name], alone.score[name]) for name in alone.score)
    assert all("in thread 'worker" in str(e) for e in outcomes if isinstance(e, Exception))
    assert not _claims


def test_another_thread_may_not_run_a_model_that_is_evaluated(dense):
    errors = []

    def run():
        try:
            reference_outputs(dense, batches(dense))
        except ModelInUseError as error:
            errors.append(str(error))

    with claimed(dense, doing="evaluated", admits="anything"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert "cannot be run while it is evaluated in thread 'MainThread'" in errors[0]


def test_a_refused_claim_claims_nothing(dense):
    other = build("bert", seed=1)
    with claimed(dense, doing="searched"):
        with pytest.raises(ModelInUseError), claimed(other, dense, doing="tuned"):
            pass
        with claimed(other, doing="searched"):
            pass
    assert not _claims
