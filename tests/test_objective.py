"""What is compared follows from what a model predicts: no head is taken for another."""

import copy

import pytest
import torch
import transformers
from torch.nn import functional

import solpath
from conftest import IMAGE, SIZES, TEXT, batches, randomise_
from solpath import SearchConfig, TuneConfig
from solpath.errors import BatchError
from solpath.objective import kind_of
from solpath.running.forward import run

SHORT = SearchConfig(steps=4, scale_batches=2)
LLAMA = {"num_key_value_heads": 2}


def head(name: str, sizes: dict | None = None, **changes) -> torch.nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    sizes = SIZES | TEXT if sizes is None else sizes
    return randomise_(cls(cls.config_class(**copy.deepcopy(sizes) | changes)).eval())


def qa_loss(outputs, batch):
    return sum(
        functional.cross_entropy(logits, batch["input_ids"][:, 0] % 3)
        for logits in (outputs.start_logits, outputs.end_logits)
    )


MODELS = {
    "classes": lambda: head("BertForSequenceClassification", num_labels=3),
    "tokens": lambda: head("BertForTokenClassification", num_labels=3),
    "next sentence": lambda: head("BertForNextSentencePrediction"),
    "regression bert": lambda: head("BertForSequenceClassification", num_labels=1),
    "regression llama": lambda: head("LlamaForSequenceClassification", SIZES | TEXT | LLAMA,
                                     num_labels=1),
    "regression vit": lambda: head("ViTForImageClassification", SIZES | IMAGE, num_labels=1),
    "regression of three": lambda: head("BertForSequenceClassification", num_labels=3,
                                        problem_type="regression"),
    "labels": lambda: head("BertForSequenceClassification", num_labels=5,
                           problem_type="multi_label_classification"),
    "labels per token": lambda: head("ElectraForPreTraining", embedding_size=16),
    "spans": lambda: head("BertForQuestionAnswering"),
    "spans of distilbert": lambda: head(
        "DistilBertForQuestionAnswering",
        {"vocab_size": 60, "dim": 36, "n_heads": 4, "n_layers": 2, "hidden_dim": 43},
    ),
    "hidden image": lambda: head("ViTForMaskedImageModeling",
                                 SIZES | IMAGE | {"encoder_stride": 4}),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def case(request):
    model = MODELS[request.param]()
    return request.param.split()[0], model, batches(model, 8)


KINDS = {"tokens": "classes", "next": "classes"}


def test_the_kind_is_what_the_model_says(case):
    name, model, data = case
    assert kind_of(model, run(model, data[0], labels=False)) == KINDS.get(name, name)


def test_a_search_has_a_signal_and_a_smaller_model_is_not_the_dense_one(case):
    """Nothing says that a model with half of its units is the dense one; the dense one is."""
    _, model, data = case
    path = solpath.search(model, data, SHORT, progress=False)
    assert path.history[0, -1] > 0
    assert path.score[path.pairs[0].name].unique().numel() > 1
    small = solpath.extract(model, path.plan(sparsity=0.5))
    same, cut = (solpath.evaluate(m, model, data).metrics for m in (model, small))
    assert same["relative_error"] == 0
    assert cut["relative_error"] > 1e-7
    assert same.get("kl", 0) == pytest.approx(0, abs=1e-6)
    assert same.get("agreement", 1) == 1
    assert cut.get("kl", 1) > 3 * abs(same.get("kl", 0))


def test_what_is_left_can_be_improved(case):
    _, model, data = case
    path = solpath.baselines.magnitude(model, data)
    small = solpath.extract(model, path.plan(sparsity=0.4))
    tuned = solpath.tune(
        small, model, data, TuneConfig(steps=30, learning_rate=3e-3, evaluate_every=10),
        heldout=data, progress=False,
    )  # fmt: skip
    refitted = solpath.compensate(small, model, data, progress=False)
    found = [solpath.evaluate(m, model, data).metrics for m in (small, tuned, refitted)]
    metric = "kl" if "kl" in found[0] else "relative_error"
    before, trained, fitted = (metrics[metric] for metrics in found)
    assert trained < before
    assert fitted <= before * 1.001


def test_shifted_labels_are_noticed():
    """Add 3 to every bias of a multi-label classifier: most decisions change, a softmax stays."""
    model = MODELS["labels"]()
    data = batches(model, 8)
    other = copy.deepcopy(model)
    other.classifier.bias.data += 3
    found = solpath.evaluate(other, model, data).metrics
    dense = torch.cat([run(model, batch, labels=False).logits for batch in data])
    changed = ((dense > 0) != (dense + 3 > 0)).float().mean()
    assert found["agreement"] == pytest.approx(1 - changed.item(), abs=1e-6)
    p, q = dense.sigmoid(), (dense + 3).sigmoid()
    kl = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-4)


def test_padding_is_no_answer():
    """Logits at padding say nothing, whatever they are."""
    model = MODELS["spans"]()
    [batch] = batches(model, 1)
    reference = solpath.measuring.evaluation.reference_outputs(model, [batch])
    reference[0] = reference[0].masked_fill(batch["attention_mask"][:, None] == 0, 50.0)
    found = solpath.evaluate(model, reference, [batch]).metrics
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["agreement"] == 1


@pytest.mark.parametrize("case", ["regression", "spans"])
def test_figures_and_the_spread_leave_padding_out(case):
    """What stands under the padding changes no figure, no scale of the loss, and no path."""
    names = {"spans": "BertForQuestionAnswering", "regression": "BertForTokenClassification"}
    model = head(names[case], num_labels={"spans": 2, "regression": 1}[case])
    mask = (torch.arange(8) < torch.tensor([[3], [5], [8], [4]])).long()
    ids = torch.randint(1, 59, (4, 8), generator=torch.Generator().manual_seed(0))
    padded = [
        [{"input_ids": ids * mask + other * (1 - mask), "attention_mask": mask}]
        for other in (0, 33)
    ]
    found = [solpath.search(model, data, SHORT, progress=False) for data in padded]
    torch.testing.assert_close(found[0].history, found[1].history, rtol=1e-5, atol=1e-7)
    small = solpath.extract(model, found[0].plan(sparsity=0.5))
    first, other = (solpath.evaluate(small, model, data).metrics for data in padded)
    assert first == pytest.approx(other, rel=1e-5)
    assert first["relative_error"] > 1e-4
    if case == "regression":
        with torch.no_grad():
            y, t = (one(**padded[0][0]).logits[mask == 1].double() for one in (small, model))
        expected = (y - t).square().sum() / (t - t.mean(0)).square().sum()
        assert first["relative_error"] == pytest.approx(float(expected), rel=1e-5)


def test_a_regression_is_relative_to_its_spread():
    model = MODELS["regression bert"]()
    data = batches(model, 6)
    targets = torch.cat([run(model, b, labels=False).logits for b in data]).double()
    mean = targets.mean()
    constant = [torch.full((4, 1), float(mean)) for _ in data]
    found = solpath.evaluate(model, constant, data).metrics["relative_error"]
    expected = (targets - mean).square().mean() / mean.square()
    assert found == pytest.approx(float(expected), rel=1e-4)
    errors = solpath.evaluate(model, [t + 1 for t in targets.float().split(4)], data).metrics
    spread = (targets - targets.mean()).square().mean()
    assert errors["relative_error"] == pytest.approx(float(1 / spread), rel=1e-4)


def test_more_than_one_head_wants_a_loss():
    model = head("BertForPreTraining")
    data = batches(model, 8)
    with pytest.raises(BatchError, match="prediction_logits among them; pass your own loss"):
        solpath.search(model, data, SHORT, progress=False)

    def loss(outputs, batch):
        return outputs.seq_relationship_logits.square().mean()

    path = solpath.search(model, data, SHORT, loss=loss, progress=False)
    small = solpath.extract(model, path.plan(sparsity=0.3))
    found = solpath.evaluate(small, model, data, loss=loss).metrics
    assert set(found) == {"loss", "reference_loss"}
    tuned = solpath.tune(
        small, model, data, TuneConfig(steps=20, learning_rate=1e-2, evaluate_every=5),
        heldout=data, loss=loss, progress=False,
    )  # fmt: skip
    assert solpath.evaluate(tuned, model, data, loss=loss).metrics["loss"] < found["loss"]
    refitted = solpath.compensate(small, model, data, loss=loss, progress=False)
    better = solpath.evaluate(refitted, model, data, loss=loss).metrics["loss"]
    assert better <= found["loss"] * 1.001
    assert solpath.measure({"dense": model, "small": small}, data[0], repeats=1)


def test_a_loss_is_part_of_a_tuning(tmp_path):
    model = MODELS["spans"]()
    data = batches(model, 8)
    small = solpath.extract(model, solpath.baselines.random(model, data).plan(sparsity=0.3))
    options = {"heldout": data, "checkpoint": tmp_path, "progress": False}
    config = TuneConfig(steps=2)
    solpath.tune(small, model, data, config, loss=qa_loss, **options)
    with pytest.raises(solpath.errors.FingerprintError, match="differs in loss"):
        solpath.tune(small, model, data, config, **options)
