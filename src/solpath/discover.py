"""Find what can be pruned in a model, and take its fingerprint."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from solpath.arch import Architecture, lookup
from solpath.errors import UnsupportedModelError
from solpath.pair import Fingerprint, Kind, Pair, Side
from solpath.pretrained import Name, as_model

EXTRACTED = "solpath_plan"


def find_pairs(model: nn.Module | Name) -> tuple[Pair, ...]:
    """Every inner dimension of every attention head and every MLP neuron, block by block.

    Args:
        model: a transformers model, or its folder or hub id; it is only looked at, and weights
            are not read.

    Returns:
        Three pairs per block: ``qk``, ``vo``, ``mlp``.

    Raises:
        UnsupportedModelError: unknown ``config.model_type`` (the message lists the known ones),
            an already extracted model, a quantised or wrapped layer, or weights shared with
            another module.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...                     intermediate_size=64, vocab_size=50)
        >>> [(pair.kind, pair.heads, pair.width) for pair in find_pairs(BertModel(config))]
        [('qk', 2, 16), ('vo', 2, 16), ('mlp', 1, 64)]
    """
    model = as_model(model, device="meta")
    if hasattr(model, EXTRACTED):
        raise UnsupportedModelError(
            f"this {type(model).__name__} was already extracted ({getattr(model, EXTRACTED)!r}); "
            "plan every size from the dense model."
        )
    architecture = lookup(getattr(getattr(model, "config", None), "model_type", None))
    base = getattr(model, "base_model", model)
    [prefix] = [name for name, module in model.named_modules() if module is base]
    path = ".".join(filter(None, (prefix, architecture.blocks)))
    try:
        blocks = model.get_submodule(path)
    except AttributeError:
        blocks = None
    if not isinstance(blocks, nn.ModuleList):
        raise UnsupportedModelError(f"{type(model).__name__} has no list of blocks at {path!r}.")
    pairs = []
    for i in range(len(blocks)):
        pairs += _block_pairs(model, f"{path}.{i}", architecture)
    _check_not_shared(model, pairs)
    return tuple(pairs)


def _block_pairs(model: nn.Module, block: str, architecture: Architecture) -> list[Pair]:
    attention, mlp = architecture.attention, architecture.mlp
    config: Any = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    repeat, channels = heads // kv_heads, 2 if attention.rotary else 1

    def pair(name: str, kind: Kind, heads: int, left: tuple[Side, ...], right: Side) -> Pair:
        per_unit = channels if kind == "qk" else 1
        layer = _linear(model, left[0].module)
        width = layer.out_features // (heads * left[0].repeat * per_unit)
        cost = sum(_unit_cost(_linear(model, s.module), s) for s in (*left, right)) * per_unit
        return Pair(name, kind, heads, width, left, right, cost, per_unit)

    def side(module: str, axis: int, repeat: int = 1) -> Side:
        return Side(f"{block}.{module}", 0 if axis == 0 else 1, repeat)

    name = f"{block}.{attention.module.split('.')[0]}"
    return [
        pair(
            f"{name}.qk",
            "qk",
            kv_heads,
            (side(attention.query, 0, repeat),),
            side(attention.key, 0),
        ),
        pair(
            f"{name}.vo",
            "vo",
            kv_heads,
            (side(attention.value, 0),),
            side(attention.output, 1, repeat),
        ),
        pair(f"{block}.mlp", "mlp", 1, tuple(side(m, 0) for m in mlp.left), side(mlp.right, 1)),
    ]


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    if type(module) is not nn.Linear:
        raise UnsupportedModelError(
            f"{path} is a {type(module).__module__}.{type(module).__name__}, not a plain "
            "nn.Linear; prune before quantising, and merge adapters first."
        )
    return module


def _unit_cost(linear: nn.Linear, side: Side) -> int:
    if side.axis == 1:
        return side.repeat * linear.out_features
    return side.repeat * (linear.in_features + (linear.bias is not None))


def _check_not_shared(model: nn.Module, pairs: list[Pair]) -> None:
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    used = Counter(side.module for pair in pairs for side in pair.sides)
    for pair in pairs:
        for side in pair.sides:
            for name, parameter in model.get_submodule(side.module).named_parameters():
                if owners[id(parameter)] > used[side.module]:
                    raise UnsupportedModelError(
                        f"{side.module}.{name} is shared with another module; cutting one would "
                        "break the other. Give each its own copy first."
                    )


def fingerprint(model: nn.Module, pairs: tuple[Pair, ...]) -> Fingerprint:
    """Class and a digest of the weights of every pair."""

    def digest(pair: Pair) -> str:
        sha256 = hashlib.sha256()
        for side in pair.sides:
            for parameter in model.get_submodule(side.module).parameters():
                sha256.update(_bytes(parameter))
        return sha256.hexdigest()[:16]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing releases the GIL
        digests = pool.map(digest, pairs)
        return Fingerprint(
            type(model).__name__, {p.name: d for p, d in zip(pairs, digests, strict=True)}
        )


def _bytes(tensor: Tensor) -> Any:
    """The values of a tensor as a buffer of bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
