"""Find what can be pruned in a model."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn

from solpath.arch import Attention, Mlp, Stack, lookup, type_of
from solpath.errors import UnsupportedModelError
from solpath.model.linear import linear_map
from solpath.pair import Norm, Pair, Side
from solpath.planning.plan import plan_of
from solpath.pretrained import Name, as_model


@dataclass(frozen=True)
class Site:
    """One attention of a model.

    Attributes:
        path: of its module in the model.
        table: what is known of it.
        qk, vo: its pairs.
    """

    path: str
    table: Attention
    qk: Pair
    vo: Pair


def find_pairs(model: nn.Module | Name) -> tuple[Pair, ...]:
    """Every inner dimension of every attention head and every MLP neuron, block by block.

    Args:
        model: a model of transformers or timm, or its folder or hub id; it is only looked at, and
            weights are not read.

    Returns:
        Per block the ``qk`` and ``vo`` pairs of its attentions, then the ``mlp`` pair.

    Raises:
        UnsupportedModelError: unknown type of model (the message lists the known ones), blocks of
            another form than the table's, an already extracted model, a quantised or wrapped layer,
            or weights shared with another module.
        FileError, ConfigError: by name: see `from_pretrained`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=64, vocab_size=50)
        >>> [(pair.kind, pair.heads, pair.width) for pair in find_pairs(BertModel(config))]
        [('qk', 2, 16), ('vo', 2, 16), ('mlp', 1, 64)]
    """
    return survey(as_model(model, device="meta"))[0]


def survey(model: nn.Module) -> tuple[tuple[Pair, ...], tuple[Site, ...]]:
    """The pairs of a model, see `find_pairs`, and its attentions, found in one walk."""
    found = _find(model)
    return _pairs(found), tuple(part for part in found if isinstance(part, Site))


def _pairs(found: list[Site | Pair]) -> tuple[Pair, ...]:
    return tuple(
        pair
        for part in found
        for pair in ((part.qk, part.vo) if isinstance(part, Site) else (part,))
    )


def _find(model: nn.Module) -> list[Site | Pair]:
    """Attentions and MLP pairs, in the order of `find_pairs`."""
    plan = plan_of(model)
    if plan is not None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was already extracted ({plan!r}); "
            "plan every size from the dense model."
        )
    stacks = lookup(type_of(model))
    base = getattr(model, "base_model", model)
    [prefix] = [name for name, module in model.named_modules() if module is base]
    found: list[Site | Pair] = []
    for stack in stacks:
        for block in _blocks(model, ".".join(filter(None, (prefix, stack.blocks)))):
            found += [_site(model, block, table) for table in stack.attentions]
            found.append(_mlp(model, block, stack))
    if not found:
        paths = ", ".join(stack.blocks for stack in stacks)
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks at {paths}.")
    _check_not_shared(model, _pairs(found))
    return found


def _blocks(model: nn.Module, path: str) -> Iterator[str]:
    """Paths of the blocks that `path`, with ``*`` for any index, leads to; none if it is absent."""
    head, star, rest = path.partition(".*")
    if not _has(model, head):
        return
    module = model.get_submodule(head)
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        yield head
        return
    for i in range(len(module)):
        if star:
            yield from _blocks(model, f"{head}.{i}{rest}")
        else:
            yield f"{head}.{i}"


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _site(model: nn.Module, block: str, table: Attention) -> Site:
    path = f"{block}.{table.module}"
    if not _has(model, path):
        kind = type(model.get_submodule(block)).__name__
        raise UnsupportedModelError(f"{block} is a {kind} without {table.module}.")
    module: Any = model.get_submodule(path)
    if table.kind not in ("", type(module).__name__):
        raise UnsupportedModelError(f"{path} is a {type(module).__name__}, not a {table.kind}.")
    _check_identity(model, path, table.identity)
    heads = attrgetter(table.heads)(module)
    kv_heads = attrgetter(table.kv_heads)(module) if table.kv_heads else heads
    repeat, channels = heads // kv_heads, 2 if table.rotary else 1
    paths = {name: f"{block}.{getattr(table, name)}" for name in ("query", "key", "value")}
    layers = {name: linear_map(model, layer) for name, layer in paths.items()}
    fused = len(set(paths.values())) == 1
    if fused:
        width = layers["query"].out_features // (heads + 2 * kv_heads)
        widths = dict.fromkeys(paths, width)
    else:
        counts = {"query": heads, "key": kv_heads, "value": kv_heads}
        widths = {name: layers[name].out_features // counts[name] for name in paths}
    before = widths["query"] if fused else 0  # channels that every head before takes in the layer
    query = Side(paths["query"], 0, repeat)
    key = Side(paths["key"], 0, 1, heads * before)
    value = Side(paths["value"], 0, 1, (heads + kv_heads) * before)
    output = Side(f"{block}.{table.output}", 1, repeat)
    name = f"{block}.{table.name}"
    return Site(
        path=path,
        table=table,
        qk=Pair(
            name=f"{name}.qk",
            kind="qk",
            heads=kv_heads,
            width=widths["query"] // channels,
            left=(query,),
            right=key,
            cost=channels * _unit_cost(model, query, key),
            channels=channels,
            cache=channels * table.cached,
            norms=tuple(Norm(f"{block}.{norm}", table.norm_dim) for norm in table.norms),
        ),
        vo=Pair(
            name=f"{name}.vo",
            kind="vo",
            heads=kv_heads,
            width=widths["value"],
            left=(value,),
            right=output,
            cost=_unit_cost(model, value, output),
            cache=int(table.cached),
        ),
    )


def _mlp(model: nn.Module, block: str, stack: Stack) -> Pair:
    def exists(mlp: Mlp) -> bool:
        return all(_has(model, f"{block}.{layer}") for layer in (*mlp.left, mlp.right))

    forms = [mlp for mlp in stack.mlps if exists(mlp)]
    if len(forms) != 1:
        names = " or ".join("+".join((*mlp.left, mlp.right)) for mlp in stack.mlps)
        raise UnsupportedModelError(f"{block} has {len(forms)} MLPs of the form {names}, not 1.")
    [form] = forms
    left = tuple(Side(f"{block}.{layer}", 0) for layer in form.left)
    right = Side(f"{block}.{form.right}", 1)
    _check_identity(model, block, form.identity)
    width = linear_map(model, right.module).in_features
    for side in left:
        outputs = linear_map(model, side.module).out_features
        if outputs != width:
            raise UnsupportedModelError(
                f"{side.module} has {outputs} outputs for the {width} inputs of {right.module}."
            )
    return Pair(f"{block}.mlp", "mlp", 1, width, left, right, _unit_cost(model, *left, right))


def _check_identity(model: nn.Module, parent: str, names: tuple[str, ...]) -> None:
    for path in (f"{parent}.{name}" for name in names):
        if _has(model, path) and not isinstance(model.get_submodule(path), nn.Identity):
            kind = type(model.get_submodule(path)).__name__
            raise UnsupportedModelError(
                f"{path} is a {kind}, which cutting would change; only models without it work."
            )


def _unit_cost(model: nn.Module, *sides: Side) -> int:
    """Parameters that go with one channel of a head, in all `sides` together."""
    cost = 0
    for side in sides:
        linear = linear_map(model, side.module)
        if side.axis == 0:
            cost += side.repeat * (linear.in_features + (linear.bias is not None))
        else:
            cost += side.repeat * linear.out_features
    return cost


def _check_not_shared(model: nn.Module, pairs: tuple[Pair, ...]) -> None:
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for path in {side.module for pair in pairs for side in pair.sides}:
        for name, parameter in linear_map(model, path).parameters().items():
            if owners[id(parameter)] > 1:
                raise UnsupportedModelError(
                    f"{path}.{name} is shared with another module; cutting one would "
                    "break the other. Give each its own copy first."
                )
