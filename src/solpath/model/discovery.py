"""Find the pairs of a model: all inner dimensions that can be pruned."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from solpath.arch import UNSUITED, Attention, Experts, Mlp, Stack, is_foreign, lookup, type_of
from solpath.errors import UnsupportedModelError
from solpath.model.linear import linear_map
from solpath.model.plain import check_floats, check_forward, check_plain
from solpath.pair import Norm, Pair, Side
from solpath.planning.plan import plan_of
from solpath.pretrained import Name, as_model


@dataclass(frozen=True)
class Site:
    """One attention of a model, with its pairs.

    Attributes:
        path: Dotted path of the attention module in the model.
        model_type: The type of the model, under which its tables are listed.
        table: What the table of the architecture says about it.
        qk: Its query-key pair, unless that stays whole.
        vo: Its value-output pair.
        plain: The query-key pair of the channels that are not rotated, where only some are.
        keys: Channels of keys that stay whole and that generation caches, in all heads.
    """

    path: str
    model_type: str
    table: Attention
    qk: Pair | None
    vo: Pair
    plain: Pair | None = None
    keys: int = 0

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Its pairs, in the order of `find_pairs`."""
        return tuple(pair for pair in (self.qk, self.plain, self.vo) if pair is not None)


@dataclass(frozen=True)
class Block:
    """One block of a model, or one part of it that has a stack of its own.

    Attributes:
        path: Dotted path of the block in the model.
        sites: Its attentions.
        mlp: The pair of its MLP, or of the expert that all tokens share; None if it has neither.
        experts: The pair of its experts, if it has any.
    """

    path: str
    sites: tuple[Site, ...]
    mlp: Pair | None
    experts: Pair | None = None

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Its pairs, in the order of `find_pairs`."""
        inside = tuple(pair for site in self.sites for pair in site.pairs)
        return inside + tuple(pair for pair in (self.mlp, self.experts) if pair is not None)


def find_pairs(model: nn.Module | Name) -> tuple[Pair, ...]:
    """Return the pairs of a model, block by block.

    Args:
        model: A model of transformers or timm, or its folder or hub id. A model is only looked at;
            from a folder or an id it is built without reading its weights.

    Returns:
        For every block, the ``qk`` and ``vo`` pairs of its attentions, then its ``mlp`` pair, then
        that of its ``experts``. docs/your-model-and-data.md lists what stays whole in which
        architecture.

    Raises:
        UnsupportedModelError: The type of model is unknown (the message lists the known ones), the
            blocks are not as the table of the architecture says, the model was already extracted,
            or a layer is quantised, wrapped, pruned or normed by torch, hooked, or shares its
            weights with another module (the message says what to call first).
        FileError: A folder or id was given and cannot be read; see `from_pretrained`.
        ConfigError: The model needs timm, which is not installed, or asks timm for more than a
            model; see `from_pretrained`.

    Example:
        >>> [(pair.kind, pair.heads, pair.width) for pair in solpath.find_pairs(model)[:3]]
        [('qk', 4, 8), ('vo', 4, 8), ('mlp', 1, 64)]
    """
    return survey(as_model(model, device="meta"))[0]


def survey(model: nn.Module) -> tuple[tuple[Pair, ...], tuple[Site, ...]]:
    """Return the pairs of a model, as `find_pairs` does, and its attentions, in one walk."""
    found = find_blocks(model)
    return _pairs(found), tuple(site for block in found for site in block.sites)


def _pairs(found: Iterable[Block]) -> tuple[Pair, ...]:
    return tuple(pair for block in found for pair in block.pairs)


def find_blocks(model: nn.Module, *, checked: bool = False) -> tuple[Block, ...]:
    """Return the blocks of a model with their pairs, in the order of `find_pairs`.

    Args:
        model: The dense model.
        checked: Whether its layers were found to be plain before it was masked or hooked.

    Raises:
        UnsupportedModelError: See `find_pairs`.
    """
    plan = plan_of(model)
    if plan is not None:
        raise UnsupportedModelError(
            f"this {type(model).__name__} was already extracted ({plan!r}); "
            "plan every size from the dense model."
        )
    if reason := UNSUITED.get(type(model).__name__):
        raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {reason}.")
    stacks = lookup(type_of(model))
    if not checked:
        check_floats(model)
    base = getattr(model, "base_model", model)
    [prefix] = [name for name, module in model.named_modules() if module is base]
    found = tuple(
        Block(
            path,
            tuple(_site(model, path, table, checked) for table in stack.attentions),
            _mlp(model, path, stack),
            _experts(model, path, stack, checked),
        )
        for stack in stacks
        for path in _blocks(model, ".".join(filter(None, (prefix, stack.blocks))))
    )
    if not found:
        paths = ", ".join(stack.blocks for stack in stacks)
        raise UnsupportedModelError(f"{type(model).__name__} has no blocks at {paths}.")
    if not checked:
        check_plain(model, _pairs(found))
    return found


def _blocks(model: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of the blocks that `path` leads to, where ``*`` stands for any index.

    Nothing is yielded if `model` has no module there.
    """
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


def _site(model: nn.Module, block: str, table: Attention, checked: bool) -> Site:
    path = f"{block}.{table.module}"
    if not _has(model, path):
        kind = type(model.get_submodule(block)).__name__
        raise UnsupportedModelError(f"{block} is a {kind} without {table.module}.")
    module: Any = model.get_submodule(path)
    kind = type_of(model)
    if table.kind not in ("", type(module).__name__):
        raise UnsupportedModelError(f"{path} is a {type(module).__name__}, not a {table.kind}.")
    if table.forward is not None and not checked:
        check_forward(module, path, registered=is_foreign(kind))
    _check_identity(model, path, table.identity)
    _check_unset(module, path, table.unset)
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
    width = widths["query"]
    rotated = table.rotated(module) if table.rotated else width
    if rotated % channels:
        raise UnsupportedModelError(f"{path} has heads of an odd width and rotates couples.")
    before = width if fused else 0  # channels per head in a fused layer, for the offsets
    step = width if rotated < width or table.by_group else 0
    if table.by_group:
        pitch, places = (repeat + 2) * width, (0, repeat * width, (repeat + 1) * width)
    else:
        pitch, places = 0, (0, heads * before, (heads + kv_heads) * before)
    query = Side(paths["query"], 0, repeat, places[0], step, pitch)
    key = Side(paths["key"], 0, 1, places[1], step, pitch)
    value = Side(paths["value"], 0, 1, places[2], 0, pitch)
    output = Side(f"{block}.{table.output}", 1, repeat)
    name = f"{block}.{table.name}"
    qk = Pair(
        name=f"{name}.qk",
        kind="qk",
        heads=kv_heads,
        width=rotated // channels,
        left=(query,),
        right=key,
        cost=channels * _unit_cost(model, query, key),
        channels=channels,
        cache=channels * table.cached,
        norms=tuple(Norm(f"{block}.{norm}", table.norm_dim) for norm in table.norms),
        interleaved=table.interleaved,
    )
    plain = Pair(
        name=f"{name}.unrotated.qk",
        kind="qk",
        heads=kv_heads,
        width=width - rotated,
        left=(replace(query, offset=query.offset + rotated),),
        right=replace(key, offset=key.offset + rotated),
        cost=_unit_cost(model, query, key),
        cache=int(table.cached),
    )
    vo = Pair(
        name=f"{name}.vo",
        kind="vo",
        heads=kv_heads,
        width=widths["value"],
        left=(value,),
        right=output,
        cost=_unit_cost(model, value, output),
        cache=int(table.cached),
    )
    if not table.qk:
        return Site(path, kind, table, None, vo, keys=kv_heads * widths["key"] * table.cached)
    return Site(path, kind, table, qk, vo, plain if plain.width else None)


def _mlp(model: nn.Module, block: str, stack: Stack) -> Pair | None:
    def exists(mlp: Mlp) -> bool:
        return all(_has(model, f"{block}.{layer}") for layer in (*mlp.left, mlp.right))

    forms = [mlp for mlp in stack.mlps if exists(mlp)]
    forms = [mlp for mlp in forms if not any({*mlp.left} < {*other.left} for other in forms)]
    if not forms and any(_has(model, f"{block}.{experts.module}") for experts in stack.experts):
        return None
    if len(forms) != 1:
        names = " or ".join("+".join((*mlp.left, mlp.right)) for mlp in stack.mlps)
        raise UnsupportedModelError(f"{block} has {len(forms)} MLPs of the form {names}, not 1.")
    [form] = forms
    right = Side(f"{block}.{form.right}", 1)
    _check_identity(model, block, form.identity)
    width = linear_map(model, right.module).in_features
    left = tuple(
        Side(f"{block}.{layer}", 0, 1, width * form.left[:i].count(layer))
        for i, layer in enumerate(form.left)
    )
    for layer, parts in Counter(side.module for side in left).items():
        outputs = linear_map(model, layer).out_features
        if outputs != parts * width:
            raise UnsupportedModelError(
                f"{layer} has {outputs} outputs for the {width} inputs of {right.module}."
            )
    return Pair(f"{block}.mlp", "mlp", 1, width, left, right, _unit_cost(model, *left, right))


def _experts(model: nn.Module, block: str, stack: Stack, checked: bool) -> Pair | None:
    forms = [table for table in stack.experts if _has(model, f"{block}.{table.module}")]
    if not forms:
        return None
    [table] = forms
    path = f"{block}.{table.module}"
    module: Any = model.get_submodule(path)
    if not checked:
        _check_experts(model, path, module, table)
    right = Side(f"{path}.down_proj", 1)
    linear = linear_map(model, right.module)
    experts, width = len(linear.weight), linear.weight.shape[linear.dim(1)]
    apart, stride = (width, 1) if module.is_concatenated else (1, 2)
    gate = Side(f"{path}.gate_up_proj", 0, pitch=2 * width, stride=stride)
    left = gate, replace(gate, offset=apart)
    outputs = linear_map(model, gate.module).out_features
    if outputs != 2 * experts * width:
        raise UnsupportedModelError(
            f"{gate.module} has {outputs} outputs for the {experts * width} inputs of "
            f"{right.module}."
        )
    cost = _unit_cost(model, *left, right)
    return Pair(f"{block}.experts", "experts", experts, width, left, right, cost)


def _check_experts(model: nn.Module, path: str, module: Any, table: Experts) -> None:
    """Refuse experts that compute something else than their table knows."""
    kind = type(module).__name__
    if kind != table.kind and not parametrize.is_parametrized(module):  # `linear_map` refuses that
        raise UnsupportedModelError(
            f"{path} is a {kind}, not a {table.kind}; prune before quantising, and merge adapters "
            "first."
        )
    check_forward(module, path, registered=is_foreign(type_of(model)))
    _check_unset(module, path, ("_is_expert_parallel",))


def _check_identity(model: nn.Module, parent: str, names: tuple[str, ...]) -> None:
    for path in (f"{parent}.{name}" for name in names):
        if _has(model, path) and not isinstance(model.get_submodule(path), nn.Identity):
            kind = type(model.get_submodule(path)).__name__
            raise UnsupportedModelError(
                f"{path} is a {kind}, which cutting would change; only models without it work."
            )


def _check_unset(module: nn.Module, path: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = attrgetter(name)(module)
        if value:
            raise UnsupportedModelError(
                f"{path} has {name} = {value!r}, which cutting would change; only models without "
                "it work."
            )


def _unit_cost(model: nn.Module, *sides: Side) -> int:
    """Count the parameters that leave with one channel of a head, in all `sides` together."""
    cost = 0
    for side in sides:
        linear = linear_map(model, side.module)
        if side.axis == 0:
            cost += side.repeat * (linear.in_features + (linear.bias is not None))
        else:
            cost += side.repeat * linear.out_features
    return cost
