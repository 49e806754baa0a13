"""The smallest member within a loss: its bounds hold, its samples are apart, its order is fixed."""

import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multinomial
from transformers import BertConfig, BertForSequenceClassification

import solpath
from conftest import build, inputs, randomise_
from solpath.choosing import choose as choosing
from solpath.choosing.bounds import mean_upper, paired_upper
from solpath.data.preparation import Preparation
from solpath.data.samples import batches_apart, sample_digests, unseen_samples
from solpath.errors import BatchError, ConfigError, FingerprintError, UnsupportedModelError

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=60, intermediate_size=64, num_labels=3, **sizes)
    torch.manual_seed(0)
    model = randomise_(BertForSequenceClassification(config).eval())
    with torch.no_grad():  # so that all classes are predicted
        for name, value in model.named_parameters():
            value *= 0 if name.endswith("bias") else 1
        model.classifier.bias -= model(**inputs(model, samples=100)).logits.mean(0)
    return model


@pytest.fixture(scope="module")
def path(bert):
    return solpath.baselines.magnitude(bert, heldout(bert, 2, seed=100))


def heldout(model, count, *, samples=25, seed=0, labels=False):
    """Different batches, labelled with what the dense model says."""
    found = [inputs(model, samples=samples, seed=seed + i) for i in range(count)]
    if labels:
        with torch.no_grad():
            found = [{**batch, "labels": model(**batch).logits.argmax(-1)} for batch in found]
    return found


WORLDS = [  # samples, probabilities of worse and of better: rare, equal, one-sided, half of all
    (40, 0.05, 0.0), (25, 0.25, 0.25), (40, 0.1, 0.02), (40, 0.02, 0.1), (20, 0.6, 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("samples", "worse", "better"), WORLDS)
def test_the_exact_bound_is_too_low_no_more_often_than_it_may(samples, worse, better):
    """Not by drawing: every outcome, with its probability."""
    low, seen = 0.0, 0.0
    for a, b in itertools.product(range(samples + 1), repeat=2):
        if a + b > samples:
            continue
        chance = multinomial.pmf(
            [a, b, samples - a - b], samples, [worse, better, 1 - worse - better]
        )
        if chance < 1e-5:  # too low, for all that is known
            low += chance
            continue
        seen += chance
        low += chance * (paired_upper(a, b, samples, 0.1) < worse - better)
    assert seen > 0.995
    assert low <= 0.1


def test_the_exact_bound_is_near_the_normal_one():
    """Within a tenth of its distance from the mean, where the normal one holds."""
    for samples, worse, better in [(1350, 40, 30), (5000, 400, 380)]:
        spread = worse + better - (worse - better) ** 2 / samples
        normal = 1.6449 * math.sqrt(spread)
        bound = samples * paired_upper(worse, better, samples, 0.05) - (worse - better)
        assert normal < bound < 1.1 * normal


def test_the_exact_bound_grows_with_what_is_worse_and_shrinks_with_what_is_better():
    bounds = np.array([[paired_upper(a, b, 50, 0.05) for b in range(0, 20, 3)] for a in range(8)])
    assert (np.diff(bounds, axis=0) > 0).all()
    assert (np.diff(bounds, axis=1) < 0).all()
    assert paired_upper(0, 0, 1, 0.05) >= 0.95
    assert paired_upper(1, 0, 1, 0.05) == 1.0
    assert paired_upper(0, 300, 300, 0.05) < -0.97


DRAWS = {
    "rare": (lambda rng, shape: (rng.random(shape) < 0.02).astype(float), 0.02),
    "rarer than seen": (lambda rng, shape: (rng.random(shape) < 0.0015).astype(float), 0.0015),
    "skew": (lambda rng, shape: rng.beta(0.1, 1.9, shape), 0.05),
    "wide": (lambda rng, shape: rng.integers(0, 2, shape).astype(float), 0.5),
    "narrow": (lambda rng, shape: rng.beta(50, 50, shape), 0.5),
    "high": (lambda rng, shape: 1 - rng.beta(0.1, 1.9, shape), 0.95),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_bet_is_too_low_no_more_often_than_it_may(name):
    draw, mean = DRAWS[name]
    values = draw(np.random.default_rng(1), (2000, 300))
    bounds = mean_upper(values, 0.1)
    assert (bounds < mean).mean() <= 0.1
    assert ((bounds >= 0) & (bounds <= 1)).all()
    single = mean_upper(values[0], 0.1)
    assert single == bounds[0]


def test_the_promise_holds_at_the_boundary():
    """2,000 draws from worlds in which each size loses a little more; the one in the middle, just
    too much."""
    rng, limit, delta = np.random.default_rng(0), 0.05, 0.1
    means = [0.01, 0.02, limit + 1e-9, 0.07]
    standing, broken = np.ones(2000, bool), np.zeros(2000, bool)
    for mean in means:
        values = rng.random((standing.sum(), 300)) < mean
        standing[standing] = mean_upper(values.astype(float), delta) <= limit
        broken |= standing & (mean > limit)
    assert 0 < broken.mean() <= delta


def test_a_sample_is_known_under_padding_and_other_labels():
    short = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([0, 1])}
    padded = {
        "input_ids": torch.tensor([[0, 5, 6], [9, 7, 8]], dtype=torch.int32),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "labels": torch.tensor([1, 1]),
    }
    one, other = sample_digests(short), sample_digests(padded)
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert sample_digests(short) == sample_digests(short["input_ids"])
    images = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)
    assert len(set(sample_digests(images))) == 1
    implied = {
        "token_type_ids": torch.zeros(2, 3, dtype=torch.int64),
        "position_ids": torch.tensor([[1, 0, 1], [0, 1, 2]]),
        "global_mask": torch.ones(2, 3),
    }
    assert sample_digests(padded | implied) == other
    for name, value in implied.items():
        assert len({*sample_digests(padded | {name: 1 - value}), *other}) == 4


def test_what_the_search_saw_cannot_judge(bert, path):
    """However it is padded, and whatever its label."""
    fresh = heldout(bert, 8)
    choice = solpath.choose(bert, path, fresh, 0.5, sizes=[0.1], **QUIET)
    assert "input that the search ran on, which was checked" in choice.assumptions[1]
    [seen] = heldout(bert, 1, seed=101)  # the second batch of the path
    batch = {name: value[:3].int() for name, value in seen.items()}
    batch = {name: torch.nn.functional.pad(value, (0, 2)) for name, value in batch.items()}
    batch["labels"] = torch.zeros(3, dtype=torch.int64)
    batch["input_ids"][:2, 0] = torch.tensor([58, 59])  # of two rows, the first word is another
    message = "row 2 of batch 8 was seen by the search, the first of 1 such among 203 samples;"
    options = {"metric": "divergence", "sizes": [0.1], **QUIET}
    with pytest.raises(BatchError, match=message):
        solpath.choose(bert, path, [*fresh, batch], 0.5, **options)
    left = list(batches_apart([*fresh, batch], set(path.seen.tolist())))
    assert solpath.choose(bert, path, left, 0.5, **options).samples == 202
    unknown = replace(path, seen=path.seen[:0])
    choice = solpath.choose(bert, unknown, [*fresh, batch], 0.5, **options)
    assert "is not recorded in this path" in choice.assumptions[1]


def test_rows_that_were_seen_are_left_out_with_their_groups(bert):
    batches = heldout(bert, 3, samples=4)
    batches[0]["attention_mask"][0] = 0  # a row of padding alone, which is left out later
    _, _, one, _ = sample_digests(batches[1])
    prepare = Preparation(bert)
    assert unseen_samples(batches, {one}, prepare, most=99) == ([*range(6), *range(7, 12)], 1)
    assert unseen_samples(batches, {one}, prepare, most=6) == ([*range(6)], 1)
    groups = [*"abcdefghfgfg"]
    kept = [0, 1, 2, 3, 4, 5, 7, 8, 10]
    assert unseen_samples(batches, {one}, prepare, most=9, groups=groups) == (kept, 3)
    assert unseen_samples(batches, {one}, prepare, most=2, groups=groups) == ([0, 1], 3)


def test_decoder_inputs_that_are_made_of_labels_are_known_again():
    model = build("t5")
    data = [{"input_ids": torch.tensor([[5, 6], [7, 8]]), "labels": torch.tensor([[3, 4], [4, 5]])}]
    path = solpath.baselines.magnitude(model, data)
    with pytest.raises(BatchError, match="row 0 of batch 0 was seen by the search"):
        solpath.choose(model, path, data, 0.5, **QUIET)
    other = [{**data[0], "labels": data[0]["labels"] + 1}]  # the decoder gets other inputs
    with pytest.raises(BatchError, match="2 samples cannot show"):
        solpath.choose(model, path, other, 0.5, **QUIET)


def test_choosing_by_divergence(bert, path):
    weights = {name: value.clone() for name, value in bert.state_dict().items()}
    batches = heldout(bert, 8)
    choice = solpath.choose(bert, path, batches, 0.2, sizes=[0.7, 0.1, 0.4, 0.2], **QUIET)
    assert choice.metric == "divergence"
    assert choice.samples == 200
    asked = [test.sparsity for test in choice.tests]
    assert asked == [0.1, 0.2, 0.4, 0.7][: len(asked)]
    assert [test.passed for test in choice.tests[:-1]] == [True] * (len(asked) - 1)
    last = choice.tests[-1]
    small = solpath.extract(bert, path.plan(sparsity=last.sparsity))
    expected = solpath.evaluate(small, bert, batches).metrics["kl"]
    assert last.mean == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in bert.state_dict().items())


def test_choosing_by_accuracy_stops_at_the_first_failure(bert, path, monkeypatch):
    cut = []
    real = choosing.extract
    monkeypatch.setattr(
        choosing, "extract", lambda m, plan, **o: cut.append(plan) or real(m, plan, **o)
    )
    batches = heldout(bert, 8, labels=True)
    sizes = [0.02, 0.8, 0.9, 0.95]
    choice = solpath.choose(bert, path, batches, 0.2, sizes=sizes, **QUIET)
    assert choice.metric == "accuracy"
    assert not choice.tests[-1].passed
    assert len(cut) == len(choice.tests) < len(sizes)
    assert choice.sparsity == choice.tests[-2].sparsity
    assert choice.plan is cut[-2]
    assert choice.model.solpath_plan is choice.plan
    with torch.no_grad():
        small = solpath.extract(bert, cut[-1])
        right = [(small(**b).logits.argmax(-1) == b["labels"]).float() for b in batches]
    assert choice.tests[-1].mean == pytest.approx(1 - torch.cat(right).mean().item())
    value = json.loads(json.dumps(choice.to_dict()))
    assert value["sparsity"] == choice.sparsity
    assert value["tests"][-1]["passed"] is False
    assert "failed" in repr(choice)


def test_the_dense_model_is_returned_if_no_size_passes(bert, path):
    batches = heldout(bert, 8, labels=True)
    choice = solpath.choose(bert, path, batches, 0.05, sizes=[0.9, 0.95], **QUIET)
    assert choice.plan is None
    assert choice.model is bert
    assert choice.sparsity == 0
    assert choice.to_dict()["plan"] is None
    assert len(choice.tests) == 1


def test_samples_needed(bert, path):
    choice = solpath.choose(bert, path, heldout(bert, 8), 0.2, sizes=[0.05, 0.1], **QUIET)
    first = choice.tests[0]
    assert choice.samples_needed(first.bound, sparsity=0.05) == pytest.approx(200, abs=1)
    tight = (first.bound + first.mean) / 2
    assert choice.samples_needed(tight, sparsity=0.05) == pytest.approx(800, abs=1)
    with pytest.raises(ConfigError, match="no number"):
        choice.samples_needed(first.mean, sparsity=0.05)
    with pytest.raises(ConfigError, match="not tested"):
        choice.samples_needed(0.1, sparsity=0.3)
    with pytest.raises(ConfigError, match="max_loss must be a number"):
        choice.samples_needed(math.nan)


def test_constraints_are_those_of_a_plan(bert, path):
    options = {"multiple_of": 4, "uniform": True, "sizes": [0.1]}
    choice = solpath.choose(bert, path, heldout(bert, 8), 0.5, **options, **QUIET)
    assert choice.plan.asked["multiple_of"] == 4
    with pytest.raises(ConfigError, match="not params="):
        solpath.choose(bert, path, heldout(bert, 8), 0.5, params=0.5, **QUIET)


def test_compensated_members_are_fitted_on_other_samples(bert, path):
    batches, apart = heldout(bert, 8), heldout(bert, 4, seed=50)
    options = {"sizes": [0.4], **QUIET}
    plain = solpath.choose(bert, path, batches, 0.9, **options)
    fitted = solpath.choose(bert, path, batches, 0.9, compensate=apart, **options)
    small = solpath.extract(bert, path.plan(sparsity=0.4))
    small = solpath.compensate(small, bert, apart, **QUIET)
    expected = solpath.evaluate(small, bert, batches).metrics["kl"]
    assert fitted.tests[0].mean == pytest.approx(expected, rel=1e-4) != plain.tests[0].mean
    assert any("compensated" in text for text in fitted.assumptions)
    mixed = [*apart, {name: value[:2] for name, value in batches[3].items()}]
    with pytest.raises(BatchError, match="row 0 of compensation batch 4 is also row 0 of batch 3"):
        solpath.choose(bert, path, batches, 0.9, compensate=mixed, **options)


def test_repeated_samples_count_once(bert, path):
    batches = heldout(bert, 8)
    once = solpath.choose(bert, path, batches, 0.5, sizes=[0.1], **QUIET)
    again = [*batches, batches[2], {name: v[:3] for name, v in batches[4].items()}]
    twice = solpath.choose(bert, path, again, 0.5, sizes=[0.1], **QUIET)
    assert twice.tests == once.tests
    assert any("28 samples that repeat" in text for text in twice.assumptions)


def test_too_few_samples_are_refused_before_a_model_is_cut(bert, path, monkeypatch):
    monkeypatch.setattr(choosing, "extract", None)
    batches = heldout(bert, 2, labels=True)
    with pytest.raises(BatchError, match=r"50 samples cannot show .* give 2\d\d or more"):
        solpath.choose(bert, path, batches, 0.012, **QUIET)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_loss": 0}, "max_loss must lie between 0 and inf"),
        ({"max_loss": 1.5}, "max_loss must be below 1"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ({"clip": -1}, "clip must be a number"),
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": 0.3}, "sizes must be a list"),
        ({"sizes": [0.1, "b"]}, "a size must be a number"),
        ({"metric": "loss"}, "metric must be"),
    ],
)
def test_settings_out_of_range(bert, path, options, error):
    options = {"max_loss": 0.5} | options | QUIET
    with pytest.raises(ConfigError, match=error):
        solpath.choose(bert, path, heldout(bert, 2), **options)


def test_an_unknown_constraint_is_refused_with_those_that_are_near(bert, path):
    for name, near in {"multipleof": "multiple_of", "progres_": "multiple_of, for_"}.items():
        with pytest.raises(TypeError, match=rf"choose\(\) got an .* '{name}'; .* such as {near}"):
            solpath.choose(bert, path, heldout(bert, 2), 0.5, **{name: 8}, **QUIET)


def test_too_few_batches_to_fit_on_are_refused_before_a_model_runs(bert, path, monkeypatch):
    monkeypatch.setattr(choosing, "metric_for", pytest.fail)
    with pytest.raises(BatchError, match="compensate needs at least 4 batches, got 2"):
        solpath.choose(
            bert, path, heldout(bert, 4), 0.5, compensate=heldout(bert, 2, seed=50), **QUIET
        )


class Shuffled(list):
    """A sequence that gives other batches every time."""

    def __getitem__(self, index):
        self.reads = getattr(self, "reads", 0) + 1
        return super().__getitem__((index + self.reads // (2 * len(self))) % len(self))


def test_batches_must_be_the_same_when_read_again(bert, path):
    with pytest.raises(BatchError, match="other samples"):
        solpath.choose(bert, path, Shuffled(heldout(bert, 4)), 0.5, sizes=[0.1, 0.2], **QUIET)
    with pytest.raises(BatchError, match="without a length"):
        solpath.choose(bert, path, (b for b in heldout(bert, 4)), 0.5, **QUIET)


def test_accuracy_needs_labels(bert, path):
    batches = heldout(bert, 4, labels=True)
    del batches[2]["labels"]
    with pytest.raises(BatchError, match="batch 2 has no labels"):
        solpath.choose(bert, path, batches, 0.5, **QUIET)
    with pytest.raises(BatchError, match="metric='divergence'"):
        solpath.choose(bert, path, heldout(bert, 4), 0.5, metric="accuracy", **QUIET)


def test_the_accuracy_of_a_decoder_is_that_of_the_next_token():
    model = build("llama")
    batches = heldout(model, 8, samples=20)
    path = solpath.baselines.magnitude(model, heldout(model, 2, seed=90))
    for batch in batches:
        ids, keep = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            guess = model(**batch).logits.argmax(-1)
        batch["labels"] = torch.cat([ids[:, :1], guess[:, :-1]], 1).where(keep > 0, -100)
    choice = solpath.choose(model, path, batches, 0.9, sizes=[0.3], **QUIET)
    small = solpath.extract(model, path.plan(sparsity=0.3))
    shares = []
    for batch in batches:
        with torch.no_grad():
            guess = small(**batch).logits.argmax(-1)[:, :-1]
        goal = batch["labels"][:, 1:]
        shares.append(((guess == goal) & (goal >= 0)).sum(1) / (goal >= 0).sum(1))
    assert choice.metric == "accuracy"
    assert choice.tests[0].mean == pytest.approx(1 - torch.cat(shares).mean().item())


def test_the_divergence_of_a_decoder_is_compared_without_its_logits():
    model = build("llama")
    batches = [{"input_ids": inputs(model, samples=30, seed=i)["input_ids"]} for i in range(3)]
    path = solpath.baselines.magnitude(model, batches[:1])
    choice = solpath.choose(model, path, batches[1:], 0.99, sizes=[0.3], clip=10.0, **QUIET)
    small = solpath.extract(model, path.plan(sparsity=0.3))
    expected = solpath.evaluate(small, model, batches[1:]).metrics["kl"]
    assert choice.tests[0].mean == pytest.approx(expected, rel=1e-3)


def test_padding_is_left_out_with_one_warning(bert, path):
    batches = heldout(bert, 8)
    batches[1]["attention_mask"][3] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = solpath.choose(bert, path, batches, 0.5, sizes=[0.1], **QUIET)
    assert choice.samples == 199
    assert sum("padding alone" in str(w.message) for w in caught) == 1


def test_samples_whose_tensors_have_no_row_for_each_are_told_apart():
    """Patches of images end to end, as Qwen-VL takes them; nor is a mask of text one of images."""
    ids = torch.tensor([[5, 6]])
    one, other = ({"input_ids": ids, "pixel_values": torch.full((4, 3), x)} for x in (0.0, 1.0))
    assert sample_digests(one) == sample_digests({**one, "labels": torch.tensor([1])})
    assert sample_digests(one) != sample_digests(other)
    mask = torch.tensor([[1, 0]])
    one, other = (
        {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.tensor([[[1.0], [x]]])}
        for x in (2.0, 3.0)
    )
    assert sample_digests(one) != sample_digests(other)
    padded = {**other, "pixel_attention_mask": mask}
    assert sample_digests({**one, "pixel_attention_mask": mask}) == sample_digests(padded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels + 3, "row 0 of batch 0 has the label .*3 classes, numbered from 0"),
        (lambda labels: labels - 1, "has the label -1"),
        (lambda labels: labels * 0.5 + 0.1, "has the label"),
        (lambda labels: (labels + 1) % 3, "not one label right"),
    ],
)
def test_labels_that_the_model_cannot_predict_are_refused(bert, path, change, message):
    """Nobody is right about them, so no member would lose anything."""
    given = [{**b, "labels": change(b["labels"])} for b in heldout(bert, 2, labels=True)]
    with pytest.raises(BatchError, match=message):
        solpath.choose(bert, path, given, 0.5, **QUIET)


def test_a_choice_tells_the_accuracy_of_the_dense_model(bert, path):
    given = heldout(bert, 2, labels=True)
    given[0]["labels"][0] = (given[0]["labels"][0] + 1) % 3
    choice = solpath.choose(bert, path, given, 0.5, sizes=[0.1], **QUIET)
    assert any("accuracy of the dense model, 0.98 on" in text for text in choice.assumptions)


def test_a_row_is_named_by_its_place_in_the_batch_although_repeats_are_left_out(bert, path):
    [batch] = heldout(bert, 1, labels=True)
    twice = {name: torch.cat([value[:1], value[:1], value]) for name, value in batch.items()}
    twice["labels"][5] = 9
    with pytest.raises(BatchError, match="row 5 of batch 0"):
        solpath.choose(bert, path, [twice], 0.5, **QUIET)


def test_a_regression_needs_a_batch_besides_the_first(bert):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_labels": 1}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).eval()
    [batch] = heldout(bert, 1)
    path = solpath.baselines.magnitude(model, heldout(bert, 1, seed=100))
    with pytest.raises(BatchError, match="the first batch sets the scale"):
        solpath.choose(model, path, [batch], 0.5, **QUIET)


def test_another_model_is_refused_before_it_is_run(bert, path, monkeypatch):
    monkeypatch.setattr(choosing, "metric_for", None)
    given = heldout(bert, 2)
    with pytest.raises(FingerprintError):
        solpath.choose(build("bert", seed=3), path, given, 0.5, **QUIET)
    small = solpath.extract(bert, path.plan(sparsity=0.3))
    with pytest.raises(UnsupportedModelError, match="already extracted"):
        solpath.choose(small, path, given, 0.5, **QUIET)


def test_groups_are_the_draws(bert, path):
    """The loss of a group is the mean over its samples, wherever they stand in the batches."""
    batches = heldout(bert, 4)
    groups = [f"document {i // 2}" for i in range(100)]
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = {name: torch.cat([batch[name] for batch in batches])[order] for name in batches[0]}
    alone = choosing.choose(bert, path, batches, 1.9, clip=2.0, sizes=[0.4], **QUIET)
    choice = solpath.choose(bert, path, batches, 1.9, clip=2.0, sizes=[0.4], groups=groups, **QUIET)
    other = solpath.choose(
        bert, path, [mixed], 1.9, clip=2.0, sizes=[0.4],
        groups=np.array([i // 2 for i in order]), **QUIET,
    )  # fmt: skip
    assert (choice.samples, choice.groups, alone.groups) == (100, 50, None)
    assert choice.tests[0].mean == pytest.approx(alone.tests[0].mean, rel=1e-6)
    assert other.tests[0].mean == pytest.approx(alone.tests[0].mean, rel=1e-6)
    assert other.groups == 50
    assert "groups are independent" in choice.assumptions[0]
    assert "100 samples of 50 groups" in repr(choice)
    assert json.loads(json.dumps(choice.to_dict()))["groups"] == 50


def test_rows_that_are_alike_prove_no_more_than_one_of_them(bert, path):
    """Ten near copies of every sample: as samples they promise more than is known."""
    [batch] = heldout(bert, 1, samples=60)
    few = {name: value.repeat_interleave(10, 0) for name, value in batch.items()}
    few["input_ids"][:, -1] = torch.arange(600) % 10 + 20
    groups = [i // 10 for i in range(600)]
    options = {"sizes": [0.4], "clip": 2.0, **QUIET}
    naive = solpath.choose(bert, path, [few], 1.9, **options).tests[0].bound
    honest = solpath.choose(bert, path, [few], 1.9, groups=groups, **options).tests[0].bound
    single = solpath.choose(bert, path, [batch], 1.9, **options).tests[0].bound
    assert naive < 0.8 * honest
    assert honest > 0.5 * single


def test_accuracies_of_groups_are_bounded_as_means(bert, path):
    batches = heldout(bert, 4, labels=True)
    each = solpath.choose(bert, path, batches, 0.5, sizes=[0.1], **QUIET).tests[0]
    groups = list(range(100))
    own = solpath.choose(bert, path, batches, 0.5, sizes=[0.1], groups=groups, **QUIET).tests[0]
    assert own.mean == each.mean
    assert own.bound > each.bound  # by betting; exact bounds are of -1, 0 and 1 alone


def test_groups_of_the_batch_that_sets_a_scale_do_not_judge():
    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, problem_type="regression",
    )  # fmt: skip
    model = randomise_(BertForSequenceClassification(config).eval())
    path = solpath.baselines.magnitude(model, heldout(model, 1, seed=100))
    batches = heldout(model, 3)
    groups = [*range(25), *[0] * 5, *range(100, 120), *range(200, 225)]
    choice = solpath.choose(model, path, batches, 0.9, sizes=[0.1], groups=groups, **QUIET)
    assert (choice.samples, choice.groups) == (45, 45)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0] * 99, "99 entries for 100 rows"),
        (list(range(101)), "101 entries for 100 rows"),
        ([None] * 100, "entry 0 of groups is None"),
        ([1.0] * 99 + [math.nan], "entry 99 of groups is nan"),
        ([[1]] * 100, "entry 0 of groups is a list"),
        ([torch.tensor(1)] * 100, "entry 0 of groups is a Tensor"),
        ("patient", "groups must be a list"),
    ],
)
def test_groups_must_name_every_row(bert, path, groups, message):
    with pytest.raises(BatchError, match=message):
        solpath.choose(bert, path, heldout(bert, 4), 0.5, groups=groups, **QUIET)


def test_groups_follow_rows_of_padding_that_are_left_out(bert, path):
    batches = heldout(bert, 2)
    batches[0]["attention_mask"] = torch.ones_like(batches[0]["input_ids"])
    batches[0]["attention_mask"][0] = 0
    groups = ["gone", *["a"] * 24, *["b"] * 25]
    with pytest.warns(UserWarning, match="skipped 1 row"):
        choice = solpath.choose(
            bert, path, batches, 1.9, clip=2.0, sizes=[0.1], groups=groups, confidence=0.3, **QUIET
        )
    assert (choice.samples, choice.groups) == (49, 2)
