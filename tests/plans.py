"""Plans without a search: random ones, and ones that a stock class of transformers holds."""

from dataclasses import replace

import torch

import solpath
from conftest import inputs
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.planning.constraints import Constraints, attention_of
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


def heads_plan(model, left, mlps=(1.0,), seed=0) -> Plan:
    """A plan in which attentions keep random key-value heads, whole.

    Args:
        left: How many each attention keeps, in turns, of those that it has.
        mlps: The shares that the other pairs keep, in turns.
    """
    pairs, generator = find_pairs(model), torch.Generator().manual_seed(seed)
    kept, heads, places = {}, {}, {}
    for i, p in enumerate(pairs):
        if p.kind not in ("qk", "vo"):
            scores = torch.rand(p.heads, p.width, generator=generator)
            kept[p.name] = best_units(scores, round(p.width * mlps[i % len(mlps)]))
            continue
        if (place := attention_of(p)) not in places:
            count = min(left[len(places) % len(left)], p.heads)
            places[place] = torch.randperm(p.heads, generator=generator)[:count].sort().values
        if len(places[place]) < p.heads:
            heads[p.name] = places[place]
        kept[p.name] = torch.arange(p.width).repeat(len(places[place]), 1)
    ranked = Constraints(whole_groups=True).ranked(pairs)
    widths = {
        p.name: len(kept[p.name]) if p.kind in ("qk", "vo") else kept[p.name].shape[1]
        for p in pairs
    }
    achieved = count_costs(model, pairs, inputs(model, samples=1)).achieved(ranked, widths)
    gains = {p.name: torch.ones(p.heads, p.left[0].repeat).double() for p in pairs if p.norms}
    return Plan(pairs, kept, {}, achieved, fingerprint(model, pairs), gains, heads=heads)


def both(model, plan, batch):
    """Outputs of the masked and of the extracted model."""
    small = solpath.extract(model, plan)
    with torch.no_grad():
        with solpath.masked(model, plan):
            masked = forward(model, batch)
        return masked, forward(small, batch)


PLAIN = ["audio-spectrogram-transformer", "beit", "deit", "dinov2", "dinov2 gated", "ijepa", "vit"]
PLAIN += ["dinov2_with_registers", "vit_mae", "vit_msn", "vivit"]
RELATIVE = ["mt5", "t5", "t5 gated", "umt5"]
ROTARY = ["cohere", "cohere2", "ernie4_5", "eurobert", "gemma", "gemma2", "gemma3", "gemma3_text"]
ROTARY += ["gpt_oss", "granite", "llama", "llama 1:6", "llava", "ministral", "mistral"]
ROTARY += ["mixtral", "olmo", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"]
ROTARY += ["starcoder2"]
HEADS = PLAIN + RELATIVE + ROTARY
NO_MLP = ["bloom", "siglip_vision_model", "siglip2_vision_model"]


def narrow(pair, label):
    """A width that the field of the family has."""
    if pair.kind == "experts" or pair.kind == "mlp":
        if label.startswith("swin"):
            return int(0.85 * pair.width / 1.7 + 1e-9)
        if label.startswith("dinov2"):
            return pair.width // 2
        return 8 if pair.kind == "experts" else pair.width // 2
    return 2 if pair.channels == 2 else 4


def stock_plan(model, label, cut):
    """A plan that a stock class holds: one width of MLPs, of heads, equal couples everywhere.

    Args:
        cut: ``"mlp"``, ``"heads"`` or ``"both"``; ``"dropped"`` drops whole sublayers, and
            ``"uneven"`` is a random plan, which a stock class holds with zeros alone.
    """
    pairs = find_pairs(model)
    if cut == "uneven":
        plan = random_plan(model, (0.5, 0.25, 0.75, 0.6))
        return replace(plan, gains=ones(plan))
    last = {p.kind: p.name for p in pairs}
    dropped = [last.get("mlp"), last.get("vo")] if cut == "dropped" else []
    generator = torch.Generator().manual_seed(1)
    tables = rotary_tables(model)
    order = {table: torch.randperm(64, generator=generator) for table in sorted(set(tables))}
    heads = any(label == name for name in HEADS) and cut in ("heads", "both")
    kept = {}
    for pair in pairs:
        width = pair.width
        neurons = pair.kind in ("mlp", "experts") and not (tower(pair) and label == "gemma3")
        if (neurons and cut in ("mlp", "both")) or (
            heads and pair.kind in ("qk", "vo") and not tower(pair)
        ):
            width = min(narrow(pair, label), pair.width)
        if pair.name in dropped:
            width = 0
        units = torch.stack([torch.randperm(pair.width, generator=generator)[:width]
                             for _ in range(pair.heads)]).sort(1).values  # fmt: skip
        if pair.channels == 2 and 0 < width < pair.width:
            shared = order[tables[layer_of(pair) % len(tables)]]
            units = shared[shared < pair.width][:width].sort().values.expand(pair.heads, -1)
        kept[pair.name] = units
    plan = plan_of(model, [kept[pair.name].shape[1] for pair in pairs])
    gains = {
        p.name: torch.full((p.heads, p.left[0].repeat), 0.7 + 0.1 * layer_of(p)).double()
        for p in pairs if p.norms and kept[p.name].shape[1] < p.width
    }  # fmt: skip
    return replace(plan, kept=kept, gains={**ones(plan), **gains})


def ones(plan):
    return {name: torch.ones_like(gain) for name, gain in plan.gains.items()}


def tower(pair):
    """Whether a pair belongs to the vision tower of a language model, which has no such field."""
    return "vision_tower" in pair.name


def layer_of(pair):
    return next(int(part) for part in pair.name.split(".") if part.isdigit())


def rotary_tables(model):
    """The rotary table of every layer."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    return list(text.layer_types) if nested else [""]
