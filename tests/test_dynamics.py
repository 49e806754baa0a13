"""The mathematics of the search against closed forms and brute force. Shapes are checked too."""

import itertools

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solpath.divergence import curvature_sketch, divergence
from solpath.planning import removal
from solpath.planning.removal import groups_by_rank, removal_order
from solpath.searching import dynamics

POSITIVE = st.floats(1e-6, 1e6)


def vector(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(
    units=st.lists(
        st.tuples(st.just(0.0) | POSITIVE, st.floats(0.1, 100)), min_size=1, max_size=30
    ),
    share=st.floats(0.01, 0.99),
)
def test_pull_is_the_root(units, share):
    drive, cost = vector([u[0] for u in units]), vector([u[1] for u in units])
    p = dynamics.pull(drive, cost, share)
    assert p > 0
    kept = float((cost * (drive / p).clamp(max=1)).sum() / cost.sum())
    positive = float(cost[drive > 0].sum() / cost.sum())
    assert kept == pytest.approx(min(share, positive), rel=1e-6)


def test_shapes_are_checked_here():
    """The guard itself works: a matrix where a vector is due is refused."""
    with pytest.raises(jaxtyping.TypeCheckError):
        dynamics.pull(torch.ones(2, 2), torch.ones(2, 2), 0.5)


def test_shrink_keeps_signal_and_drops_noise():
    scale, pair = vector([1.0, 2.0, 4.0, 1.0]), torch.tensor([0, 0, 0, 1])
    marginal = vector([1.0, 2.0, 7.0, 5.0])
    exact = dynamics.shrink(marginal, torch.zeros(4, dtype=torch.float64), scale, pair, 3.0)
    assert torch.equal(exact, marginal)
    noisy = dynamics.shrink(marginal, torch.full((4,), 1e12).double(), scale, pair, 3.0)
    torch.testing.assert_close(noisy, vector([10 / 7, 20 / 7, 40 / 7, 5.0]))
    assert dynamics.shrink(marginal, marginal, scale, pair, 0.0) is marginal


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_equilibrium_mask_minimises_the_coupled_loss(share):
    """At sharpness 1 it is the minimiser of Σ (1 - M_i) m_i + p/2 Σ cost_i M_i² over [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    marginal = torch.rand(20, generator=generator, dtype=torch.float64)
    cost = 1 + torch.rand(20, generator=generator, dtype=torch.float64)
    mask = dynamics.equilibrium_mask(marginal, cost, share, 1.0)
    assert float((mask * cost).sum() / cost.sum()) == pytest.approx(share)
    p = float((marginal / cost / mask)[mask < 1].mean()) if (mask < 1).any() else 0.0

    def loss(m: torch.Tensor) -> float:
        return float((((1 - m) * marginal) + p / 2 * cost * m.square()).sum())

    for i, value in itertools.product(range(20), (0.0, 0.3, 1.0)):
        other = mask.clone()
        other[i] = value
        assert loss(other) >= loss(mask) - 1e-12


def test_the_binary_marginal_is_unbiased():
    """On L(b) = ½ (b-1)ᵀH(b-1), the mean of -∂L + h (b - ½) is the exact loss of removal.

    The exact one is E[L(b_i=0) - L(b_i=1)] over the other draws: brute force over all corners.
    """
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    hessian, mask = root @ root.T, torch.rand(5, generator=generator, dtype=torch.float64)
    estimate, exact = torch.zeros(5).double(), torch.zeros(5).double()
    for corner in itertools.product((0.0, 1.0), repeat=5):
        b = vector(corner)
        weight = (b * mask + (1 - b) * (1 - mask)).prod()
        estimate += weight * (hessian.diagonal() * (b - 0.5) - hessian @ (b - 1))
        for i in range(5):
            on, off = b.clone(), b.clone()
            on[i], off[i] = 1, 0
            loss = [0.5 * (x - 1) @ hessian @ (x - 1) for x in (off, on)]
            exact[i] += weight * (loss[0] - loss[1])
    torch.testing.assert_close(estimate, exact)


def test_read_order_is_nested_by_group_and_uses_up_everything():
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (1, 6)]
    cost = torch.cat([torch.full((12,), 2.0), torch.full((6,), 5.0)]).double()
    share = [1 - 0.095 * (k + 1) for k in range(10)]
    masks = torch.rand(10, 18, generator=generator)
    entry = dynamics.read_order(masks, share, cost, shapes, 2)
    heads = entry[:12].view(3, 4).sort(dim=1).values
    assert (heads == heads[:1]).all()  # one rank of every head leaves at a time
    assert entry.max() == 1
    assert (entry > 0).all()
    groups = entry.unique()
    assert len(groups) == 4 + 6
    for e in groups:
        kept = float(cost[entry <= e].sum() / cost.sum())
        assert kept == pytest.approx(float(e))


def slow_order(masks, keep, cost, shapes, memory):
    """`read_order` as it is defined: one pair after another, all of its ranks at every step."""
    tail, forgotten = masks.double().sum(0), 0
    sizes = [heads * width for heads, width in shapes]
    entry = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    alive = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    total = left = float(cost.sum())
    parts = zip(torch.split(cost, sizes), shapes, strict=True)
    group_cost = torch.stack([part[0] * heads for part, (heads, _) in parts])
    for k, size in enumerate([*keep, 0.0]):
        start = min(max(0, k - memory), len(masks) - 1)
        if start > forgotten:
            tail = tail - masks[forgotten:start].double().sum(0)
            forgotten = start
        if left <= size * total:
            continue
        parts = zip(torch.split(tail, sizes), shapes, alive, strict=True)
        groups = [groups_by_rank(part.view(shape), here) for part, shape, here in parts]
        order = removal_order([mean for mean, _ in groups], [0] * len(shapes))
        spent = group_cost[order.pair].cumsum(0)
        before = left - (spent - group_cost[order.pair])
        count = int((before > size * total).sum())
        for i in range(len(shapes)):
            own = order.pair[:count] == i
            unit = groups[i][1][:, order.start[:count][own]]
            entry[i].scatter_(1, unit, (before[:count][own] / total).expand(unit.shape))
            alive[i].scatter_(1, unit, False)
        left -= float(spent[count - 1])
    return torch.cat([times.flatten() for times in entry])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(1, 1), (1, 5), (1, 40), (3, 4), (4, 1), (5, 9)]), min_size=1),
    steps=st.integers(1, 6),
    memory=st.integers(0, 3),
    levels=st.sampled_from([1, 2, 5, 1000]),
    looked_at=st.sampled_from([1, 2, 64]),
    seed=st.integers(0, 2**20),
)
def test_read_order_is_its_definition(shapes, steps, memory, levels, looked_at, seed):
    """To the last bit, with ties within heads, between ranks and between pairs."""
    generator = torch.Generator().manual_seed(seed)
    units = sum(heads * width for heads, width in shapes)
    masks = torch.randint(levels, (steps, units), generator=generator).div(levels).half()
    keep = torch.rand(steps, generator=generator).sort(descending=True).values.tolist()
    cost = torch.cat([torch.full((h * w,), 1.0 + 3 * (w % 2) + h) for h, w in shapes]).double()
    expected = slow_order(masks, keep, cost, shapes, memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "_LOOKED_AT", looked_at)
        found = dynamics.read_order(masks, keep, cost, shapes, memory)
    assert found.equal(expected)


def test_read_order_follows_the_masks():
    """With masks that keep a fixed ranking, the order is that ranking."""
    ranking = torch.tensor([0.9, 0.1, 0.5, 0.7])
    masks = ranking.expand(20, -1)
    share = [1 - 0.05 * (k + 1) for k in range(19)] + [0.05]
    entry = dynamics.read_order(masks, share, torch.ones(4).double(), [(1, 4)], 2)
    assert entry.argsort().tolist() == [0, 3, 2, 1]


@pytest.mark.parametrize("nu", [0.1, 1.0, 10.0])
def test_inclusion_follows_its_closed_form(nu):
    """Paper, section 3, on L = ½ Σ h (M-1)², before a unit enters (Γ = 0).

    With the preconditioner 1/(h + 1/ν) all masks relax at rate 1 in the time t of the iteration:
    M(t) = M* + (1 - M*) e⁻ᵗ with M* = νh / (1 + νh), and V(t) = M* t + (1 - M*)(1 - e⁻ᵗ).
    """
    scale, step, lam = vector([0.01, 0.1, 1.0, 10.0, 100.0]), 2e-3, 4.0
    rest = nu * scale / (1 + nu * scale)
    zero = torch.zeros(5, dtype=torch.float64)
    state = dynamics.Inclusion(zero + 1, zero, zero + torch.inf)
    for k in range(10_000):
        state = dynamics.inclusion_step(
            state,
            scale * (state.mask - 1),
            scale=scale, nu=nu, kappa=0.0, lam=lam, step_size=step, time=k,
        )  # fmt: skip
    t = step * 10_000
    torch.testing.assert_close(
        state.mask, rest + (1 - rest) * torch.tensor(-t).exp(), rtol=0, atol=4e-3
    )
    torch.testing.assert_close(state.dual, rest * t + (1 - rest), rtol=4e-3, atol=4e-3)
    for i in range(5):
        time = float(state.entry[i]) * step
        if time != float("inf"):
            r = float(rest[i])
            dual = r * time + (1 - r) * (1 - float(torch.tensor(-time).exp()))
            assert dual == pytest.approx(lam, rel=4e-3)
    order = dynamics.extrapolated_entry(state, lam, 10_000)
    assert order.argsort().tolist() == [4, 3, 2, 1, 0]


def test_inclusion_settles_where_the_sparse_copy_meets_the_mask():
    """After entry Γ grows until M = Γ = 1: nothing pulls an entered unit any more."""
    one = torch.ones(1, dtype=torch.float64)
    state = dynamics.Inclusion(one, 0 * one, one * torch.inf)
    for k in range(5_000):
        state = dynamics.inclusion_step(
            state, state.mask - 1, scale=one, nu=1.0, kappa=1.0, lam=2.0, step_size=0.01, time=k
        )
    gamma = dynamics.sparse_copy(state.dual, 1.0, 2.0)
    assert float(state.mask) == pytest.approx(1, abs=1e-3)
    assert float(gamma) == pytest.approx(1, abs=1e-3)


KINDS = ("classes", "labels", "spans", "regression", "hidden")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 5)])
def test_divergence_is_zero_at_the_target_and_its_curvature_is_the_sketch(kind, shape):
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=generator)
    mask = None if len(shape) == 2 else torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    if kind == "spans":  # over the last dimension, of which the mask takes positions
        target = target if len(shape) == 3 else target[:, None]
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool()
        shape = target.shape
    compared = {"kind": kind, "spread": 0.7}
    output = target.clone().requires_grad_()
    value = divergence(output, target, mask, **compared)
    [gradient] = torch.autograd.grad(value.sum(), output)
    assert value.abs().max() <= 1e-7
    assert gradient.abs().max() <= 1e-7

    noise = torch.randn(40_000, *shape, generator=generator)
    draws = torch.stack([curvature_sketch(target, mask, n, **compared) for n in noise])
    covariance = torch.einsum("nbi,nbj->bij", draws.flatten(2), draws.flatten(2)) / len(noise)
    for b in range(shape[0]):
        hessian = torch.autograd.functional.hessian(
            lambda x, b=b: divergence(
                x[None], target[b : b + 1], None if mask is None else mask[b : b + 1], **compared
            ).sum(),
            target[b],
        )
        size = target[b].numel()
        difference = covariance[b] - hessian.view(size, size)
        assert difference.abs().max() <= 0.05 * hessian.abs().max()
