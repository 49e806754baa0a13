"""Compensation: what it fits, that it never harms, what it leaves alone, and what it refuses."""

import copy
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertForMultipleChoice

import solpath
from conftest import COMMON, batches, build, inputs, randomise_
from plans import plan_of, random_plan
from solpath.errors import (
    BatchError,
    ConfigError,
    FileError,
    FingerprintError,
    UnsupportedModelError,
)
from solpath.model.discovery import find_pairs
from solpath.model.linear import linear_map
from solpath.refining.layerwise import lockstep
from solpath.refining.passes import input_groups
from solpath.refining.streams import residual_streams
from solpath.running.forward import run
from solpath.running.memory import peak_memory
from solpath.searching import redundancy
from solpath.searching.dynamics import unexplained_variance
from solpath.searching.redundancy import input_hooks, unexplained_variances

HALF = (0.5, 0.6, 0.4)


def compensated(small, dense, data=None, **options):
    data = batches(dense, 8) if data is None else data
    return solpath.compensate(small, dense, data, progress=False, **options)


def error(small: nn.Module, dense: nn.Module, data) -> float:
    metrics = solpath.evaluate(small, dense, data).metrics
    return metrics.get("kl", metrics["relative_error"])


def state(model: nn.Module):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    training = [m.training for m in model.modules()]
    return copy.deepcopy(model.state_dict()), hooks, training


def assert_same(one, two):
    assert one[1:] == two[1:]
    assert list(one[0]) == list(two[0])
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])


@pytest.mark.parametrize("label", COMMON)
def test_it_never_harms_and_leaves_both_models_alone(label):
    dense = build(label)
    small = solpath.extract(dense, random_plan(dense, HALF))
    before, data = (state(small), state(dense)), batches(dense, 8)
    result = compensated(small, dense, data)
    assert_same(state(small), before[0])
    assert_same(state(dense), before[1])
    assert type(result) is type(small)
    assert result.solpath_plan is small.solpath_plan
    shapes = [(name, value.shape) for name, value in result.state_dict().items()]
    assert shapes == [(name, value.shape) for name, value in small.state_dict().items()]
    held = data[3::4]
    assert error(result, dense, held) <= error(small, dense, held)


def test_neurons_that_others_can_replace_cost_nothing():
    dense = build("bert").double()
    for pair in find_pairs(dense):
        if pair.kind == "mlp":  # every neuron twice
            linear = dense.get_submodule(pair.left[0].module)
            half = pair.width // 2
            with torch.no_grad():
                linear.weight[half:], linear.bias[half:] = linear.weight[:half], linear.bias[:half]
    plan = plan_of(dense, [p.width for p in find_pairs(dense)])
    kept = {
        p.name: torch.arange(p.width // 2)[None] if p.kind == "mlp" else plan.kept[p.name]
        for p in plan.pairs
    }
    small = solpath.extract(dense, type(plan)(**{**vars(plan), "kept": kept}))
    data = batches(dense, 16, 8)
    held = [inputs(dense, seed=100)]
    result = compensated(small, dense, data, ridge=1e-9)
    assert error(small, dense, held) > 1e-2
    assert error(result, dense, held) < 1e-8


def test_the_first_layer_is_the_least_squares_fit():
    dense = build("bert").double()
    pairs = find_pairs(dense)
    widths = [p.width for p in pairs]
    [last] = [i for i, p in enumerate(pairs) if p.kind == "mlp"][-1:]
    widths[last] //= 3  # the last pair alone is cut: nothing before it errs
    small = solpath.extract(dense, plan_of(dense, widths))
    data = batches(dense, 8, 16)
    result = compensated(small, dense, data, ridge=1e-9)

    seen: dict[str, list[torch.Tensor]] = {"dense": [], "small": [], "sum": []}
    path = pairs[last].right.module
    norm = dense.get_submodule(path.removesuffix(".dense")).LayerNorm
    keep = [batch["attention_mask"].bool() for batch in data]

    def note(name, model):
        return model.get_submodule(path).register_forward_pre_hook(
            lambda module, args: seen[name].append(args[0])
        )

    handles = [note("dense", dense), note("small", small)]
    handles.append(norm.register_forward_pre_hook(lambda module, args: seen["sum"].append(args[0])))
    with torch.no_grad():
        for batch in data:
            dense(**batch)
            small(**batch)
    for handle in handles:
        handle.remove()
    fitted = [i for i in range(8) if i % 4 != 3]
    wanted, given, sums = (
        torch.cat([seen[name][i][keep[i]] for i in fitted]) for name in ("dense", "small", "sum")
    )
    layer, got = dense.get_submodule(path), result.get_submodule(path)
    root = sums.var(-1, keepdim=True).rsqrt().sqrt()
    one = torch.ones(len(given), 1).double()
    expected = torch.linalg.lstsq(torch.cat([given, one], 1) * root, layer(wanted) * root).solution
    best = torch.cat([given, one], 1) @ expected
    torch.testing.assert_close(got(given), best, rtol=0, atol=1e-3 * best.std().item())
    assert (small.get_submodule(path)(given) - best).abs().max() > 0.1 * best.std()


@pytest.mark.parametrize("label", ["bert", "dinov2", "llama", "vit", "gpt2", "t5"])
def test_every_layer_knows_the_stream_it_adds_to(label):
    model = build(label)
    layers = [pair.right.module for pair in find_pairs(model) if pair.kind != "qk"]
    with torch.no_grad():
        streams = residual_streams(model, layers, inputs(model, samples=1))
    assert set(streams) == set(layers)
    ones = [bool((stream.gain - 1).abs().max() < 1e-3) for stream in streams.values()]
    assert not any(ones) if label == "dinov2" else all(ones)  # layer scale


def test_the_same_inputs_give_the_same_bits():
    dense = build("llama")
    small = solpath.extract(dense, random_plan(dense, HALF))
    assert_same(state(compensated(small, dense)), state(compensated(small, dense)))


@pytest.mark.parametrize("label", ["bert", "llama", "gpt2", "t5"])
def test_several_sizes_are_refitted_as_each_alone(label):
    dense = build(label)
    whole = plan_of(dense, [p.width for p in find_pairs(dense)])
    plans = [random_plan(dense, HALF), whole, random_plan(dense, (0.2, 0.3, 0.1), seed=1)]
    small = [solpath.extract(dense, plan) for plan in plans]
    data = batches(dense, 8)
    runs = []
    handle = dense.register_forward_pre_hook(lambda *args: runs.append(1))
    together = compensated(small, dense, data)
    handle.remove()
    alone = [compensated(one, dense, data) for one in small]
    assert isinstance(together, list)
    assert compensated([], dense, data) == []
    # Not once for every size: all batches and the held-out ones, the looks for streams, groups and
    # memory, and two at what is compared.
    assert len(runs) <= len(data) * 5 / 4 + 5
    for one, other in zip(together, alone, strict=True):
        assert_same(state(one), state(other))


def test_a_saved_model_can_be_compensated_and_saved_again(tmp_path):
    dense = build("vit")
    small = solpath.extract(dense, random_plan(dense, HALF))
    solpath.save(small, tmp_path / "small")
    result = compensated(solpath.load(tmp_path / "small"), dense)
    assert_same(state(result), state(compensated(small, dense)))
    solpath.save(result, tmp_path / "better")
    assert_same(state(solpath.load(tmp_path / "better")), state(result))


def test_layers_without_units_still_get_their_mean():
    dense = build("bert").double()
    widths = [0 if p.kind != "qk" else p.width for p in find_pairs(dense)]
    small = solpath.extract(dense, plan_of(dense, widths))
    data = batches(dense, 8)
    assert error(compensated(small, dense, data), dense, data) < error(small, dense, data)


def test_bad_input():
    dense = build("bert")
    small = solpath.extract(dense, random_plan(dense, HALF))
    with pytest.raises(UnsupportedModelError, match="was not extracted"):
        compensated(dense, dense)
    for ridge in (0, "0.1", None, True, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"ridge must be a number between .* got {ridge!r}"):
            compensated(small, dense, ridge=ridge)
    with pytest.raises(BatchError, match="at least 4 batches, got 3"):
        compensated(small, dense, batches(dense, 3))
    with pytest.raises(BatchError, match="a single dict; wrap it in a list"):
        compensated(small, dense, batches(dense, 1)[0])
    small.to("meta")
    with pytest.raises(BatchError, match="input_ids is on cpu, the model on meta"):
        compensated(small, dense, batches(dense, 4))


@pytest.mark.parametrize(
    ("label", "changes", "words"),
    [
        ("vit", {}, "the class is ViTForImageClassification, not BertModel"),
        ("bert", {"num_hidden_layers": 1}, "the pairs differ, for example encoder.layer.1"),
        ("bert", {"num_hidden_layers": 3}, "the pairs differ, for example encoder.layer.2"),
        ("bert", {"hidden_size": 48}, "the width of encoder.layer.0.attention.* is 12, not 8"),
        ("bert", {"intermediate_size": 40}, "the width of encoder.layer.0.* is 40, not 48"),
    ],
)
def test_another_dense_model_is_refused(label, changes, words):
    dense, other = build("bert"), build(label, **changes)
    small = solpath.extract(dense, random_plan(dense, HALF))
    with pytest.raises(FingerprintError, match=f"small was not cut from this .*: {words}.*; pass"):
        compensated(small, other, batches(dense, 8))
    if label == "bert":
        also = solpath.extract(other, random_plan(other, HALF))
        with pytest.raises(FingerprintError, match=r"small\[1\] was not cut from this dense model"):
            compensated([small, also], dense)


def test_other_weights_of_the_dense_model_give_a_warning_unless_they_may_be_rounded():
    dense, data = build("bert"), batches(build("bert"), 8)
    small = solpath.extract(dense, random_plan(dense, HALF))
    with pytest.warns(UserWarning, match=r"small was cut from a dense model with other weights"):
        compensated(small, build("bert", seed=1), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compensated(small, copy.deepcopy(dense).bfloat16(), data)


def test_a_larger_member_may_be_imitated():
    dense = build("bert")
    small, large = (solpath.extract(dense, random_plan(dense, f)) for f in (HALF, (0.9, 0.8, 0.9)))
    data = batches(dense, 8)
    assert error(compensated(small, large, data), large, data) < error(small, large, data)


def test_members_of_paths_with_unlike_pairs_are_not_refitted_together():
    dense = build("bert")
    plan = random_plan(dense, HALF)
    less = replace(plan, pairs=plan.pairs[:-1], unreached=(plan.pairs[-1].name,))
    less = replace(less, kept={pair.name: plan.kept[pair.name] for pair in less.pairs})
    small = [solpath.extract(dense, one) for one in (plan, less)]
    name = plan.pairs[-1].name
    with pytest.raises(FingerprintError, match=rf"small\[1\] are of .* {name} in one of"):
        compensated(small, dense)


def test_what_the_kept_variables_cannot_predict():
    torch.manual_seed(0)
    values = torch.randn(50_000, 4).double()
    values[:, 3] = values[:, 0] + values[:, 1] + 0.5 * values[:, 3]
    correlation = torch.corrcoef(values.T)
    everything = unexplained_variance(correlation, torch.ones(4))
    # Residual of regressing each on the others.
    for i in range(4):
        others = values[:, [j for j in range(4) if j != i]]
        fit = torch.linalg.lstsq(others, values[:, i : i + 1]).solution
        left = (values[:, i : i + 1] - others @ fit).var() / values[:, i].var()
        assert abs(everything[i] - left) < 0.03
    # What is never kept predicts nothing.
    alone = unexplained_variance(correlation, torch.tensor([0.0, 0.0, 0.0, 1.0]).double())
    assert alone[3] > 0.99
    assert alone[2] > 0.99
    assert abs(alone[0] - (1 - correlation[0, 3] ** 2)) < 0.03


@pytest.mark.parametrize("label", [label for label in COMMON if label != "mixtral"])
def test_twins_are_told_apart_from_loners(label):
    """Of a neuron that is there twice, one can go; the search for compensation knows."""
    model = build(label)
    pair = next(pair for pair in find_pairs(model) if pair.kind == "mlp")
    last = pair.width - 1
    with torch.no_grad():
        for side in pair.left:
            linear = linear_map(model, side.module)
            for parameter in linear.parameters().values():
                rows = parameter if linear.outputs == 0 or parameter.dim() == 1 else parameter.T
                rows[side.offset + last] = rows[side.offset]
    data = batches(model, 8, 8)
    with torch.no_grad(), input_hooks(model, [pair], None) as inputs_seen:
        for batch in data:
            run(model, batch, labels=False)
    own = unexplained_variances(model, [pair], inputs_seen, torch.ones(pair.units))
    assert own[[0, last]].max() < 0.05
    assert ((own > 0) & (own <= 1)).all()
    alone = torch.ones(pair.units)
    alone[0] = 0
    assert unexplained_variances(model, [pair], inputs_seen, alone)[last] > own[last]


def test_a_mean_far_above_the_spread_hides_nothing(bert):
    """Variances are differences of large numbers, and must come out as from centred inputs."""
    pair = next(pair for pair in find_pairs(bert) if pair.kind == "mlp")
    first, second = (linear_map(bert, side.module) for side in pair.sides)
    with torch.no_grad():
        first.bias.add_(1000)
    seen = []
    hook = bert.get_submodule(pair.right.module).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, -2).double())
    )
    data = [batch["input_ids"] for batch in batches(bert, 8)]
    with torch.no_grad(), input_hooks(bert, [pair], None) as totals:
        for batch in data:
            run(bert, batch, labels=False)
    hook.remove()
    moments = totals[pair.name]
    means = moments[-1, :-1] / moments[-1, -1]
    found = moments[:-1, :-1] / moments[-1, -1] - torch.outer(means, means)
    expected = torch.cat(seen).T.cov(correction=0)
    assert second.in_features == len(expected)
    assert (found - expected).abs().max() < 1e-6 * expected.diagonal().max()
    own = unexplained_variances(
        bert, [pair], totals, torch.ones(pair.units)
    )  # and can be factorised
    assert own.max() < 0.01  # the bias after it makes up for the means


def test_moments_on_a_scratch_file_give_the_same_search(monkeypatch):
    """Beyond a bound the moments are measured in several passes, and wait on disk."""
    model = build("llama")
    data, files = batches(model, 5), []
    config = solpath.SearchConfig(steps=5, scale_batches=3, compensated=True)
    expected = solpath.search(model, data, config, progress=False)

    class Watched(redundancy.ScratchInputs):
        def __init__(self, size):
            super().__init__(size)
            files.append(self)
            self.size = size

        def close(self):
            self.written = self._file.seek(0, 2) if not self._file.closed else self.written
            super().close()

    monkeypatch.setattr(redundancy, "_IN_MEMORY", 20_000)
    monkeypatch.setattr("solpath.searching.statistics.ScratchInputs", Watched)
    found = solpath.search(model, data, config, progress=False)
    assert torch.equal(found.order(), expected.order())
    [scratch] = files
    assert scratch.written == scratch.size > 20_000
    assert scratch._file.closed


def test_a_scratch_file_without_room_is_refused(monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(FileError, match=r"take 2\.0 GB, .* has 0\.0 GB left; set TMPDIR"):
        redundancy.ScratchInputs(2 * 10**9)


@pytest.mark.parametrize("label", ["llama", "vit"])
def test_the_result_shares_no_memory_with_what_it_was_made_of(label):
    dense = build(label)
    small = solpath.extract(dense, random_plan(dense, HALF))
    for result in (compensated(small, dense), compensated(small, dense, loss=_worse())):
        tensors = (*result.parameters(), *result.buffers())
        others = {t.untyped_storage().data_ptr() for t in (*small.parameters(), *small.buffers())}
        assert not others & {t.untyped_storage().data_ptr() for t in tensors}
        assert [p.requires_grad for p in result.parameters()] == [
            p.requires_grad for p in small.parameters()
        ]


def _worse():
    """A loss that rises from call to call, so that no refit stays."""
    count = itertools.count()
    return lambda outputs, batch: torch.tensor(float(next(count)))


def test_streams_are_forgotten_and_the_head_runs_for_held_out_batches_alone():
    """A deeper model needs no more memory for a token."""

    def bytes_a_batch(depth: int) -> float:
        dense = build("llama", num_hidden_layers=depth)
        small, data = solpath.extract(dense, random_plan(dense, HALF)), batches(dense, 16)
        peaks = [
            peak_memory(lambda: compensated(small, dense, data[:8]))[0],
            peak_memory(lambda: compensated(small, dense, data))[0],
        ]
        return peaks[1] - peaks[0]

    assert bytes_a_batch(4) < 1.02 * bytes_a_batch(2)
    dense, runs = build("llama"), []
    small = solpath.extract(dense, random_plan(dense, HALF))
    dense.lm_head.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    compensated(small, dense)
    assert [rows for rows in runs if rows > 1] == [4, 4]  # one sample says what is compared


def test_what_changes_an_output_in_place_does_not_change_the_target():
    dense = build("falcon")  # adds the attention to the output of the MLP in place
    data = batches(dense, 2)
    names = [p.right.module for p in find_pairs(dense) if p.kind != "qk"]
    seen, found = {}, {}
    with torch.no_grad():
        hooks = [
            dense.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: seen.update({name: output.clone()})
            )
            for name in names
        ]
        run(dense, data[0], labels=False)
        for hook in hooks:
            hook.remove()
        for (name,), calls in lockstep(dense, data, [(n,) for n in names], {}, after=set(names)):
            found[name] = calls[0].value
    assert list(found) == names
    assert all(torch.equal(found[name], seen[name]) for name in names)


class Fork(nn.Module):
    """Two layers, which get one tensor where the inputs are positive."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.left(x) + self.right(x if x.min() > 0 else x.clone())


def test_layers_that_part_on_a_later_batch_are_refused():
    model, data = Fork(), [torch.ones(1, 2), -torch.ones(1, 2)]
    groups = input_groups(model, ["left", "right"], data[0])
    assert groups == [("left", "right")]
    with torch.no_grad(), pytest.raises(BatchError, match="left and right got the same input"):
        list(lockstep(model, data, groups, {}))


def test_layers_that_only_a_later_batch_runs_are_refused():
    """They would keep their weights, and nobody would notice."""
    dense = build("llava")
    small, data = solpath.extract(dense, random_plan(dense, HALF)), batches(dense, 8)
    text = {name: value for name, value in data[0].items() if name != "pixel_values"}
    text["input_ids"] = text["input_ids"].where(text["input_ids"] != 59, 7)
    with pytest.raises(BatchError, match=r"a later batch runs model\.vision_tower"):
        compensated(small, dense, [text, *data])
    compensated(small, dense, [text] * 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_stream_is_not_invented_where_rounding_hides_the_sum(dtype):
    """A norm after the layer makes its output small beside the stream, and no multiple of it."""
    model = build("gemma3_text")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "post_" in name:
                parameter.fill_(-0.99)
    layers = [pair.right.module for pair in find_pairs(model) if pair.kind != "qk"]
    with torch.no_grad():
        assert residual_streams(model.to(dtype), layers, inputs(model)) == {}


@pytest.mark.parametrize("label", ["llama", "qwen2", "bloom", "falcon", "dinov2", "t5", "bert"])
def test_a_stream_is_not_invented_where_all_tokens_are_alike(label):
    """Any two layers' outputs are multiples of each other there, channel by channel."""
    model = build(label)
    layers = [pair.right.module for pair in find_pairs(model) if pair.kind != "qk"]
    sample = {
        name: torch.full_like(value, 0 if value.is_floating_point() else 1 if "mask" in name else 7)
        for name, value in inputs(model, samples=8).items()
    }
    with torch.no_grad():
        streams = residual_streams(model, layers, sample)
        usual = residual_streams(model, layers, inputs(model, samples=8))
    assert all(usual[name].place == stream.place for name, stream in streams.items())
    small, data = solpath.extract(model, random_plan(model, HALF)), batches(model, 8)
    compensated(small, model, [sample, *data])


@pytest.mark.parametrize("label", ["llama", "qwen2", "opt"])
def test_streams_are_found_behind_padding(label):
    """The first tokens of the rows may all be padding, and texts may be longer than 32 tokens."""
    model = build(label, max_position_embeddings=64)
    layers = [pair.right.module for pair in find_pairs(model) if pair.kind != "qk"]
    lengths = torch.tensor([2, 3, 2, 4, 40])
    mask = (torch.arange(40) >= 40 - lengths[:, None]).long()
    ids = torch.randint(1, 57, (5, 40), generator=torch.Generator().manual_seed(0)) * mask
    with torch.no_grad():
        streams = residual_streams(model, layers, {"input_ids": ids, "attention_mask": mask})
    assert set(streams) == set(layers)
    assert all(torch.equal(one.gain, torch.ones_like(one.gain)) for one in streams.values())


@pytest.mark.parametrize("label", ["opt", "bert", "llama", "gpt2", "bloom"])
def test_what_padding_holds_does_not_count(label):
    dense = build(label).double()
    small, data, other = solpath.extract(dense, random_plan(dense, HALF)), batches(dense, 8), []
    for i, batch in enumerate(data):
        generator = torch.Generator().manual_seed(i)
        drawn = torch.randint(1, 57, batch["input_ids"].shape, generator=generator)
        real = batch["attention_mask"].bool()
        assert not real.all()
        other.append(batch | {"input_ids": torch.where(real, batch["input_ids"], drawn)})
    results = [compensated(small, dense, seen).state_dict() for seen in (data, other)]
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_padding_of_choices_does_not_count():
    """Masks are ``[samples, choices, tokens]``, and every choice is a row in the model."""
    dense = build("bert").double()
    dense = randomise_(BertForMultipleChoice(dense.config).eval()).double()
    results: list[dict[str, torch.Tensor]] = []
    for under in (0, 33):
        data = []
        for i in range(8):
            drawn = torch.Generator().manual_seed(i)
            ids = torch.randint(1, 57, (4, 2, 9), generator=drawn)
            mask = (torch.arange(9) < torch.randint(3, 6, (4, 2, 1), generator=drawn)).long()
            ids = ids * mask + under * (1 - mask)
            data.append({"input_ids": ids, "attention_mask": mask})
        if not under:
            plan = solpath.baselines.magnitude(dense, data).plan(sparsity=0.5)
            small = solpath.extract(dense, plan)
        results.append(compensated(small, dense, data).state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_dense_model_may_be_in_another_precision():
    dense = build("bert")
    small, data = solpath.extract(dense, random_plan(dense, HALF)), batches(dense, 8)
    found = compensated(small, copy.deepcopy(dense).double(), data)
    assert found.dtype == torch.float32
    expected = error(compensated(small, dense, data), dense, data)
    assert error(found, dense, data) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("label", ["bert", "llama", "dinov2"])
def test_half_precision_is_compensated_nearly_as_well(label):
    dense = build(label)
    plan, data = random_plan(dense, HALF), batches(dense, 16, 8)
    small = solpath.extract(dense, plan)
    half, half_data = copy.deepcopy(dense).bfloat16(), [_half(batch) for batch in data]
    result = compensated(copy.deepcopy(small).bfloat16(), half, half_data)
    layers = [pair.right.module for pair in find_pairs(dense) if pair.kind != "qk"]
    with torch.no_grad():
        streams = residual_streams(dense, layers, data[0])
        found = residual_streams(half, layers, half_data[0])
    assert {n: s.place for n, s in found.items()} == {n: s.place for n, s in streams.items()}
    before, after = error(small, dense, data), error(compensated(small, dense, data), dense, data)
    assert after < 0.7 * before
    assert error(result.float(), dense, data) < after + 0.1 * (before - after)


def _half(batch):
    return {n: v.bfloat16() if v.is_floating_point() else v for n, v in batch.items()}


def test_two_processes_compensate_as_one_does(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import batches, build
        from plans import random_plan
        import solpath
        from solpath.refining import compensation
        from solpath.running.processes import process
        compensation.fits = lambda size, device: process()[0] == 0  # the second lacks memory
        dense = build("bert").double()
        small = solpath.extract(dense, random_plan(dense, (0.5, 0.6, 0.4)))
        data = batches(dense, 9)
        better = solpath.compensate(small, dense, data, progress=False)
        config = solpath.SearchConfig(steps=5, scale_batches=2, compensated=True)
        path = solpath.search(dense, data, config, progress=False)
        solpath.save(better, sys.argv[1] + "/rank%d of %d" % process())
        if process()[0] == 0:
            path.save(sys.argv[1] + "/path")
        """)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, script, tmp_path], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, env=environment)
    one = solpath.load(tmp_path / "one/rank0 of 1").state_dict()
    for rank in (0, 1):
        two = solpath.load(tmp_path / f"rank{rank} of 2").state_dict()
        torch.testing.assert_close(two, one, rtol=1e-6, atol=1e-7)
    paths = [solpath.SolutionPath.load(tmp_path / name) for name in ("path", "one/path")]
    assert torch.equal(paths[0].order(), paths[1].order())
