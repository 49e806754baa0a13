"""Run graphs in ONNX with onnxruntime on the CPU: one of a whole model, or two of its halves."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solpath.errors import ConfigError
from solpath.exporting.encoder_decoder import step_defaults
from solpath.exporting.formats import Outputs, Runner
from solpath.exporting.tracing import completed
from solpath.running.forward import Batch

FILE = "onnx/model.onnx"
HALVES = ("onnx/encoder.onnx", "onnx/decoder.onnx")
INT8 = "_int8"
"""What the names of files with weights in int8 end with."""

_CACHE = "cache."
_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")


def named(file: str, ending: str) -> str:
    """Return the name of a file with something added before its extension."""
    path = Path(file)
    return str(path.with_name(f"{path.stem}{ending}{path.suffix}"))


class Graph:
    """A graph that onnxruntime runs on the CPU.

    Attributes:
        inputs: Names of its inputs, without those of the cache.
        cached: Whether it takes and gives a cache of keys and values.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a graph.

        Args:
            path: Its file.
            threads: Threads that it runs on; 0 lets onnxruntime choose.

        Raises:
            ConfigError: There is no such file.
        """
        import onnxruntime

        if not path.exists():
            raise ConfigError(f"{path.parent.parent} holds no {path.parent.name}/{path.name}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        shapes = {one.name: one.shape for one in self._session.get_inputs()}
        self._past = {name: shape for name, shape in shapes.items() if _CACHE in name}
        self._names = [output.name for output in self._session.get_outputs()]
        self.inputs = [name for name in shapes if name not in self._past]
        self.cached = bool(self._past)

    def __call__(
        self, batch: Batch, past: Mapping[str, Tensor] | None = None
    ) -> tuple[Outputs, dict[str, Tensor]]:
        """Run the graph.

        Args:
            batch: Its inputs; those that it does not take are left out.
            past: The cache of all tokens before, as an earlier call gave it. What is not there is
                empty.

        Returns:
            The outputs by name, and the cache with the tokens of this call.
        """
        feed = {name: value for name, value in batch.items() if name in self.inputs}
        size = len(next(iter(feed.values())))
        for name, shape in self._past.items():
            known = (past or {}).get(_leaf(name))
            feed[name] = torch.zeros(_empty(shape, size)) if known is None else known
        arrays = {name: value.detach().numpy() for name, value in feed.items()}
        found = zip(self._names, self._session.run(self._names, arrays), strict=True)
        tensors = {name: torch.from_numpy(value) for name, value in found}
        cache = {_leaf(name): value for name, value in tensors.items() if _CACHE in name}
        return {name: value for name, value in tensors.items() if "." not in name}, cache


def _leaf(name: str) -> str:
    return name[name.index(_CACHE) :]


def _empty(shape: list[Any], size: int) -> list[int]:
    """Return the shape of a cache without tokens: what has no number is the batch or the tokens."""
    fixed = [int(axis) if str(axis).isdigit() else 0 for axis in shape]
    return [size, *fixed[1:]]


class Halves:
    """The two graphs of an encoder-decoder; see `trace_halves`.

    Attributes:
        encoder: Makes the cache of cross-attention of a source.
        decoder: Makes logits of tokens, of that cache and of its own, which may be empty.
    """

    def __init__(self, folder: Path, threads: int = 0, ending: str = "") -> None:
        """Open both graphs.

        Args:
            folder: The folder that holds them.
            threads: Threads that each runs on; 0 lets onnxruntime choose.
            ending: What the names of the files end with.

        Raises:
            ConfigError: It does not hold them.
        """
        files = (folder / named(file, ending) for file in HALVES)
        self.encoder, self.decoder = (Graph(file, threads) for file in files)

    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs of whole texts, which the decoder runs on in steps."""
        outputs, cross = self.encoder(completed(self.encoder.inputs, batch))
        full = completed(self.decoder.inputs, step_defaults(batch, 0) | dict(batch))
        return {**outputs, **in_steps(self.decoder, full, "decoder_", cross)}


def holds_halves(folder: Path) -> bool:
    """Return whether a folder holds the two graphs of an encoder-decoder, not one of all."""
    return (folder / HALVES[0]).exists()


def runner(folder: Path, ending: str = "") -> Runner:
    """Return what runs the graphs of a folder; a decoder runs in steps, which use its cache.

    Args:
        folder: The folder.
        ending: What the names of the files end with.
    """
    if holds_halves(folder):
        return Halves(folder, ending=ending)
    graph = Graph(folder / named(FILE, ending))

    def run(batch: Batch) -> Outputs:
        full = completed(graph.inputs, batch)
        return in_steps(graph, full) if graph.cached else graph(full)[0]

    return run


def in_steps(graph: Any, full: Batch, prefix: str = "", cross: Any = None) -> Outputs:
    """Run a graph with a cache on the first half of a text, on the rest, and on its last token.

    Args:
        graph: Takes inputs and a cache and gives outputs and a cache; see `Graph`.
        full: Its inputs: ids, mask and positions, ``[batch, tokens]``, and others.
        prefix: What the names of these three start with.
        cross: The part of the cache that every step takes as it is.

    Returns:
        The outputs of all tokens.
    """
    tokens = full[f"{prefix}input_ids"].shape[1]
    steps, cache = [], cross
    for start, end in pairwise(sorted({0, tokens // 2, max(tokens - 1, 0), tokens})):
        cut = {f"{prefix}{name}": slice(start, end) for name in _BY_TOKEN}
        cut[f"{prefix}attention_mask"] = slice(end)
        step = {name: value[:, cut[name]] if name in cut else value for name, value in full.items()}
        outputs, cache = graph(step, cache)
        steps.append(outputs)
        cache = {**(cross or {}), **cache}
    return {name: torch.cat([outputs[name] for outputs in steps], 1) for name in steps[0]}
