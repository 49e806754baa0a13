"""Generate text with a decoder in ONNX or OpenVINO, by transformers' own `generate`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import GENERATION_CONFIG_NAME

from solpath.errors import ConfigError
from solpath.exporting import onnx_graphs, openvino_graphs
from solpath.exporting.formats import Outputs
from solpath.exporting.graphs import Runtime
from solpath.exporting.tracing import completed
from solpath.running.forward import Batch


class Generates(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A model of text whose graphs another runtime runs.

    Args:
        folder: A folder that `export` wrote.
    """

    new_cache: Callable[[], Any] = DynamicCache

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        if (Path(folder) / GENERATION_CONFIG_NAME).exists():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says which device

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as ``generate`` of transformers does, with a cache that keeps all tokens."""
        kwargs.setdefault("cache", self.new_cache())  # windows are in the graph's mask
        return super().generate(inputs, **kwargs)


class _Decoder(Generates):  # type: ignore[no-untyped-call]
    """A decoder of text whose graph another runtime runs.

    Args:
        folder: A folder that `export` wrote from a decoder.
        threads: Threads that it runs on; 0 lets the runtime choose.
    """

    main_input_name = "input_ids"
    runtime: Runtime

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0) -> None:
        super().__init__(folder)
        if self.runtime.holds_halves(Path(folder)):
            right = self.runtime.class_of(self)
            raise ConfigError(f"{folder} holds no decoder alone: {right} runs it.")
        self._graph: Any = self.runtime.graph(Path(folder) / self.runtime.file, threads)
        if not self._graph.cached:
            raise ConfigError(f"{folder} holds no decoder: its graph takes no cache.")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of ids ``[batch, tokens]``, and the cache, which they are added to.

        Without ``use_cache`` there is none, whatever is given.
        """
        cache = self.new_cache() if cache is None or use_cache is False else cache
        tokens = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), cache.get_seq_length() + tokens)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        batch = completed(["position_ids"], given)
        batch["position_ids"] = batch["position_ids"][:, -tokens:]
        if position_ids is not None:
            batch["position_ids"] = position_ids
        outputs = self._run(batch, cache)
        kept = None if use_cache is False else cache
        return CausalLMOutputWithPast(logits=outputs["logits"], cache=kept)

    def _run(self, batch: Batch, cache: Any) -> Outputs:
        """Run the graph after what is in the cache, and add its tokens to it."""
        raise NotImplementedError


class OnnxDecoder(_Decoder):  # type: ignore[no-untyped-call]
    """A decoder of text in onnxruntime, with all that ``generate`` of transformers can do.

    ``OnnxDecoder(folder).generate(input_ids, attention_mask=mask, max_new_tokens=16)``

    Args:
        folder: A folder that `export` wrote from a decoder.
        threads: Threads that it runs on; 0 lets onnxruntime choose.

    Raises:
        ConfigError: The folder holds no decoder.
    """

    runtime = onnx_graphs.RUNTIME

    def _run(self, batch: Batch, cache: Any) -> Outputs:
        outputs, whole = self._graph(batch, states_of(cache, "cache."))
        add_states(cache, whole, "cache.")
        found: Outputs = outputs
        return found


def states_of(cache: DynamicCache, start: str) -> dict[str, Tensor]:
    """Return the keys and values of a cache as a graph names them."""
    if not cache.get_seq_length():
        return {}
    return {
        f"{start}layers.{i}.{kind}": getattr(layer, kind)
        for i, layer in enumerate(cache.layers)
        for kind in ("keys", "values")
    }


def add_states(cache: DynamicCache, whole: Mapping[str, Tensor], start: str) -> None:
    """Add to a cache what a graph's cache has more."""
    known, i = cache.get_seq_length(), 0
    while f"{start}layers.{i}.keys" in whole:
        keys, values = (whole[f"{start}layers.{i}.{kind}"] for kind in ("keys", "values"))
        cache.update(keys[:, :, known:], values[:, :, known:], i)
        i += 1


class KeptCache(DynamicCache):
    """What ``generate`` sees of a cache that a graph keeps to itself: its length and its order.

    It can only grow and be reordered, so ways to generate that take tokens back raise an error.

    Attributes:
        tokens: Number of tokens in it.
        order: Which sample each one goes on from, ``[batch]``; None if each goes on from itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.order: Tensor | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens."""
        return self.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let samples go on from others."""
        self.order = beam_idx if self.order is None else self.order[beam_idx]

    def _refused(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(
            "the graph of OpenVINO keeps its cache, from which no token can be taken back; "
            "generate greedily, by sampling or by beams, or export to onnx."
        )

    crop = batch_repeat_interleave = batch_select_indices = _refused


class OpenVinoDecoder(_Decoder):  # type: ignore[no-untyped-call]
    """A decoder of text in OpenVINO, which generates greedily, by sampling and by beams.

    ``OpenVinoDecoder(folder).generate(input_ids, attention_mask=mask, max_new_tokens=16)``

    The graph holds one cache: what it generated for one call cannot go on after another one.

    Args:
        folder: A folder that `export` wrote from a decoder.
        threads: Threads that it runs on; 0 lets OpenVINO choose.

    Raises:
        ConfigError: The folder holds no decoder.
    """

    new_cache = KeptCache
    runtime = openvino_graphs.RUNTIME
    _last: KeptCache | None = None

    def _run(self, batch: Batch, cache: Any) -> Outputs:
        if not isinstance(cache, KeptCache) or (cache.tokens and cache is not self._last):
            raise ConfigError(
                "the graph of OpenVINO keeps one cache, and it is not this one; start anew, "
                "without cache=."
            )
        outputs, _ = self._graph(batch, {} if cache.tokens else None, cache.order)
        cache.tokens += batch["input_ids"].shape[1]
        cache.order, self._last = None, cache
        found: Outputs = outputs
        return found
