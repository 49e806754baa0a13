"""Generate text with an encoder-decoder in ONNX or OpenVINO, by transformers' own `generate`."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from solpath.errors import ConfigError
from solpath.exporting import onnx_graphs, openvino_graphs
from solpath.exporting.decoder import Generates, add_states, states_of
from solpath.exporting.encoder_decoder import CROSS, SELF, step_defaults
from solpath.exporting.graphs import Runtime
from solpath.exporting.tracing import completed


class _Encoder(nn.Module):
    """The encoder of text or sound, as ``generate`` calls it."""

    def __init__(self, graph: Any) -> None:
        super().__init__()
        self._graph = graph
        self.main_input_name = graph.inputs[0]

    def forward(self, **kwargs: Any) -> BaseModelOutput:
        """Return the states of a source, and beside them the cache that the decoder reads."""
        if kwargs.get(self.main_input_name) is None:
            raise ConfigError(f"the graph of the encoder takes {self.main_input_name}; give that.")
        given = {name: value for name, value in kwargs.items() if value is not None}
        outputs, cross = self._graph(completed(self._graph.inputs, given))
        encoded = BaseModelOutput(last_hidden_state=outputs["encoder_last_hidden_state"])
        for name, states in cross.items():
            encoded[name] = states  # so that `generate` repeats them for beams, as the states
        return encoded


class _Seq2Seq(Generates):  # type: ignore[no-untyped-call]
    """An encoder-decoder whose graphs another runtime runs.

    Args:
        folder: A folder that `export` wrote from an encoder-decoder that generates.
        threads: Threads that each graph runs on; 0 lets the runtime choose.
    """

    runtime: Runtime

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0) -> None:
        super().__init__(folder)
        kind, right = self.config.model_type, self.runtime.class_of(self)
        if (kind == "whisper") != isinstance(self, _Whisper):
            raise ConfigError(f"{folder} holds a model of the type {kind}, which {right} runs.")
        halves = self.runtime.open_halves(Path(folder), threads)
        self.encoder = _Encoder(halves.encoder)
        self.main_input_name = self.encoder.main_input_name
        self._graph = halves.decoder

    @staticmethod
    def new_cache() -> EncoderDecoderCache:
        """Return a cache of no tokens of no source."""
        return EncoderDecoderCache(DynamicCache(), DynamicCache())

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """Return the logits of ids ``[batch, tokens]``, and the cache, which they are added to.

        Args:
            input_ids: The source, ``[batch, source tokens]``; or `input_features`. Neither is
                needed if there are `encoder_outputs`, or a cache that has tokens.
            input_features: Sound, ``[batch, bins, frames]``.
            attention_mask: Which tokens of the source count, ``[batch, source tokens]``.
            decoder_input_ids: New tokens, ``[batch, tokens]``.
            decoder_attention_mask: Which tokens count, with those in the cache.
            decoder_position_ids: Positions of the new tokens, where the model takes them.
            encoder_outputs: What `encoder` gave.
            cache: As an earlier call gave it.
            use_cache: Whether there is a cache; without one it is not read, either.
            kwargs: Ignored.

        Raises:
            ConfigError: There is no source, or `encoder_outputs` are those of another model.
        """
        if decoder_input_ids is None:
            raise ConfigError("give decoder_input_ids, or use generate.")
        cache = self.new_cache() if cache is None or use_cache is False else cache
        if not cache.cross_attention_cache.get_seq_length():
            if encoder_outputs is None:
                source = {"input_ids": input_ids, "input_features": input_features}
                encoder_outputs = self.encoder(**source, attention_mask=attention_mask)
            if not isinstance(encoder_outputs, BaseModelOutput) or len(encoder_outputs) < 2:
                raise ConfigError("encoder_outputs must be what the encoder of this folder gave.")
            add_states(cache.cross_attention_cache, encoder_outputs, CROSS)
        past = cache.get_seq_length()
        batch = {"decoder_input_ids": decoder_input_ids}
        batch |= step_defaults(batch, past)
        cross = states_of(cache.cross_attention_cache, CROSS)
        shown = cross[f"{CROSS}layers.0.keys"]
        masks = {"attention_mask": attention_mask, "decoder_attention_mask": decoder_attention_mask}
        batch["attention_mask"] = torch.ones(len(shown), shown.shape[2], dtype=torch.int64)
        batch |= {name: mask.long() for name, mask in masks.items() if mask is not None}
        if decoder_position_ids is not None:
            batch["decoder_position_ids"] = decoder_position_ids
        known = states_of(cache.self_attention_cache, SELF)
        outputs, whole = self._graph(batch, cross | known)
        add_states(cache.self_attention_cache, whole, SELF)
        kept = None if use_cache is False else cache
        return Seq2SeqLMOutput(logits=outputs["logits"], cache=kept)


class _Whisper(WhisperGenerationMixin, _Seq2Seq):  # type: ignore[no-untyped-call]
    """A Whisper whose graphs another runtime runs."""

    model = SimpleNamespace(  # all that `generate` reads of it
        encoder=SimpleNamespace(
            conv1=SimpleNamespace(stride=(1,)), conv2=SimpleNamespace(stride=(2,))
        )
    )

    def generate(  # type: ignore[override]
        self, input_features: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Generate as Whisper of transformers does.

        Raises:
            ConfigError: ``return_token_timestamps``, which need attentions.
        """
        if kwargs.get("return_token_timestamps"):
            raise ConfigError("the graphs give no attentions, which return_token_timestamps needs.")
        return super().generate(input_features, **kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return what `forward` takes; positions count what the decoder's mask counts."""
        mask = kwargs.get("decoder_attention_mask")
        if mask is not None and kwargs.get("decoder_position_ids") is None:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0) * mask.long()
            kwargs["decoder_position_ids"] = positions[:, -input_ids.shape[1] :]
        found: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return found


class OnnxSeq2Seq(_Seq2Seq):  # type: ignore[no-untyped-call]
    """An encoder-decoder in onnxruntime, with all that ``generate`` of transformers can do.

    ``OnnxSeq2Seq(folder).generate(input_ids, attention_mask=mask, max_new_tokens=16)``

    The encoder runs once for a source. Attentions and hidden states are not to be had.

    Args:
        folder: A folder that `export` wrote from an encoder-decoder that generates.
        threads: Threads that each graph runs on; 0 lets onnxruntime choose.

    Raises:
        ConfigError: The folder holds no encoder-decoder, or one of Whisper; see `OnnxWhisper`.
    """

    runtime = onnx_graphs.RUNTIME


class OnnxWhisper(_Whisper, OnnxSeq2Seq):  # type: ignore[no-untyped-call]
    """A Whisper in onnxruntime, with transformers' ``generate`` of Whisper: languages, long sounds.

    ``OnnxWhisper(folder).generate(input_features)``

    Args:
        folder: A folder that `export` wrote from a Whisper.
        threads: Threads that each graph runs on; 0 lets onnxruntime choose.

    Raises:
        ConfigError: The folder holds no Whisper.
    """


class OpenVinoSeq2Seq(_Seq2Seq):  # type: ignore[no-untyped-call]
    """An encoder-decoder in OpenVINO, with all that ``generate`` of transformers can do.

    ``OpenVinoSeq2Seq(folder).generate(input_ids, attention_mask=mask, max_new_tokens=16)``

    The encoder runs once for a source. Attentions and hidden states are not to be had.

    Args:
        folder: A folder that `export` wrote from an encoder-decoder that generates.
        threads: Threads that each graph runs on; 0 lets OpenVINO choose.

    Raises:
        ConfigError: The folder holds no encoder-decoder, or one of Whisper; see `OpenVinoWhisper`.
    """

    runtime = openvino_graphs.RUNTIME


class OpenVinoWhisper(_Whisper, OpenVinoSeq2Seq):  # type: ignore[no-untyped-call]
    """A Whisper in OpenVINO, with transformers' ``generate`` of Whisper: languages, long sounds.

    ``OpenVinoWhisper(folder).generate(input_features)``

    Args:
        folder: A folder that `export` wrote from a Whisper.
        threads: Threads that each graph runs on; 0 lets OpenVINO choose.

    Raises:
        ConfigError: The folder holds no Whisper.
    """
