"""Run graphs of any runtime: one of a whole model, in steps if it takes a cache, or two halves.

What a runtime adds is a `Graph` of its own, which opens a file and runs arrays, and a `Runtime`,
which says how its files are named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import ConfigError
from solpath.exporting.encoder_decoder import step_defaults
from solpath.exporting.formats import Load, Outputs, Runner
from solpath.exporting.tracing import completed
from solpath.running.forward import Batch

_CACHE = "cache."
_BY_TOKEN = ("input_ids", "position_ids", "token_type_ids")


class Graph:
    """A graph that a runtime runs on the CPU, on arrays of NumPy.

    Attributes:
        inputs: Names of its inputs, without those of the cache.
        cached: Whether it has a cache of keys and values.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int | None]]) -> None:
        """Note what a graph takes.

        Args:
            shapes: Names of all inputs to their shapes, in which None is an axis of any length.
        """
        self._past = {name: shape for name, shape in shapes.items() if _CACHE in name}
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
        found = self._run({name: value.detach().numpy() for name, value in feed.items()})
        tensors = {name: torch.from_numpy(value) for name, value in found.items()}
        cache = {_leaf(name): value for name, value in tensors.items() if _CACHE in name}
        return {name: value for name, value in tensors.items() if "." not in name}, cache

    def _run(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return all outputs by name, in arrays that no later run writes to."""
        raise NotImplementedError


def _leaf(name: str) -> str:
    return name[name.index(_CACHE) :]


def _empty(shape: Sequence[int | None], size: int) -> list[int]:
    """Return the shape of a cache without tokens: what has no number is the batch or the tokens."""
    return [size, *(axis or 0 for axis in shape[1:])]


@dataclass
class Halves:
    """The two graphs of an encoder-decoder; see `trace_halves`.

    Attributes:
        encoder: Makes the cache of cross-attention of a source.
        decoder: Makes logits of tokens, of that cache and of its own, which may be empty.
    """

    encoder: Graph
    decoder: Graph

    def __call__(self, batch: Batch) -> Outputs:
        """Return the outputs of whole texts, which the decoder runs on in steps."""
        outputs, cross = self.encoder(completed(self.encoder.inputs, batch))
        full = completed(self.decoder.inputs, step_defaults(batch, 0) | dict(batch))
        return {**outputs, **in_steps(self.decoder, full, "decoder_", cross)}


@dataclass(frozen=True)
class Runtime:
    """What a runtime runs of a folder.

    Attributes:
        format: Name of the format of its folders.
        title: Name of it, for people.
        prefix: What the names of the classes start with that generate in it.
        graph: Opens a file with a number of threads; 0 lets the runtime choose.
        file: File of the graph of a whole model.
        halves: Files of the encoder and the decoder, in place of that one.
    """

    format: str
    title: str
    prefix: str
    graph: Callable[[Path, int], Graph]
    file: str
    halves: tuple[str, str]

    def holds_halves(self, folder: Path) -> bool:
        """Return whether a folder holds the graphs of an encoder and a decoder."""
        return (folder / self.halves[0]).exists()

    def open_halves(self, folder: Path, threads: int = 0, ending: str = "") -> Halves:
        """Open the graphs of an encoder and a decoder.

        Args:
            folder: The folder that holds them.
            threads: Threads that each runs on; 0 lets the runtime choose.
            ending: What the names of the files end with.

        Raises:
            ConfigError: It does not hold them.
        """
        if not self.holds_halves(folder):
            raise ConfigError(
                f"{folder} holds no encoder-decoder that was exported to {self.format}."
            )
        encoder, decoder = (
            self.graph(folder / named(file, ending), threads) for file in self.halves
        )
        return Halves(encoder, decoder)

    def runner(self, folder: Path, ending: str = "") -> Runner:
        """Return what runs a folder on whole texts: in steps, if there is a cache.

        Args:
            folder: The folder.
            ending: What the names of the files end with.
        """
        if self.holds_halves(folder):
            return self.open_halves(folder, ending=ending)
        graph = self.graph(folder / named(self.file, ending), 0)

        def run(batch: Batch) -> Outputs:
            full = completed(graph.inputs, batch)
            return in_steps(graph, full) if graph.cached else graph(full)[0]

        return run

    def class_of(self, model: nn.Module) -> str:
        """Return the name of the class that generates with an encoder-decoder."""
        config: Any = model.config
        return f"{self.prefix}{'Whisper' if config.model_type == 'whisper' else 'Seq2Seq'}"

    def load(self, module: str, name: str, main: str) -> Load:
        """Return how a class of solpath loads a folder.

        Args:
            module: Its module.
            name: Its name.
            main: The input that it generates from.
        """
        code = f"""from solpath.exporting.{module} import {name}

tokens = {name}(folder).generate({main}, max_new_tokens=16)"""
        return Load(f"{self.title}, by transformers' generate", code)


def named(file: str, ending: str) -> str:
    """Return the name of a file with something added before its extension."""
    path = Path(file)
    return str(path.with_name(f"{path.stem}{ending}{path.suffix}"))


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
