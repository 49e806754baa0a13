"""Constraints of plans: respected, nested, priced, and those of targets enough for the target."""

import copy
import json
import pickle
import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import solpath
from conftest import CASES, batches, build, inputs
from plans import both
from solpath.arch import lookup
from solpath.cli.main import run
from solpath.errors import BudgetError, ConfigError, UnsupportedModelError
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.pair import Fingerprint, Pair, Side
from solpath.planning.constraints import Constraints
from solpath.planning.cost import CostTable
from solpath.planning.path import SolutionPath
from solpath.planning.plan import Plan
from solpath.planning.removal import Team, removal_order
from solpath.planning.targets import TARGETS, drops_heads, targets_of
from solpath.running.forward import forward


def attention(i, couples=True):
    name = f"layers.{i}.attention"
    qk = Side("q", 0, 2), Side("k", 0)
    channels = 2 if couples else 1
    return (
        Pair(f"{name}.qk", "qk", 4, 16 // channels, qk[:1], qk[1], 30 * channels, channels),
        Pair(f"{name}.vo", "vo", 4, 16, (Side("v", 0),), Side("o", 1), 31),
        Pair(f"layers.{i}.mlp", "mlp", 1, 70, (Side("a", 0),), Side("b", 1), 32),
    )


PAIRS = sum((attention(i) for i in range(4)), ())


def made_path(seed=0, pairs=PAIRS, name="LlamaForCausalLM", **fields) -> SolutionPath:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(len(pairs), generator=generator)
    score = {
        p.name: (torch.rand(p.heads, p.width, generator=generator) * spread[i]).double()
        for i, p in enumerate(pairs)
    }
    unit = {p.name: p.cost for p in pairs}
    whole = sum(p.cost * p.units for p in pairs)
    measures = ("params", "bytes", "macs", "cache")
    costs = CostTable(dict.fromkeys(measures, 2 * whole), dict.fromkeys(measures, unit), {})
    return SolutionPath(pairs, score, score, costs, "made", {}, Fingerprint(name, {}), **fields)


def path_of(model, seed=0) -> SolutionPath:
    """A path of random scores."""
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(seed)
    score = {
        p.name: torch.rand(p.heads, p.width, generator=generator, dtype=torch.float64)
        for p in pairs
    }
    energy = {
        p.name: torch.rand(p.heads, p.left[0].repeat + 1, p.width, generator=generator).double()
        for p in pairs
        if p.norms
    }
    costs = count_costs(model, pairs, inputs(model, samples=1))
    known = fingerprint(model, pairs)
    return SolutionPath(pairs, score, score, costs, "made", {}, known, energy=energy)


def subset(small: Plan, large: Plan) -> bool:
    masks = large.masks()
    return all((mask <= masks[name]).all() for name, mask in small.masks().items())


def check(plan: Plan, said: Constraints) -> None:
    """Assert that a plan respects constraints."""
    alike = defaultdict(set)
    couples, groups = defaultdict(list), defaultdict(set)
    for pair in plan.pairs:
        width = plan.widths[pair.name]
        if said.protects(pair):
            assert width == pair.width
        if said.by_head(pair):
            heads = plan.heads.get(pair.name, torch.arange(pair.heads))
            assert len(plan.kept[pair.name]) == len(heads) > 0
            assert width == pair.width
            groups[pair.name.rpartition(".")[0]].add(tuple(heads.tolist()))
            if pair.kind in said.uniform_kinds:
                alike[pair.kind, "heads"].add(len(heads))
            continue
        assert width == pair.width or width % said.multiple(pair.kind) == 0
        assert width >= min(said.least(pair.kind), pair.width)
        if pair.kind in said.uniform_kinds:
            alike[pair.kind, pair.heads, pair.width].add(width)
        if said.tied_widths and pair.kind in ("qk", "vo") and not said.protects(pair):
            alike[pair.name.rpartition(".")[0]].add(width * pair.channels)
        if said.shared_couples and pair.channels > 1:
            couples[width] += [tuple(row) for row in plan.kept[pair.name].tolist()]
    assert all(len(widths) == 1 for widths in (*alike.values(), *groups.values()))
    assert all(len(set(rows)) == 1 for rows in couples.values())
    kept = [set(rows[0]) for _, rows in sorted(couples.items())]
    assert all(narrow <= wide for narrow, wide in zip(kept, kept[1:], strict=False))


per_kind = st.one_of(
    st.integers(1, 9),
    st.dictionaries(st.sampled_from(["qk", "vo", "mlp", "experts"]), st.integers(1, 9)),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 20),
    sizes=st.lists(st.floats(0, 0.4), min_size=2, max_size=3),
    multiple_of=per_kind,
    min_width=st.one_of(st.integers(0, 5), st.just({"mlp": 7})),
    uniform=st.one_of(st.booleans(), st.sets(st.sampled_from(["qk", "vo", "mlp"]))),
    tied_widths=st.booleans(),
    shared_couples=st.booleans(),
    whole_groups=st.booleans(),
)
def test_constraints_are_respected_and_nested(seed, sizes, **options):
    path, said = made_path(seed), Constraints(**options)
    plans, beyond = [], {}  # the constraints may keep too much for the largest sizes
    for size in sorted(sizes):
        try:
            plans.append(path.plan(sparsity=size, **options))
        except BudgetError as error:
            beyond[size] = float(re.search(r"0 to ([\d.]+) are", str(error))[1])
    assert all(size > end for size, end in beyond.items())
    for plan in plans:
        check(plan, said)
        assert (plan.constraint_cost is None) == (not said.binding)
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).to_dict() == plan.to_dict()
    for large, small in zip(plans, plans[1:], strict=False):
        assert subset(small, large)


def test_the_worst_common_rank_leaves_first():
    """Of uniform pairs one block leaves, the least by the mean of all scores in it."""
    values = [torch.tensor([9.0, 1.0]), torch.tensor([9.0, 7.0]), torch.tensor([9.0, 3.0])]
    teams = [Team((0, 1), (1, 1), (1, 1)), Team((2,), (1,), (1,))]
    order = removal_order([value.double() for value in values], [0, 0, 0], teams)
    assert order.pair.tolist() == [2, 0, 1, 0, 1, 2]
    assert order.block.tolist() == [0, 1, 1, 2, 2, 3]
    weighed = removal_order(
        [value.double() for value in values], [0, 0, 0], [Team((0, 1), (1, 1), (8, 1)), teams[1]]
    )
    assert weighed.pair.tolist()[:2] == [0, 1]


def test_couples_leave_by_their_score_in_all_heads():
    path = made_path(3)
    plan = path.plan(sparsity=0.3, uniform=True, shared_couples=True)
    qk = [p for p in PAIRS if p.kind == "qk"]
    total = torch.cat([path.score[p.name] for p in qk]).sum(0)
    best = total.argsort(descending=True)[: plan.widths[qk[0].name]].sort().values
    assert 0 < len(best) < qk[0].width
    assert all((plan.kept[p.name] == best).all() for p in qk)


def test_the_cost_of_constraints():
    history = torch.stack([torch.linspace(0, 1, 50), torch.linspace(1, 0, 50)]).double()
    path = made_path(1, history=history)
    assert path.plan(sparsity=0.5).constraint_cost is None
    loose = path.plan(sparsity=0.5, multiple_of={"vo": 2}).constraint_cost
    tight = path.plan(sparsity=0.5, multiple_of=8, uniform=True, shared_couples=True)
    cost = tight.constraint_cost
    assert cost.kept_score < loose.kept_score <= 1.01
    assert cost.equal_sparsity > tight.achieved.sparsity
    assert cost.loss == pytest.approx(tight.achieved.sparsity, abs=0.03)  # as the history says
    assert cost.equal_loss == pytest.approx(cost.equal_sparsity, abs=0.03)
    assert f"{cost.kept_score:.1%} of the score" in repr(tight)
    assert made_path(1).plan(sparsity=0.5, min_width=2).constraint_cost.loss is None
    by_macs = path.plan(macs=0.75, multiple_of=8).constraint_cost
    assert 0.5 < by_macs.kept_score < 1.01
    for wrong in ({"kept_score": "1"}, {"more": 1.0}, {"equal_sparsity": None}):
        value = tight.to_dict()
        value["constraint_cost"] = value["constraint_cost"] | wrong
        with pytest.raises(ValueError, match=f"constraint_cost.{next(iter(wrong))}"):
            Plan.from_dict(value)
    older = tight.to_dict()
    del older["constraint_cost"]
    assert Plan.from_dict(older).constraint_cost is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"multiple_of": {"mlps": 8}}, "multiple_of names 'mlps'; the kinds are qk, vo, mlp"),
        ({"multiple_of": {"mlp": 0}}, r"multiple_of\['mlp'\] must be an integer of at least 1"),
        ({"min_width": {"mlp": -1}}, r"min_width\['mlp'\]"),
        ({"uniform": "mlp"}, "uniform must name kinds"),
        ({"uniform": 1}, "uniform must name kinds"),
        ({"uniform": ["heads"]}, "uniform names 'heads'"),
        ({"tied_widths": 1}, "tied_widths must be True or False"),
        ({"protect": "*.mlp"}, "protect must be a list"),
        (
            {"uniform": True, "protect": ["layers.0.mlp"]},
            "keeps layers.0.mlp dense, and uniform, tied_widths or whole_groups gives layers.1.mlp",
        ),
        ({"tied_widths": True, "protect": ["*.1.*.vo"]}, r"keeps layers\.1\.attention\.vo dense"),
        ({"for_": "tensorrt"}, "for_ must be one of onnx, openvino, vllm, stock, gguf"),
    ],
)
def test_what_makes_no_sense(options, words):
    with pytest.raises(ConfigError, match=words):
        made_path().plan(sparsity=0.3, **options)


def test_an_unreachable_size_says_who_keeps_the_rest():
    with pytest.raises(BudgetError, match=r"0 to 0\.\d+ are\. The constraints keep the rest\."):
        made_path().plan(sparsity=0.9, for_="gguf")


def test_what_a_model_cannot_respect():
    plain = sum((attention(i, couples=False) for i in range(2)), ())
    with pytest.raises(ConfigError, match="no rotary couples"):
        made_path(pairs=plain).plan(sparsity=0.3, shared_couples=True)
    qk, vo, mlp = attention(0)
    with pytest.raises(ConfigError, match="have 16 channels for queries and 10 for values"):
        made_path(pairs=(qk, replace(vo, width=10), mlp)).plan(sparsity=0.3, tied_widths=True)
    with pytest.raises(ConfigError, match=r"has the pairs layers\.0\.attention\.vo"):
        made_path(pairs=(vo, mlp)).plan(sparsity=0.3, tied_widths=True)
    unreached = made_path(pairs=PAIRS[:-1], unreached=(PAIRS[-1].name,))
    with pytest.raises(ConfigError, match=r"layers\.3\.mlp stays whole, because no batch"):
        unreached.plan(sparsity=0.3, uniform=True)
    with pytest.raises(ConfigError, match=r"no batch reached it.*the nearest possible is 'vllm'"):
        unreached.plan(sparsity=0.3, for_="stock")
    unreached.plan(sparsity=0.3, uniform=["qk", "vo"])


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("PhiForCausalLM", "stock", "no class of transformers .* nearest possible is 'vllm'"),
        ("SwinModel", "stock", "nearest possible is 'onnx'"),
        ("BertModel", "gguf", "deci of llama.cpp holds .* nearest possible is 'stock'"),
        ("BertModel", "vllm", "is no decoder of text .* nearest possible is 'stock'"),
    ],
)
def test_impossible_targets_name_the_nearest(name, target, words):
    with pytest.raises(ConfigError, match=f"target '{target}': .*{words}"):
        made_path(name=name).plan(sparsity=0.3, for_=target)


def test_arguments_tighten_a_target():
    plan = made_path().plan(
        sparsity=0.3, for_="vllm", multiple_of={"mlp": 12}, min_width=2, protect=["layers.0.*"]
    )
    said = {"multiple_of": {"qk": 4, "vo": 8, "mlp": 24}, "min_width": 2}
    asked = {"sparsity": 0.3, **said, "protect": ["layers.0.*"], "target": "vllm"}
    assert plan.asked == asked
    check(plan, Constraints(**said, protect=["layers.0.*"]))


LABELS = ["bert", "vit", "llama", "qwen3", "t5", "gpt2", "whisper", "gemma3_text", "phi", "swin"]
OPTIONS = [
    {"multiple_of": {"qk": 2, "mlp": 8}, "uniform": ["mlp", "vo"]},
    {"min_width": 1, "uniform": True, "multiple_of": 2},
]


@pytest.mark.parametrize("label", LABELS)
def test_masked_equals_extracted_under_constraints(label):
    model = build(label).double()
    path = path_of(model)
    choices = [*OPTIONS, *({"for_": name} for name in TARGETS)]
    couples = any(pair.channels > 1 for pair in path.pairs)
    choices += [{"shared_couples": True, "uniform": ["qk"]}] if couples else []
    found = targets_of(path.fingerprint.architecture, path.pairs)
    for options in choices:
        if isinstance(found.get(options.get("for_")), str):
            continue
        plan = path.plan(sparsity=0.2, **options)
        masked, small = both(model, plan, inputs(model))
        assert (masked - small).abs().max() <= 1e-12 * masked.abs().max()
        assert 0 < plan.achieved.sparsity < 1
        check(plan, found.get(options.get("for_")) or Constraints(**options))


def loses_heads(label) -> bool:
    stacks = lookup(label.partition(" ")[0])
    return all(table.by_head for stack in stacks for table in stack.attentions)


BY_HEAD = [label for label in CASES if loses_heads(label)]
FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert", "vit", "t5", "gpt2"}


def by_head(model, sparsity=0.3, **options) -> Plan:
    """A plan in which attentions lose whole heads."""
    path = path_of(model)
    for pair in path.pairs:  # MLPs last
        path.score[pair.name].add_(pair.kind == "mlp")
    plan = path.plan(sparsity=sparsity, whole_groups=True, **options)
    said = Constraints(whole_groups=True)
    if target := options.get("for_"):
        names = path.fingerprint.architecture, path.pairs
        said = said.tightened(targets_of(*names, whole_groups=True)[target])
    check(plan, said)
    return plan


@pytest.mark.parametrize("label", BY_HEAD)
def test_whole_heads_leave(label):
    model = build(label).double()
    plan = by_head(model)
    if max(pair.heads for pair in plan.pairs) > 1:
        assert plan.heads
    masked, small = both(model, plan, inputs(model))
    assert (masked - small).abs().max() <= 1e-12 * masked.abs().max()
    cut = solpath.extract(model, plan)
    assert sum(p.numel() for p in cut.parameters()) == plan.achieved.params
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.to_dict() == plan.to_dict()
    assert subset(again, plan)
    assert subset(plan, again)


def test_the_families_that_lose_heads():
    assert {*BY_HEAD} >= FAMILIES | {"whisper", "llama 1:6"}
    model = build("gpt_neox")
    with pytest.raises(UnsupportedModelError, match="cannot lose whole heads; plan without"):
        solpath.extract(model, by_head(model))


def test_the_least_head_leaves_first():
    """It is the one with the least score in both pairs of the attention, weighted by cost."""
    path = made_path(2)
    plan = path.plan(sparsity=0.04, whole_groups=True, protect=["*.mlp"])
    lost = [name for name in plan.heads if name.endswith(".vo")]
    assert len(lost) == 1
    place = lost[0].removesuffix(".vo")
    worth = sum(path.score[p.name].sum(1) * p.cost for p in PAIRS if p.name.startswith(place + "."))
    assert plan.heads[lost[0]].tolist() == [h for h in range(4) if h != int(worth.argmin())]
    alike = path.plan(sparsity=0.3, whole_groups=True, uniform=True)
    assert len({len(heads) for heads in alike.heads.values()}) == 1
    assert len(alike.heads) == 8


@pytest.mark.parametrize("label", ["llama", "qwen3", "t5", "whisper", "gpt2", "bert"])
def test_cut_heads_are_saved_copied_and_generate(label, tmp_path):
    model = build(label)
    plan = by_head(model)
    small, batch = solpath.extract(model, plan), inputs(model)
    with torch.no_grad():
        expected = forward(small, batch)
        solpath.save(small, tmp_path / "saved")
        model.save_pretrained(tmp_path / "dense")
        solpath.extract(str(tmp_path / "dense"), plan, out=tmp_path / "streamed")
        models = [solpath.load(tmp_path / name) for name in ("saved", "streamed")]
        models += [copy.deepcopy(small), pickle.loads(pickle.dumps(small))]  # noqa: S301
        for other in models:
            assert torch.equal(forward(other, batch), expected)
    assert {*models[0].solpath_plan.heads} == {*plan.heads}
    if small.can_generate():
        options = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
        given = {name: value for name, value in batch.items() if not name.startswith("decoder")}
        with_cache = small.generate(**given, **options)
        assert torch.equal(with_cache, small.generate(**given, **options, use_cache=False))
    other = dict(small.state_dict())
    assert set(other) == set(model.state_dict())


def test_models_without_heads_are_refitted():
    model = build("llama")
    small = solpath.extract(model, by_head(model))
    better = solpath.compensate(small, model, batches(model) * 2)
    found = solpath.evaluate({"cut": small, "refitted": better}, model, batches(model))
    assert found["refitted"].metrics["kl"] < found["cut"].metrics["kl"]


def test_what_whole_groups_refuses():
    _, vo, mlp = attention(0)
    with pytest.raises(ConfigError, match=r"can lose units of layers\.0\.attention\.vo only"):
        made_path(pairs=(vo, mlp)).plan(sparsity=0.1, whole_groups=True)
    plan = made_path().plan(sparsity=0.3, whole_groups=True)
    name = next(iter(plan.heads))
    for wrong in ([], [0, 0], [1, 0], [4], [0, True], "0"):
        value = plan.to_dict()
        value["heads"][name] = wrong
        with pytest.raises(ValueError, match=r"heads\["):
            Plan.from_dict(value)
    value = plan.to_dict()
    value["heads"][name] = [h for h in range(4) if h not in value["heads"][name]][:1]
    value["kept"][name] = value["kept"][name][:1]
    with pytest.raises(ValueError, match="pairs of an attention keep the same heads"):
        Plan.from_dict(value)
    value = plan.to_dict()
    del value["heads"]
    with pytest.raises(ValueError, match="expected 4 lists"):
        Plan.from_dict(value)


def stock(model, plan, widths) -> torch.nn.Module:
    """The dense class with another configuration, and the weights of the cut model."""
    small = solpath.extract(model, plan)
    config = copy.deepcopy(model.config)
    state = {
        name: value
        for name, value in small.state_dict().items()
        if name.rpartition(".")[2] not in ("couples", "gain", "kept_heads")
    }
    for pair in plan.pairs:
        if pair.kind == "mlp":
            widths(config, pair, plan.widths[pair.name])
    qk = [pair for pair in plan.pairs if pair.kind == "qk" and not plan_whole(plan, pair)]
    if qk:
        channels, dense = plan.widths[qk[0].name] * qk[0].channels, qk[0].width * qk[0].channels
        couples = plan.kept[qk[0].name][0].double()
        setattr(config, "d_kv" if hasattr(config, "d_kv") else "head_dim", channels)
        for pair in qk if not hasattr(config, "d_kv") else ():  # T5 does not scale
            for part in ("weight", "bias"):
                if (name := f"{pair.left[0].module}.{part}") in state:
                    state[name] = state[name] * (channels / dense) ** 0.5
        if qk[0].channels == 2:
            base = config.rope_parameters["rope_theta"]
            place = torch.arange(len(couples)) * 2 / channels
            factor = (base ** (2 * couples / dense - place)).tolist()
            config.rope_parameters = {
                "rope_type": "longrope", "rope_theta": base, "short_factor": factor,
                "long_factor": factor, "factor": 1.0, "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }  # fmt: skip
    found = type(model)._from_config(config, dtype=torch.float64)
    found.load_state_dict(state)
    return found.eval()


@pytest.mark.parametrize("label", ["mistral", "qwen2", "gemma", "vit", "deit"])
def test_stock_classes_hold_equally_many_heads(label):
    model = build(label).double()
    plan = by_head(model, 0.2, for_="stock")
    vo = next(pair for pair in plan.pairs if pair.kind == "vo")
    left = len(plan.heads.get(vo.name, range(vo.heads)))
    assert (left < vo.heads) == (vo.heads > 1)

    def widths(config, pair, width):
        config.intermediate_size, config.head_dim = width, vo.width
        config.num_attention_heads = left * vo.right.repeat
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = left

    batch = inputs(model)
    with torch.no_grad():
        cut = forward(solpath.extract(model, plan), batch)
        found = forward(stock(model, plan, widths), batch)
    assert (found - cut).abs().max() <= 1e-12 * cut.abs().max()


def test_targets_of_whole_heads():
    plan = made_path().plan(sparsity=0.3, for_="gguf", whole_groups=True)
    assert plan.heads
    assert plan.asked["protect"] == []
    with pytest.raises(ConfigError, match=r"share one bias .* nearest possible is 'onnx'"):
        made_path(name="T5Model").plan(sparsity=0.3, for_="stock", whole_groups=True)
    pairs = made_path().pairs
    for name, held in {
        "LlamaModel": True,
        "ViTModel": True,
        "Qwen3ForCausalLM": True,
        "Gemma3ForCausalLM": False,
        "BertModel": False,
        "T5Model": False,
    }.items():
        assert drops_heads(targets_of(name, pairs, whole_groups=True)["stock"], pairs) == held
    plan = made_path(name="Qwen3ForCausalLM").plan(sparsity=0.3, for_="stock", whole_groups=True)
    assert len({len(heads) for heads in plan.heads.values()}) == 1


def plan_whole(plan, pair):
    return plan.widths[pair.name] == pair.width


def simply(field):
    return lambda config, pair, width: setattr(config, field, width)


def by_side(config, pair, width):
    side = "encoder" if ".encoder." in pair.name or pair.name.startswith("encoder") else "decoder"
    setattr(config, f"{side}_ffn_dim", width)


def by_tower(config, pair, width):
    part = config.text_config if pair.name.startswith("text") else config.vision_config
    part.intermediate_size = width


def ratio(config, pair, width):
    config.mlp_ratio = width // config.hidden_size


STOCK = {
    "llama": simply("intermediate_size"), "mistral": simply("intermediate_size"),
    "qwen2": simply("intermediate_size"), "gemma": simply("intermediate_size"),
    "qwen3": simply("intermediate_size"), "gemma3_text": simply("intermediate_size"),
    "vit": simply("intermediate_size"), "deit": simply("intermediate_size"), "dinov2": ratio,
    "t5": simply("d_ff"), "bert": simply("intermediate_size"),
    "electra": simply("intermediate_size"), "distilbert": simply("hidden_dim"),
    "gpt2": simply("n_inner"), "opt": simply("ffn_dim"), "clip": by_tower, "siglip": by_tower,
    "whisper": by_side,
}  # fmt: skip


@pytest.mark.parametrize("label", STOCK)
def test_stock_classes_hold_what_the_target_stock_cuts(label):
    model = build(label).double()
    path = path_of(model)
    plan = path.plan(sparsity=0.2, for_="stock")
    assert plan.achieved.sparsity > 0.05
    batch = inputs(model)
    with torch.no_grad():
        cut = forward(solpath.extract(model, plan), batch)
        found = forward(stock(model, plan, STOCK[label]), batch)
    # Rotary tables are computed in float32.
    assert (found - cut).abs().max() <= 1e-5 * cut.abs().max()


def test_the_command_line(tmp_path, capsys):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    config = solpath.SearchConfig(steps=3)
    solpath.search(model, batches(model), config, progress=False).save(tmp_path / "path")

    def asked(*options):
        words = ["plan", str(tmp_path / "path"), "--sparsity", "0.3", "--json", *options]
        assert run(words) == 0
        return json.loads(capsys.readouterr().out)

    found = asked("--multiple-of", "qk=2,mlp=8", "--uniform", "vo,mlp", "--min-width", "1")
    assert found["asked"]["multiple_of"] == {"qk": 2, "mlp": 8}
    assert found["asked"]["uniform"] == ["mlp", "vo"]
    assert found["asked"]["min_width"] == 1
    assert 0 < found["constraint_cost"]["kept_score"] < 1.1
    found = asked("--uniform", "all", "--tied-widths", "--shared-couples")
    assert found["asked"]["uniform"] is found["asked"]["tied_widths"] is True
    assert asked("--for", "stock")["asked"]["target"] == "stock"
    words = ["plan", str(tmp_path / "path"), "--sparsity", "0.3"]
    assert run([*words, "--multiple-of", "mlp=x"]) == 2
    assert "--multiple-of is a number, or as in qk=4,mlp=32" in capsys.readouterr().err
    assert run([*words, "--for", "stock"]) == 0
    assert "of the score" in capsys.readouterr().out
    words = ["inspect", str(tmp_path / "model"), "--targets"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stock"]["shared_couples"] is True
    assert all(target["whole_heads"] for target in found.values())
    assert run(words) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "shared_couples=True" in printed
    assert "wholeheads" in printed
