"""What people give as batches: it works, or an error names what is wrong and what to give."""

import copy
import itertools
import re
import warnings

import datasets
import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast, T5Model

import solpath
from conftest import CASES, batches, build, inputs
from solpath.data.source import BatchSource
from solpath.errors import BatchError, ConfigError, NonFiniteLossError, UnsupportedModelError
from solpath.measuring.evaluation import reference_outputs
from solpath.running.forward import forward

QUICK = solpath.SearchConfig(steps=4, scale_batches=2)
TUNING = solpath.TuneConfig(steps=2, evaluate_every=2, learning_rate=1e-4)


def search(model, data, **options):
    return solpath.search(model, data, QUICK, progress=False, **options)


def same(one, other) -> bool:
    return all(torch.equal(one.score[name], other.score[name]) for name in one.score)


@pytest.fixture(scope="module")
def bert():
    return build("bert")


@pytest.fixture(scope="module")
def small(bert):
    return solpath.extract(bert, search(bert, batches(bert)).plan(sparsity=0.4))


def endless(data, most):
    """A generator that never ends, and fails the test if it is read too far."""
    for count, batch in enumerate(itertools.cycle(data)):
        assert count < most, "read further than any step needs"
        yield batch


def test_an_endless_iterator_gives_the_path_of_a_list(bert, small):
    data = batches(bert, 6)
    expected = search(bert, data)
    assert same(expected, search(bert, itertools.cycle(data)))
    assert same(expected, search(bert, endless(data, 7)))
    assert not same(expected, search(bert, data[:3]))
    assert same(search(bert, data[:3]), search(bert, iter(data[:3])))  # ends, and is repeated
    for name in ("magnitude", "gauss_newton"):
        rival = getattr(solpath.baselines, name)
        options = {} if name == "magnitude" else {"scale_batches": 3}
        assert same(rival(bert, data, **options), rival(bert, endless(data, 7), **options))
    tuned = [
        solpath.tune(small, bert, given, TUNING, heldout=data[-2:], progress=False)
        for given in (data, endless(data, 3))
    ]
    assert all(map(torch.equal, *(model.parameters() for model in tuned)))


def test_an_endless_iterator_loads_a_model_by_name(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    data = batches(bert, 6)
    assert same(search(bert, data), search(tmp_path, endless(data, 7)))


def test_what_needs_all_batches_refuses_what_may_never_end(bert, small):
    data = batches(bert, 4)
    for given in (itertools.cycle(data), (batch for batch in data), map(dict, data)):
        for call in (
            lambda given=given: solpath.evaluate(small, bert, given),
            lambda given=given: reference_outputs(bert, given),
            lambda given=given: solpath.compensate(small, bert, given, progress=False),
            lambda given=given: solpath.tune(small, bert, data, TUNING, heldout=given),
        ):
            with pytest.raises(BatchError, match=r"may never end.*itertools\.islice"):
                call()
    assert solpath.evaluate(small, bert, iter(data)).samples == 16


def test_an_iterator_is_read_no_further_than_asked():
    source = BatchSource(endless(torch.arange(9), 4), seed=0)
    assert [int(source[k]) for k in (0, 3, 1, 3, 0)] == [0, 3, 1, 3, 0]
    assert source.length is None
    source = BatchSource(iter(torch.arange(3)), seed=0)
    assert [int(source[k]) for k in (4, 0, 5)] == [1, 0, 2]
    assert source.length == 3


# Rows of padding, and values that are not finite


def padded(model, *rows: int, seed: int = 0):
    """A batch with further rows of padding alone, before these rows."""
    batch, found = inputs(model, seed=seed), {}
    for name, value in batch.items():
        parts = list(value)
        for row in rows:
            parts.insert(row, torch.zeros_like(parts[0]))
        found[name] = torch.stack(parts)
    return found


def test_rows_of_padding_alone_are_skipped_everywhere_and_counted(bert, small):
    whole, holed = batches(bert, 4), [padded(bert, 1, 3, seed=i) for i in range(4)]
    message = "skipped 8 rows of padding alone.*the first is row 1 of batch 0"
    for run in (
        lambda data: search(bert, data).score["encoder.layer.0.mlp"],
        lambda data: solpath.evaluate(small, bert, data).metrics,
        lambda data: list(solpath.compensate(small, bert, data, progress=False).parameters()),
    ):
        expected = run(whole)
        with pytest.warns(UserWarning, match=message) as seen:
            found = run(holed)
        assert len(seen) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.warns(UserWarning, match="skipped") as seen:
        solpath.tune(small, bert, holed, TUNING, heldout=holed[:1], progress=False)
    ends = sorted(str(one.message).partition("row ")[2] for one in seen)
    assert ends == ["1 of batch 0.", "1 of held-out batch 0."]
    with pytest.warns(UserWarning, match="skipped 2 rows"):
        assert solpath.measure({"dense": bert}, holed[0], repeats=1)["dense"].samples == 4
    made = Tokenizer(models.WordLevel({"-": 0, "?": 1, "cat": 2}, unk_token="?"))
    made.normalizer = normalizers.Replace("#", "")  # a text that is not blank, and has no token
    made = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="-")
    texts = solpath.text_batches(["cat", "#", "cat"], made, length=4, seed=None)
    with pytest.warns(UserWarning, match="skipped 1 row of padding alone.*row 1 of batch 0"):
        assert solpath.evaluate(small, bert, texts).samples == 2
    nothing = {name: torch.zeros_like(value) for name, value in whole[0].items()}
    with pytest.raises(BatchError, match="all 4 rows of batch 1 are padding alone"):
        search(bert, [whole[0], nothing])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(bert, whole)


def test_what_is_not_finite_is_named_by_batch_and_row(bert, small):
    """Rows are counted as the user gave them: row 3, although row 1 is left out."""
    embed = bert.embeddings.word_embeddings
    data = [
        {"inputs_embeds": embed(b["input_ids"]).detach(), "attention_mask": b["attention_mask"]}
        for b in (padded(bert, 1, seed=i) for i in range(4))
    ]
    data[3]["inputs_embeds"][3, 0, 5] = torch.nan
    heldout = batches(bert, 2)
    baseline = solpath.baselines.gauss_newton
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where = "row 3 of batch 3, on which the dense model itself is not finite"
        with pytest.raises(NonFiniteLossError, match=f"{where}, is nan at step 3 of 4"):
            search(bert, data)
        with pytest.raises(NonFiniteLossError, match=where):
            baseline(bert, data)
        config = solpath.SearchConfig(steps=4, scale_batches=4, basis="principal")
        with pytest.raises(NonFiniteLossError, match="on row 3 of batch 3 the dense model itself"):
            solpath.search(bert, data, config, progress=False)
        for loss in (None, lambda outputs, batch: outputs.last_hidden_state.sum()):
            with pytest.raises(NonFiniteLossError, match=r"(row 3 of )?batch 3"):
                solpath.compensate(small, bert, data, loss=loss, progress=False)
        with pytest.raises(BatchError, match="row 3 of batch 3: the output of the model has NaN"):
            solpath.evaluate(small, bert, data)
        config = solpath.TuneConfig(steps=4, learning_rate=1e-4)
        with pytest.raises(NonFiniteLossError, match="row 3 of batch 3 is nan at step 3"):
            solpath.tune(small, bert, data, config, heldout=heldout, progress=False)
        loss = {"loss": lambda outputs, batch: outputs.last_hidden_state.sum()}
        with pytest.raises(NonFiniteLossError, match="the loss of batch 3 is nan"):
            solpath.evaluate(small, bert, data, **loss)
        with pytest.raises(NonFiniteLossError, match="the loss of batch 3 is nan at step 3"):
            search(bert, data, **loss)


# Decoder inputs

SEQ2SEQ = [
    label for label in CASES
    if CASES[label][0].endswith(("ForConditionalGeneration", "MTModel"))
    and not label.startswith(("gemma3", "llava", "qwen"))
]  # fmt: skip


@pytest.mark.parametrize("label", SEQ2SEQ)
def test_labels_become_decoder_inputs_as_in_the_model_itself(label):
    model = build(label)
    batch = inputs(model)
    given = batch.pop("decoder_input_ids")
    labels = given.clone()
    labels[:, -2:] = -100
    labels[0, :2] = -100  # a prompt that is not predicted is still seen
    batch["labels"] = labels
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
    handle.remove()
    [[output], [reference]] = (reference_outputs(model, [b]) for b in (batch, batch))
    torch.testing.assert_close(output[:, :-2], expected[:, :-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, reference)
    ready = batch | {"decoder_input_ids": seen[0]}
    ready["decoder_attention_mask"] = (torch.arange(9) < 7).long().expand(4, -1)
    del ready["labels"]
    if label in ("t5", "whisper"):  # and padding does not count, as from DataCollatorForSeq2Seq
        collated = batch | {"decoder_input_ids": seen[0]}
        found = [search(model, [one] * 2) for one in (batch, ready, collated)]
        assert same(found[0], found[1])
        assert same(found[0], found[2])
    del batch["labels"]
    if label in ("bart", "mbart", "plbart"):  # these take the inputs of the encoder themselves
        forward(model, batch)
        return
    with pytest.raises(BatchError, match=r"decoder of .* gets no inputs; add labels, which"):
        solpath.measure({"dense": model}, batch, repeats=1)


def test_a_decoder_without_a_head_wants_its_inputs():
    t5 = build("t5")
    base = T5Model(t5.config).eval()
    batch = inputs(t5)
    batch["labels"] = batch.pop("decoder_input_ids")
    with pytest.raises(
        BatchError, match="decoder of T5Model gets no inputs; add decoder_input_ids"
    ):
        search(base, [batch])


def test_rows_whose_labels_all_do_not_count_are_skipped():
    t5 = build("t5")
    batch = inputs(t5)
    batch["labels"] = batch.pop("decoder_input_ids")
    batch["labels"][2] = -100
    with pytest.warns(UserWarning, match=r"labels are all -100.*row 2 of batch 0"):
        assert solpath.evaluate(t5, t5, [batch]).samples == 3


# Other things than batches

TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])
ROWS = {"text": ["a cat", "a dog"], "label": [0, 1]}
DATA = datasets.Dataset.from_dict(ROWS)
TOKENISED = datasets.Dataset.from_dict({"input_ids": TOKENS.tolist()})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (datasets.DatasetDict(train=DATA, test=DATA), r"splits \(train, test\).*data\['train'\]"),
        (DATA, r"is a Dataset; .*single samples.*text_batches\(data, tokenizer\)"),
        (DATA.to_iterable_dataset(), "is a IterableDataset; .*text_batches"),
        (DATA.rename_column("text", "line"), "text_column='line'"),
        (TOKENISED, r"list\(data.with_format\('torch'\).iter\(batch_size=16\)\)"),
        (pandas.DataFrame(ROWS), "is a DataFrame; .*text_batches"),
        (pandas.Series(ROWS["text"]), "is a Series; .*text_batches"),
        ("texts.txt", r"single str; .*text_batches\(file, tokenizer\)"),
        (TOKENS, "single Tensor; wrap it in a list"),
        ({"input_ids": TOKENS}, "single dict; wrap it in a list"),
        (None, "got a NoneType"),
        (7, "got a int"),
        ([], "empty|got 0"),
        (["a cat"], "batch 0 is a str.*text_batches"),
        ([None], "batch 0 is a NoneType"),
        ([[1, 2], [3, 4]], "batch 0 is a list"),
        (DataLoader(TensorDataset(TOKENS, TOKENS)), "batch 0 is a list.*for images, _ in loader"),
        ([{"input_ids": TOKENS.tolist()}], "input_ids of batch 0 is a list.*return_tensors='pt'"),
        (DataLoader(TOKENISED), "input_ids of batch 0 is a list.*with_format"),
        ([{"input_ids": TOKENS.numpy()}], "input_ids of batch 0 is a ndarray"),
        ([{"input_ids": TOKENS}, {"input_ids": TOKENS.float()}], r"of batch 1 is torch.float32"),
        ([TOKENS.float()], r"input_ids of batch 0 is torch.float32.*\.long\(\)"),
        ([{"input_ids": TOKENS.byte()}], r"is torch.uint8, and numbers of tokens"),
        ([{"input_ids": TOKENS[0]}], r"has the shape \[3\].*unsqueeze"),
        ([{"input_ids": TOKENS, "token_type_ids": TOKENS * 0.0}], "token_type_ids of batch 0"),
        ([{"input_ids": TOKENS.to("meta")}], "input_ids is on meta, the model on cpu"),
        ([{"input_ids": TOKENS[:0]}], "no samples"),
        ([{}], "a batch is a dict of tensors"),
    ],
)
def test_what_is_no_batch_is_named_with_the_way_out(bert, small, data, words):
    calls = {
        "search": lambda: search(bert, data),
        "random": lambda: solpath.baselines.random(bert, data),
        "evaluate": lambda: solpath.evaluate(small, bert, data),
        "compensate": lambda: solpath.compensate(small, bert, data, progress=False),
        "tune": lambda: solpath.tune(small, bert, data, TUNING, heldout=[TOKENS], progress=False),
    }
    stream = isinstance(data, DataLoader | datasets.IterableDataset)
    for name, call in calls.items():
        with pytest.raises(BatchError) as caught:
            call()
        found = str(caught.value)

        assert re.search(words, found) or (stream and "may never end" in found), (name, found)


def test_pixels_are_floats():
    vit = build("vit")
    pixels = inputs(vit)["pixel_values"]
    for batch in ({"pixel_values": pixels.byte()}, pixels.byte()):
        with pytest.raises(BatchError, match=r"pixel_values of batch 0 is torch.uint8.*processor"):
            search(vit, [batch])


def test_a_tokenised_data_set_works_as_the_message_says(bert):
    data = list(TOKENISED.with_format("torch").iter(batch_size=16))
    assert same(search(bert, data), search(bert, [TOKENS]))


def test_a_tokenised_numpy_scalar_is_no_tensor(bert):
    with pytest.raises(BatchError, match="ndarray"):
        search(bert, [{"input_ids": np.ones((2, 3))}])


def test_compensate_takes_batches_of_one_token(bert, small):
    data = [{"input_ids": torch.tensor([[i + 3]])} for i in range(8)]
    before = solpath.evaluate(small, bert, data[3::4]).metrics["relative_error"]
    refitted = solpath.compensate(small, bert, data, progress=False)
    assert solpath.evaluate(refitted, bert, data[3::4]).metrics["relative_error"] <= before


LOSSES = {
    r"returned a tensor of shape \[4\], not one number.*\.mean\(\)": lambda o, b: o[0].mean((1, 2)),
    "returned None, a NoneType; let it return a scalar tensor": lambda o, b: None,
    "returned 'low', a str": lambda o, b: "low",
    r"must be a function loss\(outputs, batch\), got 'mse'": "mse",
    "returned a tensor without a gradient.*without detach": lambda o, b: (
        o[0].detach().square().mean()
    ),
    r"returned \d.*, a float; let it return a scalar": lambda o, b: o[0].square().mean().item(),
}


@pytest.mark.parametrize("words", LOSSES)
def test_a_loss_that_is_no_scalar_with_a_gradient_is_named_with_the_way_out(bert, small, words):
    data, loss = batches(bert, 12, 4), LOSSES[words]
    config = solpath.TuneConfig(steps=2, evaluate_every=2, learning_rate=1e-4)
    calls = {
        "search": lambda: search(bert, data, loss=loss),
        "taylor": lambda: solpath.baselines.taylor(bert, data, loss=loss),
        "tune": lambda: solpath.tune(small, bert, data, config, loss=loss, progress=False),
        "compensate": lambda: solpath.compensate(small, bert, data, loss=loss, progress=False),
        "evaluate": lambda: solpath.evaluate(small, bert, data, loss=loss),
    }
    for name, call in calls.items():
        if name in ("compensate", "evaluate") and ("a float" in words or "detach" in words):
            call()  # takes no gradient
        else:
            with pytest.raises(ConfigError, match=f"loss {words}"):
                call()


def test_a_loss_of_one_sample_may_keep_its_dimension(bert, small):
    data = batches(bert, 12, 1)
    tuned = solpath.tune(
        small, bert, data, TUNING, loss=lambda o, b: o[0].square().mean((1, 2)), progress=False
    )
    assert tuned.solpath_plan is small.solpath_plan


def test_compensate_names_a_bad_loss_before_it_fits_anything(bert, small, monkeypatch):
    monkeypatch.setattr("solpath.refining.compensation.refit_", pytest.fail)
    with pytest.raises(ConfigError, match="returned None"):
        solpath.compensate(small, bert, batches(bert, 8), loss=lambda o, b: None, progress=False)


def test_settings_of_another_kind_are_refused(bert, small):
    data = batches(bert, 12)
    for config in (QUICK, {"steps": 2}, {}):
        with pytest.raises(ConfigError, match=r"must be a TuneConfig, got a (Sea|dict)"):
            solpath.tune(small, bert, data, config, progress=False)
    for config in (TUNING, {"steps": 2}, {}):
        with pytest.raises(ConfigError, match="must be a SearchConfig or InclusionConfig, got a"):
            solpath.search(bert, data, config, progress=False)


def test_what_is_empty_or_no_batches_is_called_by_the_name_of_its_argument(bert, small, tmp_path):
    data = batches(bert, 8)
    path = search(bert, batches(bert, 2, 5))

    def family(heldout, **options):
        return solpath.make_family(bert, path, heldout, tmp_path / "out", progress=False, **options)

    calls = {
        "heldout": [
            lambda given: solpath.tune(small, bert, data, TUNING, heldout=given, progress=False),
            family,
        ],
        "compensate": [
            lambda given: solpath.choose(bert, path, data, 0.9, compensate=given, progress=False)
        ],
        "compensate_on": [lambda given: family(data, compensate_on=given)],
        "batches": [
            lambda given: solpath.evaluate(small, bert, given),
            lambda given: solpath.compensate(small, bert, given, progress=False),
            lambda given: solpath.tune(small, bert, given, TUNING, heldout=data, progress=False),
            lambda given: solpath.choose(bert, path, given, 0.9, progress=False),
            lambda given: search(bert, given),
            lambda given: reference_outputs(bert, given),
        ],
    }
    for name, ones in calls.items():
        for call in ones:
            for given, words in (([], "is empty; give at least one"), (data[0], "a single dict")):
                with pytest.raises(BatchError, match=f"^{name} .*{words}"):
                    call(given)


def test_a_model_with_adapters_gets_no_others(bert, small):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    adapted = peft.get_peft_model(copy.deepcopy(small), config)
    options = {"steps": 1, "evaluate_every": 1, "learning_rate": 1e-4}
    data = batches(bert, 12)
    solpath.tune(adapted, bert, data, solpath.TuneConfig(**options), progress=False)
    config = solpath.TuneConfig(**options, lora_rank=2)
    with pytest.raises(UnsupportedModelError, match=r"adapters of peft.*merge_and_unload\(\)"):
        solpath.tune(adapted, bert, data, config, progress=False)


def test_no_function_that_reads_a_loader_changes_the_random_state(bert, small, tmp_path):
    rows = [{k: v[i] for k, v in b.items()} for b in batches(bert, 10, 8) for i in range(8)]
    path = search(bert, batches(bert, 2, 5))
    bert.save_pretrained(tmp_path / "bert")
    tuning = {"heldout": DataLoader(rows, 8), "progress": False}
    calls = {
        "search": lambda data: search(bert, data),
        "search by name": lambda data: search(tmp_path / "bert", data),
        "evaluate": lambda data: solpath.evaluate(small, bert, data),
        "reference_outputs": lambda data: reference_outputs(bert, data),
        "compensate": lambda data: solpath.compensate(small, bert, data, progress=False),
        "tune": lambda data: solpath.tune(small, bert, data, TUNING, **tuning),
        "choose": lambda data: solpath.choose(bert, path, data, 0.9, sizes=[0.1], progress=False),
        "make_family": lambda data: solpath.make_family(
            bert, path, data, tmp_path / "family", sizes=[0.1], repeats=1, progress=False
        ),
    }
    for name, call in calls.items():
        before = torch.get_rng_state()
        call(DataLoader(rows, 8, shuffle=True))
        assert torch.equal(before, torch.get_rng_state()), name


@pytest.mark.parametrize("label", ["bert", "llama", "vit", "t5"])
def test_tuples_are_compared_by_a_loss_alone(label):
    model = build(label)
    data, config = batches(model, 8), solpath.TuneConfig(steps=1, evaluate_every=1)
    small = solpath.extract(model, solpath.baselines.magnitude(model, data[:1]).plan(sparsity=0.4))
    for one in (model, small):
        one.config.return_dict = False
    calls = [
        lambda: search(model, data),
        lambda: solpath.tune(small, model, data, config, heldout=data, progress=False),
        lambda: solpath.compensate(small, model, data, progress=False),
        lambda: solpath.evaluate(small, model, data),
        lambda: reference_outputs(model, data),
    ]
    for call in calls:
        with pytest.raises((BatchError, UnsupportedModelError), match="return_dict = True"):
            call()
    if label in ("bert", "t5"):
        solpath.evaluate(small, model, data, loss=lambda o, b: o[0].square().mean())
