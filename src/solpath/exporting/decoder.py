"""Generate text with a decoder that was exported to ONNX, by transformers' own `generate`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from solpath.exporting.onnx import FILE, Graph
from solpath.exporting.tracing import completed


class OnnxDecoder(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A decoder of text in onnxruntime, with all that ``generate`` of transformers can do.

    ``OnnxDecoder(folder).generate(input_ids, attention_mask=mask, max_new_tokens=16)``

    Args:
        folder: A folder that `export` wrote from a decoder.
        threads: Threads that it runs on; 0 lets onnxruntime choose.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        self._graph = Graph(Path(folder) / FILE, threads)
        self.anchor = nn.Parameter(torch.empty(0), requires_grad=False)  # says which device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits of ids ``[batch, tokens]``, and the cache, which they are added to."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: value for name, value in given.items() if value is not None}
        batch = completed(self._graph.inputs, {"input_ids": input_ids, **given})
        cache = DynamicCache() if cache is None else cache
        known = cache.get_seq_length()
        past = {
            f"cache.layers.{i}.{kind}": getattr(layer, kind)
            for i, layer in enumerate(cache.layers)
            for kind in ("keys", "values")
        }
        outputs, whole = self._graph(batch, past if known else None)
        new = {name: states[:, :, known:] for name, states in whole.items()}
        for i in range(len(new) // 2):
            cache.update(new[f"cache.layers.{i}.keys"], new[f"cache.layers.{i}.values"], i)
        return CausalLMOutputWithPast(logits=outputs["logits"], cache=cache)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Generate as ``generate`` of transformers does, with a cache that keeps all tokens."""
        kwargs.setdefault("cache", DynamicCache())  # windows are in the graph's mask
        return super().generate(inputs, **kwargs)
