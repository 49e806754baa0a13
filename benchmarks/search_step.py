"""Cost of one search step against its floor: forward, and backward to the activations.

    python benchmarks/search_step.py

The floor is a plain forward pass of the frozen model and a backward pass to the output of the
embeddings, with the same objective and a target that is known. Every step of the search is timed
from outside, by the moments at which it asks for its batch, and a floor pass is run just before
it, so both see the same machine; the ratio is the median over those couples. "cached" repeats a
few batches, whose dense outputs the search remembers; "fresh" brings a new batch every step, so
each step also runs the dense model once. Time is that of the processor, so that other work on the
machine counts for neither.

Memory is measured twice: the most bytes of live tensors, and the peak resident size of a process
that does nothing else.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from time import process_time
from typing import Annotated, Any

import torch
import typer
from torch import nn

from record import RESULTS, save, show
from resident import resident as resident_bytes
from solpath.config import SearchConfig
from solpath.divergence import divergence
from solpath.measuring.timing import interquartile_range
from solpath.running.forward import forward, output_mask
from solpath.running.memory import LiveStorages
from solpath.searching.search import search
from workloads import Batch, installed_minilm, quiet, random_tokens

WARM_UP = 3
CACHED = 4


class Watched(Sequence[Batch]):
    """Batches that call `watch` whenever the search moves on to another one."""

    def __init__(self, batches: list[Batch], watch: Callable[[int], None]) -> None:
        self.batches, self.watch = batches, watch
        self.last = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        if index != self.last:
            self.last = index
            self.watch(index)
        return self.batches[index]


def load() -> nn.Module:
    from transformers import AutoModel

    quiet()
    return AutoModel.from_pretrained(installed_minilm(), add_pooling_layer=False).eval()


class Floor:
    """Forward and backward to the embeddings' output, weights frozen."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False)
        self.inner: list[torch.Tensor] = []
        self.targets: dict[int, torch.Tensor] = {}
        self.tracking = False
        model.embeddings.register_forward_hook(self._start)

    def _start(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not self.tracking:
            return None
        output = output.detach().requires_grad_()
        self.inner = [output]
        return output

    def prepare(self, batches: Sequence[Batch]) -> None:
        with torch.no_grad():
            for batch in batches:
                self.targets[id(batch)] = forward(self.model, batch)

    def __call__(self, batch: Batch) -> None:
        self.tracking = True
        with torch.enable_grad():
            output = forward(self.model, batch)
            target, mask = self.targets[id(batch)], output_mask(batch, output)
            loss = divergence(output, target, mask, kind="hidden").mean()
            torch.autograd.grad(loss, self.inner)
        self.inner = []
        self.tracking = False


def settings(steps: int) -> SearchConfig:
    return SearchConfig(steps=steps, scale_batches=1)


def time_steps(model: nn.Module, batches: list[Batch], steps: int) -> dict[str, list[float]]:
    """Processor seconds of every step of one search, and of the floor between them."""
    floor = Floor(deepcopy(model))
    floor.prepare(batches)
    times: dict[str, list[float]] = {"step": [], "floor": []}
    start = None

    def watch(index: int) -> None:
        nonlocal start
        if start is not None:
            times["step"].append(process_time() - start)
        before = process_time()
        floor(batches[index])
        times["floor"].append(process_time() - before)
        start = process_time()

    search(model, Watched(batches, watch), settings(steps), progress=False)
    first = CACHED + WARM_UP if len(batches) == CACHED else WARM_UP
    return {name: values[first : len(times["step"])] for name, values in times.items()}


def live_bytes(model: nn.Module, batches: list[Batch]) -> dict[str, int]:
    """Most bytes of live tensors on top of the weights: in the floor, a step, the whole search."""
    floor = Floor(deepcopy(model))
    with LiveStorages() as live:
        floor.prepare(batches)
        floor(batches[0])
    result = {"floor": live.peak}
    peaks: list[int] = []
    with LiveStorages() as live:

        def watch(index: int) -> None:
            peaks.append(live.peak)
            live.peak = live.alive

        search(model, Watched(batches, watch), settings(2 * CACHED), progress=False)
    return result | {"scale": peaks[0], "step": max(peaks[CACHED + 1 :]), "search": max(peaks)}


def resident(mode: str, size: int, length: int, steps: int, threads: int) -> int:
    """Peak resident bytes of a fresh process that runs `steps` passes of one mode."""
    arguments = [f"--size={size}", f"--length={length}", f"--steps={steps}"]
    arguments += [f"--threads={threads}", f"--worker={mode}"]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    return int(json.loads(done.stdout.splitlines()[-1])["resident"])


def work(mode: str, size: int, length: int, steps: int) -> None:
    """What a fresh process does for `resident`."""
    model = load()
    batches = random_tokens(model, size, length, CACHED if mode != "fresh" else steps + 1)
    if mode == "floor":
        floor = Floor(model)
        floor.prepare(batches)
        for step in range(steps):
            floor(batches[step % CACHED])
    elif mode != "load":
        search(model, batches, settings(steps), progress=False)
    print(json.dumps({"resident": resident_bytes("VmHWM")}))


def main(
    size: Annotated[int, typer.Option(help="Samples per batch.")] = 16,
    length: Annotated[str, typer.Option(help="Tokens per sample, comma-separated.")] = "32,128",
    steps: Annotated[int, typer.Option(help="Search steps that are timed.")] = 40,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "search_step.json",
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time and memory of a search step over the floor, on all-MiniLM-L6-v2."""
    torch.set_num_threads(threads)
    if worker:
        work(worker, size, int(length), steps)
        return
    results, rows = [], []
    for tokens in (int(part) for part in length.split(",")):
        model = load()
        entry: dict[str, Any] = {"size": size, "length": tokens, "time": {}, "memory": {}}
        for mode in ("cached", "fresh"):
            total = steps + WARM_UP + 1 + (CACHED if mode == "cached" else 0)
            batches = random_tokens(model, size, tokens, CACHED if mode == "cached" else total + 1)
            times = time_steps(model, batches, total)
            step, floor = (statistics.median(times[name]) for name in ("step", "floor"))
            pairs = zip(times["step"], times["floor"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            entry["time"][mode] = {
                "step_ms": 1e3 * step,
                "floor_ms": 1e3 * floor,
                "step_iqr_ms": 1e3 * interquartile_range(times["step"]),
                "floor_iqr_ms": 1e3 * interquartile_range(times["floor"]),
                "ratio": ratio,
                "timed": len(times["step"]),
            }
            label = f"{size} x {tokens}, time ({mode} targets)"
            rows.append([label, f"{1e3 * step:.1f} ms", f"{1e3 * floor:.1f} ms", ratio])
        weights = sum(p.nbytes for p in model.parameters())
        live = live_bytes(model, random_tokens(model, size, tokens, CACHED))
        ratios = {k: (weights + live[k]) / (weights + live["floor"]) for k in ("step", "search")}
        entry["memory"]["tensors"] = {"weights": weights, **live, "ratios_with_weights": ratios}
        for name in ("step", "search"):
            cells = [f"{(weights + live[part]) / 2**20:.1f} MiB" for part in (name, "floor")]
            rows.append([f"{size} x {tokens}, live tensors ({name})", *cells, ratios[name]])
        peak = {
            mode: resident(mode, size, tokens, min(steps, 12), threads)
            for mode in ("load", "floor", "cached", "fresh")
        }
        entry["memory"]["resident"] = peak
        for mode in ("cached", "fresh"):
            cells = [f"{peak[part] / 2**20:.1f} MiB" for part in (mode, "floor")]
            ratio = peak[mode] / peak["floor"]
            rows.append([f"{size} x {tokens}, process ({mode} targets)", *cells, ratio])
        results.append(entry)
    show("One search step over its floor", ["", "search", "floor", "ratio"], rows)
    save(out, {"model": "minilm", "steps": steps, "threads": threads}, results)


if __name__ == "__main__":
    typer.run(main)
