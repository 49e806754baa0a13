"""Trace an encoder-decoder in two halves: what a source is encoded to, and steps of the decoder."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from solpath.exporting.tracing import checked_batches, exported, traced_batch, tracing, twice
from solpath.running.forward import Batch

SELF = "cache.self_attention_cache."
CROSS = "cache.cross_attention_cache."
"""What the names of the caches' keys and values start with, in the graphs of both halves."""

_PAST, _NEW = 2, 3  # tokens of the decoder that it is traced with; lengths of 1 would be fixed
_PREFIX = "decoder_"


def translates(model: nn.Module, batch: Batch) -> bool:
    """Return whether a model is an encoder-decoder that generates, which is traced in two halves.

    Args:
        model: The model.
        batch: Inputs of it.
    """
    generates: Any = getattr(model, "can_generate", bool)
    config: Any = getattr(model, "config", None)
    both = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in batch
    return bool(both and generates())


class _Source(nn.Module):
    """The encoder, and the projections to the keys and values that the decoder attends to.

    They are asked for by a run of one token of the decoder, whose other results nothing needs, so
    that no graph has them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **source: Tensor) -> dict[str, Any]:
        samples = next(iter(source.values())).shape[0]
        ids = torch.zeros(samples, 1, dtype=torch.int64)
        outputs = self.model(**source, decoder_input_ids=ids, cache=_empty(), use_cache=True)
        cross = {"cross_attention_cache": outputs.cache.cross_attention_cache}
        return {"encoder_last_hidden_state": outputs.encoder_last_hidden_state, "cache": cross}


class _Steps(nn.Module):
    """The decoder, which reads the source from its cache alone.

    The model is given states of the source that are zeros, of which it takes no more than the
    shape: their keys and values are in the cache.
    """

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model, self.config, self.width = model, model.config, width

    def forward(self, cache: Any, **given: Tensor) -> dict[str, Any]:
        from transformers.modeling_outputs import BaseModelOutput

        keys = cache.cross_attention_cache.layers[0].keys
        states = BaseModelOutput(keys.new_zeros(keys.shape[0], keys.shape[2], self.width))
        outputs = self.model(**given, encoder_outputs=states, cache=cache, use_cache=True)
        own = {"self_attention_cache": outputs.cache.self_attention_cache}
        return {"logits": outputs.logits, "cache": own}


def trace_halves(exporter: Any, config: Any, model: Any, batch: Batch) -> tuple[Any, Any]:
    """Trace an encoder-decoder with an exporter of transformers.

    Args:
        exporter: The class of the exporter.
        config: The class of its configuration.
        model: The model, in eval mode. It is left untouched.
        batch: Inputs; see `translates`.

    Returns:
        transformers' ``ExportedModel`` of two graphs. The first makes, of a source, the states of
        the encoder and the cache of cross-attention. The second makes logits of new tokens, of that
        cache and of the cache of earlier tokens, which may be empty.

    Raises:
        ExportError: transformers or torch cannot trace the model.
    """
    full = twice(traced_batch(model, batch))
    takes = inspect.signature(model.forward).parameters
    source = {name: value for name, value in full.items() if not name.startswith(_PREFIX)}
    start = full["decoder_input_ids"][:, :1]
    with tracing(model):
        with torch.no_grad():
            past = start.repeat(1, _PAST)
            first = model(**source, decoder_input_ids=past, cache=_empty(), use_cache=True)
        width = first.encoder_last_hidden_state.shape[-1]
        step = {"decoder_input_ids": start.repeat(1, _NEW)}
        if "attention_mask" in source:
            step["attention_mask"] = source["attention_mask"]
        step |= {n: v for n, v in step_defaults(step, _PAST).items() if n in takes}
        caches = {"cache": first.cache}
        encoder = exported(exporter, config, _Source(model).eval(), source)
        decoder = exported(exporter, config, _Steps(model, width).eval(), step | caches)
    return encoder, decoder


def step_defaults(batch: Batch, past: int) -> dict[str, Tensor]:
    """Return what a decoder takes by default beside ids: a mask of ones, and positions that count.

    Args:
        batch: ``decoder_input_ids``, ``[batch, new tokens]``.
        past: Number of tokens before.
    """
    ids: Tensor = batch["decoder_input_ids"]
    samples, tokens = ids.shape
    return {
        "decoder_attention_mask": ids.new_ones(samples, past + tokens),
        "decoder_position_ids": torch.arange(past, past + tokens).repeat(samples, 1),
    }


def checked_halves(model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Batch]:
    """Return what the graphs of a model are run on, as `checked_batches`, with padded targets.

    Args:
        model: The model. If it is none that is traced in two halves, nothing is added.
        batches: ``"random"`` and perhaps ``"given"``.
    """
    found = checked_batches(model, batches)
    if translates(model, found["random"]):
        found = {n: b if n == "given" else _without_padding(model, b) for n, b in found.items()}
        found["padded targets"] = _padded_targets(found["one more sample"])
    return found


def _without_padding(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return a batch whose decoder ids are never that of padding, which M2M-100 does not count.

    Its positions after such an id depend on whether the id is in the cache.
    """
    config: Any = model.config
    ids: Tensor = batch["decoder_input_ids"]
    padding = getattr(config, "pad_token_id", None)
    if padding is None:
        return dict(batch)
    other = 1 if padding == 0 else 0
    return {**batch, "decoder_input_ids": ids.masked_fill(ids == padding, other)}


def _padded_targets(batch: Batch) -> dict[str, Tensor]:
    """Return a batch whose ids of the decoder have padding at their start, in all but one."""
    ids: Tensor = batch["decoder_input_ids"]
    samples, tokens = ids.shape
    gone = torch.arange(samples).clamp(max=tokens - 1).unsqueeze(1)
    return {**batch, "decoder_attention_mask": (torch.arange(tokens) >= gone).long()}


def _empty() -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())
