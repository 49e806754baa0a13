"""Principal axes: the dense model stays the same function, and one search is cut along them."""

import pytest
import torch

import solpath
from conftest import COMMON, batches, build, inputs
from solpath.errors import FingerprintError
from solpath.model.basis import moment_hooks, obstacle, principal_axes, principal_basis, rotated
from solpath.model.discovery import find_pairs
from solpath.planning.path import SolutionPath
from solpath.running.forward import forward, run
from solpath.searching import search as searching

CONFIG = solpath.SearchConfig(steps=6, scale_batches=2, basis="principal")


def basis_of(model):
    pairs = [pair for pair in find_pairs(model) if obstacle(model, pair) is None]
    with torch.no_grad(), moment_hooks(model, pairs, None) as moments:
        run(model, inputs(model), labels=False)
    return principal_basis(model, pairs, moments)


def test_the_dense_model_is_the_same_function(common_model):
    model = common_model
    before = dict(model.named_parameters())
    pairs = find_pairs(model)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = model.to(dtype)
        basis = basis_of(model)
        assert basis
        with torch.no_grad():
            dense = forward(model, inputs(model))
            with rotated(model, pairs, basis):
                same = forward(model, inputs(model))
                for name in basis:
                    side = next(pair for pair in pairs if pair.name == name).left[0]
                    layer = model.get_submodule(side.module)
                    assert all(p is not before.get(f"{side.module}.{n}")
                               for n, p in layer.named_parameters())  # fmt: skip
        assert (same - dense).abs().max() <= bound * dense.abs().max()
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("label", "expected"),
    [("bert", None), ("llama", "a rotary embedding"), ("qwen3", "a rotary embedding")],
)
def test_what_stands_in_the_way_is_named(label, expected):
    model = build(label)
    found = {pair.kind: obstacle(model, pair) for pair in find_pairs(model)}
    assert found == {"qk": expected, "vo": None, "mlp": "an activation"}


@pytest.mark.parametrize("label", ["bert", "gpt2", "t5", "whisper", "swin"])
def test_both_sides_have_the_same_diagonal_moments(label):
    """The definition, measured on the turned model: T one Tᵀ = T⁻ᵀ other T⁻¹ = diag(s)."""
    model = build(label).double()
    pairs = [pair for pair in find_pairs(model) if pair.kind == "qk"]
    basis = basis_of(model)
    with (
        torch.no_grad(),
        rotated(model, pairs, {pair.name: basis[pair.name] for pair in pairs}),
        moment_hooks(model, pairs, None) as moments,
    ):
        run(model, inputs(model), labels=False)
    for query, key in moments.values():
        spread = torch.diagonal(query, dim1=-2, dim2=-1)
        assert (query - torch.diag_embed(spread)).abs().max() <= 1e-6 * spread.max()
        assert (query - key).abs().max() <= 1e-6 * spread.max()
        assert (spread.diff(dim=-1) <= 1e-9 * spread.max()).all()


def test_the_first_axes_are_the_best_approximation():
    """No other r-dimensional product has a smaller mean square error (Eckart-Young)."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    turn = principal_axes(x.T @ x, y.T @ y)
    a, b = x @ turn.T, y @ torch.linalg.inv(turn)
    best = torch.linalg.svdvals(x @ y.T)
    for r in range(6):
        error = (x @ y.T - a[:, :r] @ b[:, :r].T).square().sum()
        torch.testing.assert_close(error, best[r:6].square().sum(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("label", COMMON)
def test_masked_equals_extracted_along_the_axes(label, tmp_path):
    model = build(label)
    path = solpath.search(model, batches(model), CONFIG, progress=False)
    path.save(tmp_path / "path")
    path = SolutionPath.load(tmp_path / "path")
    for sparsity in (0.0, 0.3, 0.8):
        plan = path.plan(sparsity=sparsity)
        small = solpath.extract(model, plan)
        with torch.no_grad():
            with solpath.masked(model, plan):
                masked = forward(model, inputs(model))
            cut = forward(small, inputs(model))
            dense = forward(model, inputs(model))
        assert (masked - cut).abs().max() <= 1e-5 * masked.abs().max()
        assert (sparsity > 0) or torch.equal(cut, dense)


def test_a_saved_member_loads_but_its_plan_cannot_be_applied_again(bert, tmp_path):
    path = solpath.search(bert, batches(bert), CONFIG, progress=False)
    small = solpath.extract(bert, path.plan(sparsity=0.5))
    solpath.save(small, tmp_path / "small")
    loaded = solpath.load(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(forward(loaded, inputs(bert)), forward(small, inputs(bert)))
    with pytest.raises(FingerprintError, match="plan again from the path"):
        solpath.extract(bert, loaded.solpath_plan)


def test_a_resumed_search_has_the_same_axes(bert, tmp_path):
    whole = solpath.search(bert, batches(bert), CONFIG, progress=False)

    state = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("solpath.searching.search._record", _interrupted_after(3))
        with pytest.raises(KeyboardInterrupt):
            solpath.search(bert, batches(bert), CONFIG, checkpoint=state, progress=False)
    again = solpath.search(bert, batches(bert), CONFIG, checkpoint=state, progress=False)
    assert torch.equal(again.order(), whole.order())
    assert all(torch.equal(again.basis[name], whole.basis[name]) for name in whole.basis)


def _interrupted_after(count):
    calls, _record = [], searching._record

    def record(*args):
        calls.append(args)
        if len(calls) > count:
            raise KeyboardInterrupt
        return _record(*args)

    return record
