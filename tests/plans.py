"""Random plans, without a search."""

import torch

import solpath
from conftest import inputs
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.planning.plan import Plan, best_units
from solpath.running.forward import forward


def random_plan(model, fractions, seed=0) -> Plan:
    """A plan with the given share of each pair's width, its own random units in every head."""
    widths = [
        round(p.width * fractions[i % len(fractions)]) for i, p in enumerate(find_pairs(model))
    ]
    return plan_of(model, widths, seed)


def plan_of(model, widths, seed=0) -> Plan:
    """A plan with the given width of every pair."""
    pairs = find_pairs(model)
    costs = count_costs(model, pairs, inputs(model, samples=1))
    generator = torch.Generator().manual_seed(seed)
    kept = {
        p.name: best_units(torch.rand(p.heads, p.width, generator=generator), width)
        for p, width in zip(pairs, widths, strict=True)
    }
    widths = {name: index.shape[1] for name, index in kept.items()}
    gains = {
        p.name: torch.rand(p.heads, p.left[0].repeat, generator=generator).double() + 0.5
        for p in pairs
        if p.norms
    }
    for p in pairs:  # a pair that keeps all it has keeps its size, see `norm_gain`
        if p.norms and widths[p.name] == p.width:
            gains[p.name].fill_(1)
    achieved = costs.achieved(pairs, widths)
    return Plan(pairs, kept, {}, achieved, fingerprint(model, pairs), gains)


def both(model, plan, batch):
    """Outputs of the masked and of the extracted model."""
    small = solpath.extract(model, plan)
    with torch.no_grad():
        with solpath.masked(model, plan):
            masked = forward(model, batch)
        return masked, forward(small, batch)
