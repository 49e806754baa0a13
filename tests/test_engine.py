"""A search in bounded memory: no whole logits, blocks computed again, samples in turn."""

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

import solpath
from conftest import batches, build
from solpath import SearchConfig, baselines
from solpath.data.source import slice_samples
from solpath.divergence import divergence
from solpath.errors import UnsupportedModelError
from solpath.objective import Objective
from solpath.pair import flatten
from solpath.running import memory
from solpath.running.forward import forward, output_mask, run
from solpath.running.head import (
    HeadTarget,
    blocks_of,
    head_divergence,
    head_target,
    mean_of_drawn,
    separable_head,
)
from solpath.running.memory import peak_memory
from solpath.searching import probe as probing
from solpath.searching import redundancy
from solpath.searching.engine import open_engine
from solpath.searching.equilibrium import EquilibriumSearch
from solpath.searching.estimate import Estimate, duration, size

SHORT = SearchConfig(steps=4, scale_batches=2)


def same(a, b) -> bool:
    return (
        torch.equal(flatten(a.pairs, a.score), flatten(b.pairs, b.score))
        and torch.equal(a.history, b.history)
        and torch.equal(a.seen, b.seen)
    )


# The output embedding


def layer(features: int = 24, classes: int = 9000, bias: bool = True) -> torch.nn.Linear:
    """An embedding of three blocks, the last one smaller."""
    torch.manual_seed(0)
    return torch.nn.Linear(features, classes, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-5), (torch.float64, 1e-12)])
def test_blocks_give_the_divergence_and_the_gradient_of_whole_logits(bias, dtype, bound):
    head = layer(bias=bias).to(dtype)
    dense = 5 * torch.randn(2, 7, 24, dtype=dtype)
    states = (dense + torch.randn_like(dense)).requires_grad_()
    target = head_target(head, dense)
    tokens = head_divergence(head, states, target)
    goal, output = (head(s).log_softmax(-1) for s in (dense, states))
    expected = (goal.exp() * (goal - output)).sum(-1)
    assert tokens.dtype == dtype
    torch.testing.assert_close(tokens, expected, rtol=bound, atol=bound)
    weights = torch.rand(2, 7, dtype=dtype)
    found, wanted = (
        torch.autograd.grad((weights * value).sum(), states)[0] for value in (tokens, expected)
    )
    assert (found - wanted).norm() <= bound * wanted.norm()


def test_the_dense_model_is_no_distance_from_itself():
    head, dense = layer(), torch.randn(2, 3, 24)
    states = dense.clone().requires_grad_()
    tokens = head_divergence(head, states, head_target(head, dense))
    assert not tokens.any()
    assert not torch.autograd.grad(tokens.sum(), states)[0].any()


def test_many_tokens_are_taken_in_turns():
    head = layer(8, 300)
    dense, states = torch.randn(1, 4500, 8), torch.randn(1, 4500, 8)
    tokens = head_divergence(head, states, head_target(head, dense))
    goal, output = (head(s).log_softmax(-1) for s in (dense, states))
    expected = (goal.exp() * (goal - output)).sum(-1)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_tokens_are_drawn_from_their_probabilities():
    head = layer(6)
    state = 8 * torch.randn(1, 1, 6)
    n = 20_000
    uniforms = torch.rand(n, 1, 1, blocks_of(head))
    drawn = mean_of_drawn(head, state.expand(n, 1, 6), uniforms)[:, 0]
    p = head(state)[0, 0].double().softmax(-1)
    rows = head.weight.double()
    mean = p @ rows
    covariance = rows.T @ (p[:, None] * rows) - torch.outer(mean, mean)
    drawn = drawn.double() - mean
    assert drawn.mean(0).norm() <= 0.03 * covariance.trace().sqrt()
    assert (drawn.T @ drawn / n - covariance).norm() <= 0.03 * covariance.norm()


HEADS = ("llama", "qwen3", "gemma3_text", "t5", "opt", "whisper")
WHOLE = {"gemma2": {}, "cohere": {"logit_scale": 0.5}, "bert": {}, "vit": {}}


@pytest.mark.parametrize("label", WHOLE)
def test_logits_that_are_more_than_a_layer_stay_whole(label):
    model = build(label, **WHOLE[label])
    sample = slice_samples(batches(model)[0], 0, 1)
    assert separable_head(model, sample, forward(model, sample)) is None


@pytest.mark.parametrize("label", HEADS)
def test_a_model_is_compared_without_its_logits(label):
    model = build(label)
    [batch, other] = batches(model, 2)
    compared = Objective(model, lambda: batch)
    target = compared.target(other)
    assert isinstance(target, HeadTarget)
    path = baselines.magnitude(model, [batch])
    with torch.no_grad():
        dense = run(model, other, labels=False).logits
        with solpath.masked(model, path.plan(sparsity=0.5)):
            states = compared.run(model, other)
            logits = run(model, other, labels=False).logits
    found = compared.divergence(target, states, other)
    mask = output_mask(other, logits)
    torch.testing.assert_close(
        found, divergence(logits, dense, mask, kind="classes"), rtol=1e-3, atol=1e-6
    )


def test_whole_logits_are_never_made():
    model = build("llama", vocab_size=30_000)
    data = batches(model, 3, samples=4)
    tokens = data[0]["input_ids"].numel()
    config = SearchConfig(steps=2, scale_batches=1)
    with open_engine(model, data, loss=None, seed=0) as engine:
        mask = torch.ones(engine.units)
        engine.gradients(0, mask, binary=True)  # the first sample is looked at whole
        peak, _ = peak_memory(lambda: (engine.gradients(1, mask, binary=True), engine.curvature(1)))
    assert peak < 4 * tokens * 30_000
    solpath.search(model, data, config, progress=False)


def test_a_member_with_another_embedding_is_compared_whole():
    model = build("llama")
    data = batches(model, 4)
    small = solpath.extract(model, baselines.magnitude(model, data).plan(sparsity=0.5))
    assert isinstance(
        Objective(model, lambda: data[0], smaller=[small]).target(data[0]), HeadTarget
    )
    small.lm_head.weight.data += 0.1
    compared = Objective(model, lambda: data[0], smaller=[small])
    assert isinstance(compared.target(data[0]), torch.Tensor)


# Blocks and samples


@pytest.mark.parametrize("label", ["llama", "qwen3", "gemma3_text", "bert", "t5", "vit", "swin"])
def test_blocks_computed_again_give_the_same_bits(label):
    model = build(label)
    data = batches(model)
    plain, again = (
        solpath.search(model, data, SHORT, recompute=flag, progress=False) for flag in (False, True)
    )
    assert same(plain, again)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_blocks_computed_again_take_less_memory():
    model = build("llama", num_hidden_layers=8)
    [batch] = batches(model, 1, samples=8)
    peaks = {}
    for flag in (False, True):
        with open_engine(model, [batch], loss=None, seed=0, recompute=flag) as engine:
            one_pass = partial(engine.gradients, 0, torch.ones(engine.units), binary=False)
            one_pass()
            peaks[flag] = peak_memory(one_pass)[0]
    assert peaks[True] < 0.4 * peaks[False]


@pytest.mark.parametrize("given", [{}, {"loss": lambda o, b: o[0].square().mean()}])
@pytest.mark.parametrize("label", ["llama", "bert"])
def test_samples_in_turn_give_the_same_path(label, given):
    model = build(label)
    data = batches(model)
    whole = solpath.search(model, data, SHORT, progress=False, **given)
    turns = solpath.search(model, data, SHORT, micro_batch=3, progress=False, **given)
    for name, score in whole.score.items():
        torch.testing.assert_close(turns.score[name], score, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(turns.history, whole.history, rtol=1e-4, atol=1e-7)


def test_a_batch_that_does_not_fit_is_computed_again(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(probing, "LARGE", 0)
    for free, expected in ((10**12, False), (10**3, True)):
        monkeypatch.setattr("solpath.running.memory.free_memory", lambda device, free=free: free)
        with open_engine(model, batches(model), loss=None, seed=0) as engine:
            assert engine.recomputes is expected


# What it takes


@pytest.mark.parametrize(
    ("label", "changes", "given"),
    [
        ("llama", {"vocab_size": 5000}, {}),
        ("llama", {"num_hidden_layers": 6}, {"recompute": True}),
        ("bert", {"hidden_size": 72, "intermediate_size": 200}, {}),
        ("vit", {"num_hidden_layers": 4}, {}),
        ("t5", {}, {"micro_batch": 6}),
    ],
)
def test_the_estimate_of_memory_is_right(label, changes, given):
    model = build(label, **changes)
    data = batches(model, 4, samples=12)
    with open_engine(model, data, loss=None, seed=0, **given) as engine:
        estimate = engine.estimate(10, 10)
        mask = torch.ones(engine.units)
        engine.gradients(2, mask, binary=False)
        found, _ = peak_memory(lambda: engine.gradients(2, mask, binary=False))
    assert estimate.step == pytest.approx(found, rel=0.2)
    assert estimate.seconds > 0
    assert estimate.samples == 12


def test_the_estimate_is_one_line(capsys):
    model = build("llama")
    solpath.search(model, batches(model), SHORT, recompute=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("search: ")]
    assert line.startswith("search: 4 steps of 4 samples on cpu: about 1 s and ")
    assert line.endswith("activations are computed again, block by block, to save memory")
    short = Estimate(3600.0 * 2, 10**9, 3 * 10**9, 0, 0, 10**9, 8, "cuda:0", False)
    assert short.line(200) == (
        "200 steps of 8 samples on cuda:0: about 2.0 h and 4.0 GB of memory, 1.0 GB of it the "
        "weights; only 1.0 GB are free: give smaller batches, or micro_batch=1"
    )
    assert short._replace(moments=4 * 10**9).line(200).endswith("search with compensated=False")
    assert duration(600) == "10 min"
    assert size(0) == "0.1 MB"


@pytest.mark.parametrize("most", [2**30, 2**20])
def test_the_estimate_counts_the_moments_of_a_compensated_search(monkeypatch, most):
    monkeypatch.setattr(redundancy, "_IN_MEMORY", most)  # of the second, each pair is a part
    model = build("llama", intermediate_size=600)
    data = batches(model, 4, samples=2)
    with open_engine(model, data, loss=None, seed=0) as engine:
        without = engine.estimate(10, 10)
        estimate = engine.estimate(10, 10, (3, 3))
        inputs: list[Any] = []
        measured, _ = peak_memory(lambda: inputs.append(engine.measure_inputs(3)))
        mask = torch.ones(engine.units)
        looked, _ = peak_memory(lambda: engine.unexplained_variance(inputs[0], mask))
        kept = sum(value.nbytes for value in inputs[0].values()) if most == 2**30 else 0
    assert estimate.kept - without.kept == kept
    assert estimate.moments == pytest.approx(max(measured - kept, looked), rel=0.2)
    assert estimate.memory > without.memory
    assert without.moments == 0


def test_a_resumed_search_looks_no_more_than_it_has_to():
    method = EquilibriumSearch(SearchConfig(steps=96, scale_batches=16, compensated=True))
    assert method.looks(0) == (16, 5)  # at 0, 20, 40, 60 and 80 steps
    assert method.looks(45) == (16, 3)
    assert method.looks(96) == (0, 0)
    assert EquilibriumSearch(SearchConfig(steps=96)).looks(0) == (0, 0)


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cached"),
    [
        ("0::/a/b", "a", "memory.max", "memory.current", "inactive_file"),
        (
            "7:cpuset,memory:/a/b",
            "memory/a",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_a_limit_of_a_control_group_counts(
    tmp_path, monkeypatch, line, folder, limit, used, cached
):
    for group, most in ((folder, 10**6), (folder + "/b", 9223372036854771712)):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / limit).write_text(f"{most}\n")
        (tmp_path / group / used).write_text("400000\n")
        (tmp_path / group / "memory.stat").write_text(f"active_file 7\n{cached} 50000\n")
    (tmp_path / "own").write_text(f"12:cpu:/elsewhere\n{line}\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    assert memory.free_memory(torch.device("cpu")) == 650_000


@pytest.mark.parametrize(("limit", "used"), [("AS", "vms"), ("DATA", "data")])
def test_a_limit_of_the_process_counts(limit, used):
    code = (
        "import resource, psutil, torch\n"
        "from solpath.running.memory import free_memory\n"
        f"used = psutil.Process().memory_info().{used}\n"
        f"resource.setrlimit(resource.RLIMIT_{limit}, (used + 10**8, resource.RLIM_INFINITY))\n"
        "print(free_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= 10**8


# Half precision


def test_bfloat16_on_a_cpu_gives_the_order_of_float32():
    model = build("llama", hidden_size=64, intermediate_size=96)
    model = model.bfloat16().float()
    data = batches(model, 8, samples=8)
    orders = []
    for dtype in (torch.float32, torch.bfloat16):
        path = baselines.gauss_newton(model.to(dtype), data, scale_batches=8)
        orders.append(flatten(path.pairs, path.score).log())
    assert torch.corrcoef(torch.stack(orders))[0, 1] > 0.98
    found = solpath.search(model, data, SHORT, progress=False)
    assert found.history.isfinite().all()


def test_float16_is_refused():
    model = build("llama").half()
    with pytest.raises(UnsupportedModelError, match=r"float16.*dtype=torch\.bfloat16"):
        solpath.search(model, batches(model), SHORT, progress=False)
