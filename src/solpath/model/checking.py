"""Check the table of an architecture: every kind of block, masked and cut, computes the same."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from solpath.arch import is_foreign, lookup, type_of
from solpath.errors import UnsupportedModelError
from solpath.model.cutting import cut_model
from solpath.model.discovery import Block, find_blocks
from solpath.model.masks import mask_hooks
from solpath.model.placed import copied
from solpath.pair import Pair
from solpath.planning.plan import Plan, best_units
from solpath.running.forward import Batch, device_of, run
from solpath.running.hooks import Hook, hooked
from solpath.running.modes import inferring, undoing

_BOUND = 1e-4  # of the largest value; float32 rounds at 1e-6, and wrong tables are off by 1e-2
_CACHES = ("cache", "past_key_values", "layer_past")  # what blocks call their cache
_CHECKED: set[tuple[Any, ...]] = set()


class _Call(NamedTuple):
    """What a block was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def check_table(model: nn.Module, batch: Batch) -> None:
    """Check that the table of an architecture is right for a model, and remember that it is.

    The model runs once on the batch. A copy of one block of every kind is then called as the model
    called it, with half of the units of each pair masked and with the same units cut, and the
    results are compared. Random weights of order one in the copies show settings, such as a bound
    of the logits, that small weights would hide.

    The first search and the first `extract` of a model whose table was registered from outside
    call this on their own: the search on its first batch, `extract` on tokens or pixels
    that it makes up.

    Args:
        model: The dense model. It is left as it was found.
        batch: A batch of the model. Blocks that it does not reach are not checked.

    Raises:
        UnsupportedModelError: Masked and cut blocks differ, or a block cannot run once it is cut.
            The message names the type of model, the block, the pair and the difference.

    Example:
        >>> solpath.check_table(model, batch)
    """
    blocks = find_blocks(model)
    _compare_all(model, blocks, _calls(model, blocks, batch))


def check_once(model: nn.Module, batch: Batch) -> None:
    """Do what `check_table` does, once for every kind of block.

    Args:
        model: The dense model.
        batch: A batch of the model.

    Raises:
        UnsupportedModelError: See `check_table`.
    """
    if blocks := _unchecked(model):
        _compare_all(model, blocks, _calls(model, blocks, batch))


def check_for_plan(model: nn.Module, plan: Plan) -> None:
    """Check a table that was registered, on inputs that are made up.

    Args:
        model: The dense model.
        plan: A plan of the model. Blocks that it leaves whole are not checked.

    Raises:
        UnsupportedModelError: See `check_table`. Or no input can be made up that reaches the
            blocks.
    """
    if not is_foreign(type_of(model)):
        return
    cut = {pair.name for pair in plan.pairs if plan.widths[pair.name] < pair.width}
    blocks = [block for block in _unchecked(model) if cut & {pair.name for pair in block.pairs}]
    if not blocks:
        return
    reasons = []
    for batch in _samples(model):
        try:
            calls = _calls(model, blocks, batch)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reasons.append(f"{'+'.join(batch)}: {error}")
            continue
        _compare_all(model, blocks, calls)
        if not (blocks := [block for block in blocks if _key(model, block) not in _CHECKED]):
            return
    raise UnsupportedModelError(
        f"the table of model_type {type_of(model)!r} was registered, and {blocks[0].path} could "
        f"not be checked: no input that was made up reaches it ({'; '.join(reasons) or 'none ran'}"
        "). Call solpath.check_table(model, batch) once, with a batch of yours."
    )


def _unchecked(model: nn.Module) -> list[Block]:
    return [block for block in find_blocks(model) if _key(model, block) not in _CHECKED]


def _key(model: nn.Module, block: Block) -> tuple[Any, ...]:
    """Return what two blocks have in common that compute alike, whatever their weights."""
    config: Any = getattr(model, "config", None)
    settings = config.to_json_string() if hasattr(config, "to_json_string") else ""
    kinds = tuple(
        (name, type(module), tuple(sorted(_plain(module).items())))
        for name, module in model.get_submodule(block.path).named_modules()
    )
    return lookup(type_of(model)), type(model), settings, kinds


def _plain(module: nn.Module) -> dict[str, str]:
    """Return the settings of a module, without its place among the blocks."""
    ignored = ("layer_idx", "training")
    simple = {name: value for name, value in vars(module).items() if name not in ignored}
    return {
        name: repr(value)
        for name, value in simple.items()
        if value is None or isinstance(value, bool | int | float | str)
    } | {name: str(tuple(p.shape)) for name, p in module.named_parameters(recurse=False)}


def _kinds(model: nn.Module, blocks: Sequence[Block]) -> dict[tuple[Any, ...], Block]:
    """Return the first block of every kind."""
    return {_key(model, block): block for block in reversed(blocks)}


def _calls(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> dict[str, _Call]:
    """Return what the first block of every kind is called with, by its path."""
    calls: dict[str, _Call] = {}

    def remember(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            device = device_of(module)
            calls.setdefault(path, _Call(_copied(args, device), _copied(kwargs, device)))

        return hook

    paths = [block.path for block in _kinds(model, blocks).values()]
    watched = [Hook(model.get_submodule(path), "call", remember(path)) for path in paths]
    with inferring(model), hooked(watched):
        run(model, batch, labels=False)
    return calls


def _compare_all(model: nn.Module, blocks: Sequence[Block], calls: Mapping[str, _Call]) -> None:
    with inferring(model):
        for key, block in _kinds(model, blocks).items():
            if block.path in calls:
                _compare(model, block, calls[block.path])
                _CHECKED.add(key)


def _compare(model: nn.Module, block: Block, call: _Call) -> None:
    """Raise if a block, masked and cut, does not compute the same."""
    module = model.get_submodule(block.path)
    shell = _shell(block.path, _randomised(module))
    choices = [(pair,) for pair in block.pairs]
    for chosen in [*choices, block.pairs] if len(choices) > 1 else choices:
        what = chosen[0].name if len(chosen) == 1 else f"all pairs of {block.path}"
        where = f"the table of model_type {type_of(model)!r} is wrong for {what}"
        where = f"{where} ({type(module).__name__})"
        kept = {pair.name: _half(pair, pair in chosen) for pair in block.pairs}
        masks = {
            pair.name: torch.zeros(pair.heads, pair.width).scatter_(1, kept[pair.name], 1.0)
            for pair in chosen
        }
        gains = {pair.name: torch.ones(pair.heads, pair.left[0].repeat) for pair in block.pairs}
        gains = {name: gain.double().to(device_of(module)) for name, gain in gains.items()}
        with mask_hooks(shell, block.pairs) as state:
            state.gains.update(gains)
            state.units.update(
                {name: mask.flatten().to(device_of(module)) for name, mask in masks.items()}
            )
            masked, settings, stored = _output(shell, block, call)
        try:
            small = cut_model(shell, block.pairs, block.sites, kept, gains)
            cut, given, kept_back = _output(small, block, call)
        except Exception as error:
            raise UnsupportedModelError(
                f"{where}: cut to half, it cannot run ({type(error).__name__}: {error})."
            ) from error
        for stock, slim in zip(settings, given, strict=True):
            if names := [n for n in {*stock, *slim} if not _equal(stock.get(n), slim.get(n))]:
                raise UnsupportedModelError(
                    f"{where}: its `forward` calls the attention function with {names[0]} = "
                    f"{slim.get(names[0])}, and the model's own with {stock.get(names[0])}."
                )
        if kept_back != stored:
            raise UnsupportedModelError(
                f"{where}: its `forward` leaves {kept_back} tokens in the cache, and the model's "
                f"own {stored}."
            )
        difference = (masked - cut).abs().max() / masked.abs().max()
        if not difference <= _BOUND:
            raise UnsupportedModelError(
                f"{where}: with half of its units removed, the masked block and the block that is "
                f"cut differ by {float(difference):.2g} of the largest value, and {_BOUND:g} is "
                "allowed; another `forward`, or other fields of the table, would be right."
            )


def _half(pair: Pair, halve: bool) -> Tensor:
    """Return half of the units of every head at random, or all."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(pair.heads, pair.width, generator=generator)
    return best_units(score, pair.width // 2 if halve else pair.width)


def _randomised(module: nn.Module) -> nn.Module:
    """Return a float32 copy of a block with weights of order one and without hooks."""
    block = copied(module, {}, device_of(module)).float().eval()
    generator = torch.Generator().manual_seed(0)
    for part in block.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    for parameter in block.parameters():
        scale = 2 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        drawn = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data.copy_(drawn)
    return block


def _shell(path: str, block: nn.Module) -> nn.Module:
    """Return a module that has nothing but `block`, at `path`."""
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, block)
        block = outer
    return block


def _output(
    shell: nn.Module, block: Block, call: _Call
) -> tuple[Tensor, list[dict[str, Any]], int]:
    """Return what a block returns, the settings of its attention functions, and tokens cached."""
    settings: list[dict[str, Any]] = []
    module, cache = shell.get_submodule(block.path), DynamicCache()
    device = device_of(module)
    args, kwargs = list(_copied(call.args, device)), _copied(call.kwargs, device)
    if any(site.table.cached for site in block.sites):
        cross = any(not site.table.cached for site in block.sites)
        given = EncoderDecoderCache(cache, DynamicCache()) if cross else cache
        kwargs |= {name: given for name in _CACHES if name in kwargs}
        names = list(inspect.signature(module.forward).parameters)
        for place, name in enumerate(names[: len(args)]):
            args[place] = given if name in _CACHES else args[place]
    with _recording(settings):
        found = module(*args, **kwargs)
    while not isinstance(found, Tensor):
        found = next(iter(found.values())) if isinstance(found, Mapping) else found[0]
    layers: Any = cache.layers
    return found, settings, sum(layer.get_seq_length() for layer in layers)


@contextmanager
def _recording(settings: list[dict[str, Any]]) -> Iterator[None]:
    """Note the settings of every call of an attention function of transformers in the block."""
    find = ALL_ATTENTION_FUNCTIONS.get_interface

    def get_interface(*names: Any) -> Any:
        function = find(*names)

        def call(module: Any, *tensors: Any, **kwargs: Any) -> Any:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            # The results show the scaling; what is false or 0 is as good as not given.
            given = {**kwargs, "is_causal": causal, "scaling": None}
            found = {n: v for n, v in given.items() if isinstance(v, Tensor) or v}
            settings.append(found)
            return function(module, *tensors, **kwargs)

        return call

    with undoing(lambda: vars(ALL_ATTENTION_FUNCTIONS).pop("get_interface", None)):
        vars(ALL_ATTENTION_FUNCTIONS)["get_interface"] = get_interface
        yield


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(one == other)


def _copied(value: Any, device: torch.device) -> Any:
    """Copy arguments to a device: numbers in float32, and no cache."""
    if isinstance(value, Tensor):
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return value.to(device, dtype, copy=True)
    if isinstance(value, Cache):
        return None
    if type(value) in (tuple, list):
        return type(value)(_copied(part, device) for part in value)
    if type(value) is dict:
        return {name: _copied(part, device) for name, part in value.items()}
    return value


def _vocabulary(model: nn.Module, config: Any) -> int:
    """Return how many tokens a model knows, or fewer; 0 if it has no embeddings."""
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    sizes = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    return int(getattr(text, "vocab_size", 0) or min(sizes, default=0))


def _samples(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return inputs that a model may take: tokens, pixels, or both."""
    parameters = inspect.signature(model.forward).parameters
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    text: dict[str, Tensor] = {}
    images: dict[str, Tensor] = {}
    size = _vocabulary(model, config)
    if "input_ids" in parameters and size:
        names = ["input_ids"] + ["decoder_input_ids"] * ("decoder_input_ids" in parameters)
        low, high = size // 4, max(size // 2, size // 4 + 1)  # special tokens are at the ends
        text = {name: torch.randint(low, high, (2, 12), generator=generator) for name in names}
    tower = getattr(config, "vision_config", config)
    side, channels = (getattr(tower, name, None) for name in ("image_size", "num_channels"))
    if "pixel_values" in parameters and isinstance(side, int) and isinstance(channels, int):
        images["pixel_values"] = torch.randn(2, channels, side, side, generator=generator)
        images["pixel_values"] = images["pixel_values"].to(next(model.parameters()).dtype)
    device = device_of(model)
    found = [text | images] * bool(text and images) + [text] * bool(text) + [images] * bool(images)
    return [{name: value.to(device) for name, value in batch.items()} for batch in found]
