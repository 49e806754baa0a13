"""Measure what decoders cost while they generate: first token, tokens per second, and cache."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, StoppingCriteria, StoppingCriteriaList

from solpath.data.source import batch_size
from solpath.errors import BatchError, ConfigError, UnsupportedModelError
from solpath.measuring.timing import gpus_in_use, in_turns, interquartile_range, moment
from solpath.positions import most_tokens
from solpath.running.modes import undoing

_WARM_UP = 1  # a generation runs the model once per token already
_PROMPTS = ("input_ids", "inputs_embeds")
_FORWARD_ONLY = ("labels", "use_cache", "decoder_attention_mask", "decoder_position_ids")


@dataclass(frozen=True)
class Decoding:
    """How fast a model generates.

    Attributes:
        ttft_ms: Median milliseconds from the call to the first new token of all samples.
        ttft_iqr_ms: Interquartile range of these milliseconds.
        tokens_per_s: Median of the new tokens per second after the first one, all samples together.
        tokens_per_s_iqr: Interquartile range of these rates.
    """

    ttft_ms: float
    ttft_iqr_ms: float
    tokens_per_s: float
    tokens_per_s_iqr: float


@dataclass(frozen=True)
class Generation:
    """What one model costs while it generates after one batch of prompts.

    Attributes:
        cached: How fast it is with its key-value cache.
        uncached: How fast it is when every token runs the whole text again.
        cache_bytes: Bytes of the keys and values in its cache at the end, of all samples. The last
            token is not in it; a layer with a sliding window holds one token less than its window
            at most. What a decoder keeps of its encoder's output counts.
        cache_tokens: Number of tokens of a sample that the cache has seen.
        prompt: Number of tokens of a prompt, padding among them.
        tokens: Number of new tokens of every sample.
    """

    cached: Decoding
    uncached: Decoding
    cache_bytes: int
    cache_tokens: int
    prompt: int
    tokens: int


def check_generates(model: nn.Module, batch: Any, tokens: int, *, name: str) -> None:
    """Raise unless a model can generate some tokens after a batch.

    Args:
        model: The model, without wrappers. It is only looked at.
        batch: The batch.
        tokens: Number of new tokens.
        name: What messages call the model.

    Raises:
        UnsupportedModelError: The model cannot generate text.
        BatchError: The batch is no mapping with prompts.
        ConfigError: Prompt and new tokens are more than the model has positions, or a decoder has
            no token to start with.
    """
    kind = type(model).__name__
    generates: Any = getattr(model, "can_generate", bool)
    if not isinstance(model, GenerationMixin) or not generates():
        raise UnsupportedModelError(
            f"{name}: a {kind} cannot generate text; load it with a class that has a "
            "language-modelling head, such as AutoModelForCausalLM, or ask for no new tokens."
        )
    if not isinstance(batch, Mapping):
        raise BatchError(f"{name}: to generate, give a batch as a dict, with input_ids in it.")
    config: Any = model.config
    start = _start_token(model)
    if config.is_encoder_decoder and start is None:
        raise ConfigError(
            f"{name}: this {kind} has no token to start with; set "
            "model.generation_config.decoder_start_token_id."
        )
    limit = most_tokens(model, decoder=True)
    prompt = prompt_tokens(model, batch)
    if limit is not None and prompt + tokens > limit:
        raise ConfigError(
            f"{name}: a prompt of {prompt} tokens and {tokens} new ones are {prompt + tokens}, but "
            f"this {kind} has {limit} positions; generate at most {max(limit - prompt, 0)} tokens "
            "or shorten the prompt."
        )


def prompt_tokens(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Return how many tokens stand before the first new one, padding among them.

    Args:
        model: A model that generates. A decoder after an encoder begins with one token.
        batch: The batch.

    Raises:
        BatchError: The batch has no prompts.
    """
    config: Any = model.config
    if config.is_encoder_decoder:
        return 1
    for name in _PROMPTS:
        if isinstance(batch.get(name), Tensor):
            return int(batch[name].shape[1])
    raise BatchError(f"{type(model).__name__} generates after input_ids, which the batch lacks.")


def generations(
    models: Mapping[str, nn.Module], batch: Mapping[str, Any], tokens: int, *, repeats: int
) -> dict[str, Generation]:
    """Measure how models generate after one batch, in turns, with and without their caches.

    Args:
        models: Name to model, checked by `check_generates`, in eval mode.
        batch: The batch, on the models' device.
        tokens: Number of new tokens of every sample, at least 2.
        repeats: Timed generations of each model in each way.

    Returns:
        Name to what was measured.

    Raises:
        UnsupportedModelError: A model keeps no key-value cache.
    """
    gpus, samples = gpus_in_use(), batch_size(batch)

    def timed(model: nn.Module, cached: bool) -> Callable[[], tuple[float, float]]:
        def call() -> tuple[float, float]:
            clock = _Clock(gpus)
            start = moment(gpus)
            greedy(model, batch, tokens, cached=cached, watch=[clock])
            first, last = clock.moments[0], clock.moments[tokens - 1]
            return first - start, samples * (tokens - 1) / (last - first)

        return call

    ways = {f"{name} {c}": timed(m, c) for name, m in models.items() for c in (True, False)}
    found = in_turns(ways, repeats=repeats, warm_up=_WARM_UP)
    result = {}
    for name, model in models.items():
        cache = greedy(model, batch, tokens, cached=True).cache
        prompt = prompt_tokens(model, batch)
        result[name] = Generation(
            cached=_decoding(found[f"{name} True"]),
            uncached=_decoding(found[f"{name} False"]),
            cache_bytes=sum(tensor.nbytes for tensor in cached_tensors(cache)),
            cache_tokens=prompt + tokens - 1,
            prompt=prompt,
            tokens=tokens,
        )
    return result


@dataclass(frozen=True)
class Text:
    """What a model generated.

    Attributes:
        new: The new tokens, ``[samples, tokens]``.
        cache: The cache of transformers at the end; None without one.
    """

    new: Tensor
    cache: Any


def greedy(
    model: nn.Module,
    batch: Mapping[str, Any],
    tokens: int,
    *,
    cached: bool = True,
    watch: Sequence[StoppingCriteria] = (),
) -> Text:
    """Let a model generate the likeliest next token again and again, past any end of text.

    What the model's own generation configuration asks for (sampling, beams, penalties, an end) is
    left out, so that models do the same work. Decoder inputs of the batch are left out too: a
    decoder after an encoder begins with its start token.

    Args:
        model: The model, checked by `check_generates`, in eval mode.
        batch: The batch, on the model's device. Of a model without encoder, prompts of different
            lengths must be padded on the left.
        tokens: Number of new tokens.
        cached: Whether the model keeps keys and values of earlier tokens.
        watch: Called after every new token.

    Raises:
        UnsupportedModelError: The model keeps no key-value cache although it should.
    """
    model_: Any = model
    inputs = {
        name: value
        for name, value in batch.items()
        if name not in _FORWARD_ONLY and not name.startswith("decoder_input")
    }
    with _plain_generation(model):
        found = GenerationMixin.generate(  # Whisper's own cuts the sound into pieces
            model_,
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=tokens,
            use_cache=cached,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList(watch),
        )
    # The name before transformers 5.24 was `past_key_values`.
    cache = found.get("cache", found.get("past_key_values")) if cached else None
    if cached and not any(True for _ in cached_tensors(cache)):
        raise UnsupportedModelError(f"{type(model).__name__} keeps no key-value cache.")
    return Text(found.sequences[:, -tokens:], cache)


def cached_tensors(cache: Any) -> Iterator[Tensor]:
    """Yield the keys and values of every layer of a cache of transformers, or nothing of None.

    Args:
        cache: The cache. That of a decoder after an encoder holds one for each.
    """
    parts = [getattr(cache, f"{part}_attention_cache", None) for part in ("self", "cross")]
    for part in [part for part in parts if part is not None] or [cache]:
        for layer in getattr(part, "layers", ()):
            held = (getattr(layer, name, None) for name in ("keys", "values"))
            yield from (states for states in held if isinstance(states, Tensor))


class _Clock(StoppingCriteria):
    """Notes the moment of every new token, and stops nothing."""

    def __init__(self, gpus: list[int]) -> None:
        self.moments: list[float] = []
        self._gpus = gpus

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.moments.append(moment(self._gpus))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Give a model a generation configuration that asks for nothing; its own comes back."""
    own = model.generation_config

    def restore() -> None:
        model.generation_config = own

    with undoing(restore):
        plain = GenerationConfig(decoder_start_token_id=_start_token(model))  # type: ignore[no-untyped-call]
        model.generation_config = plain
        yield


def _start_token(model: Any) -> Any:
    """Return the token that a decoder after an encoder begins with; None if it is not known."""
    for holder in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if getattr(holder, name, None) is not None:
                return getattr(holder, name)
    return None


def _decoding(found: list[tuple[float, float]]) -> Decoding:
    seconds, rates = [first for first, _ in found], [rate for _, rate in found]
    return Decoding(
        ttft_ms=1e3 * statistics.median(seconds),
        ttft_iqr_ms=1e3 * interquartile_range(seconds),
        tokens_per_s=statistics.median(rates),
        tokens_per_s_iqr=interquartile_range(rates),
    )
