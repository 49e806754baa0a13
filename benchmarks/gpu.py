"""What a search, its members and the latency table cost on a GPU, with models of random weights.

    python benchmarks/gpu.py

Every part is timed side by side with what it is compared to, in one process, by CUDA events:

- "search": one step of the search over its floor, a forward pass of the frozen model and a backward
  pass to the output of its embeddings, with the same objective and a target that is known. Memory
  is the allocator's own peak.
- "latency": dense and small models in turns: is half the arithmetic half the time? For a decoder
  also tokens per second with a cache.
- "table": how far the times that `measure_latency` predicts are from those of real members.

A part that fails is recorded with its error, the others go on, and the file is written after each.
``--device cpu --tiny`` runs all of it on small shapes, to see whether it runs.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from record import RESULTS, save, show
from solpath import baselines
from solpath.config import SearchConfig
from solpath.measuring.latency import measure_latency
from solpath.measuring.timing import interquartile_range
from solpath.model.counting import count_macs
from solpath.model.extraction import extract
from solpath.objective import Objective
from solpath.planning.path import SolutionPath
from solpath.running.forward import run
from solpath.running.memory import resident_bytes
from solpath.running.modes import differentiating, inferring
from solpath.searching.search import search
from workloads import Batch, quiet

WARM_UP = 3
SPARSITIES = (0.2, 0.4, 0.6)
MULTIPLES = (8, 16)
NEW_TOKENS = 64


@dataclass(frozen=True)
class Shape:
    """A model to build with random weights, and the batch that it runs on.

    Attributes:
        kind: the class in transformers.
        sizes: of its configuration.
        tiny: what replaces them to see whether all runs.
        dtype: of the weights.
        samples: per batch.
        length: tokens per sample; 0 for images.
        parts: what is measured.
    """

    kind: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    dtype: torch.dtype
    samples: int
    length: int
    parts: tuple[str, ...]


_ALL = ("search", "latency", "table")
_DECODER = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
_TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TINY |= {"intermediate_size": 96}
SHAPES = {
    "bert": Shape("BertModel", {"vocab_size": 30522}, _TINY, torch.float32, 32, 128, _ALL),
    "vit": Shape(
        "ViTForImageClassification", {"num_labels": 1000}, _TINY | {"image_size": 32},
        torch.float32, 32, 0, _ALL,
    ),
    "llama 1.1B": Shape(
        "LlamaForCausalLM",
        _DECODER | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                    "num_attention_heads": 32, "num_key_value_heads": 4},
        _TINY | {"num_key_value_heads": 2, "vocab_size": 500}, torch.bfloat16, 4, 512, _ALL,
    ),
    "llama 7B": Shape(
        "LlamaForCausalLM",
        _DECODER | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                    "num_attention_heads": 32},
        _TINY | {"vocab_size": 500}, torch.bfloat16, 2, 512, ("search",),
    ),
}  # fmt: skip


class Clock:
    """Time and memory on the device: CUDA events and the allocator, or the wall clock alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, marks: Sequence[Any]) -> list[float]:
        """Times between neighbours, once all work is done."""
        if self._device.type != "cuda":
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    def start_peak(self) -> None:
        """Forget the most memory so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Most bytes allocated since then, those from before included; 0 without a GPU."""
        return torch.cuda.max_memory_allocated() if self._device.type == "cuda" else 0

    def in_turns(
        self, functions: dict[str, Callable[[], Any]], repeats: int
    ) -> dict[str, list[float]]:
        """Milliseconds of each of several functions, called in turns after a warm-up."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for round_ in range(WARM_UP + repeats):
            marks = [self.mark()]
            for function in functions.values():
                function()
                marks.append(self.mark())
            if round_ >= WARM_UP:
                for name, taken in zip(functions, self.milliseconds(marks), strict=True):
                    times[name].append(taken)
        return times


def build(shape: Shape, device: torch.device) -> nn.Module:
    """The model, drawn on the device itself."""
    import transformers

    kind = getattr(transformers, shape.kind)
    config = kind.config_class(**shape.sizes)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(default)
    return model.to(device).eval()


def batch_for(model: Any, shape: Shape, device: torch.device, tiny: bool) -> Batch:
    """One batch of random tokens without padding, or of random images."""
    generator = torch.Generator().manual_seed(0)
    samples, length = (2, min(shape.length, 40)) if tiny else (shape.samples, shape.length)
    if length:
        size = (samples, length)
        tokens = torch.randint(model.config.vocab_size, size, generator=generator).to(device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    pixels = model.config.image_size
    images = torch.randn(samples, 3, pixels, pixels, generator=generator)
    return {"pixel_values": images.to(device, shape.dtype)}


class Floor:
    """Forward, and backward to the embeddings' output, with a target that is known."""

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.inner: list[Tensor] = []
        self.objective = Objective(model, lambda: batch)
        with inferring(model):
            self.target = self.objective.target(batch)
        base = getattr(model, model.base_model_prefix, model)
        self.embeddings = getattr(base, "embeddings", None) or base.embed_tokens

    def __call__(self) -> None:
        """Run once; the model must be frozen and gradients on."""
        handle = self.embeddings.register_forward_hook(self._start)
        outputs = self.objective.run(self.model, self.batch)
        handle.remove()
        loss = self.objective.divergence(self.target, outputs, self.batch).mean()
        torch.autograd.grad(loss, self.inner)
        self.inner = []

    def _start(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        self.inner = [output]
        return output


class Watched(Sequence[Any]):
    """One batch, again and again under new numbers; `watch` is called when the search moves on."""

    def __init__(self, batch: Any, count: int, watch: Callable[[], None]) -> None:
        self.batch, self.count, self.watch, self.last = batch, count, watch, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if index != self.last:
            self.last = index
            self.watch()
        return self.batch


def search_part(model: Any, batch: Any, clock: Clock, steps: int) -> dict[str, Any]:
    """A step of the search over its floor, which runs before each: time, and the most memory."""
    floor = Floor(model, batch)
    memory = {"weights": resident_bytes(model)}
    with differentiating(model):
        for _ in range(WARM_UP):
            floor()
        clock.start_peak()
        floor()
        memory["floor"] = clock.peak()
    turns: list[tuple[Any, Any]] = []
    peaks: list[int] = []

    def watch() -> None:
        peaks.append(clock.peak())
        ended = clock.mark()
        floor()
        turns.append((ended, clock.mark()))
        clock.start_peak()

    # Two batches, so that the search moves on at every step and knows the dense outputs of both.
    config = SearchConfig(steps=WARM_UP + steps + 2, scale_batches=1)
    start = time.perf_counter()
    clock.start_peak()
    search(model, Watched(batch, 2, watch), config, progress=False)
    whole = time.perf_counter() - start
    step, under = [], []
    for (_, begun), (ended, after) in pairwise(turns[WARM_UP:]):
        taken = clock.milliseconds([begun, ended, after])
        step.append(taken[0])
        under.append(taken[1])
    memory |= {"step": max(peaks[WARM_UP:]), "search": max(peaks)}
    return {
        "step_ms": statistics.median(step),
        "step_iqr_ms": interquartile_range(step),
        "floor_ms": statistics.median(under),
        "floor_iqr_ms": interquartile_range(under),
        "ratio": statistics.median(a / b for a, b in zip(step, under, strict=True)),
        "timed": len(step),
        "whole_s": whole,
        "memory": memory,
        "memory_ratio": memory["search"] / max(memory["floor"], 1),
    }


def members(model: Any, path: SolutionPath) -> dict[str, tuple[nn.Module, float]]:
    """Every small model by name, with its sparsity."""
    found = {}
    for multiple in MULTIPLES:
        for sparsity in SPARSITIES:
            plan = path.plan(sparsity=sparsity, multiple_of=multiple)
            name = f"sparsity {sparsity:g}, multiples of {multiple}"
            found[name] = extract(model, plan, check=False), plan.achieved.sparsity
    return found


def latency_part(
    model: Any, path: SolutionPath, batch: Any, clock: Clock, repeats: int
) -> dict[str, Any]:
    """Latency and MACs of members as shares of the dense model's; of a decoder also decoding."""
    small = members(model, path)
    models: dict[str, Any] = {"dense": model} | {name: one for name, (one, _) in small.items()}
    with inferring(*models.values()):
        passes = {name: partial(run, one, batch, labels=False) for name, one in models.items()}
        times = clock.in_turns(passes, repeats)
        macs = {name: count_macs(one, batch) for name, one in models.items()}
        decoding = _decoding(models, batch) if model.can_generate() else {}
    result: dict[str, Any] = {}
    for name, taken in times.items():
        pairs = zip(taken, times["dense"], strict=True)
        ratio, share = statistics.median(a / b for a, b in pairs), macs[name] / macs["dense"]
        result[name] = {
            "sparsity": small[name][1] if name in small else 0.0,
            "ms": statistics.median(taken),
            "iqr_ms": interquartile_range(taken),
            "latency_ratio": ratio,
            "macs_ratio": share,
            "latency_over_macs": ratio / share,
        }
        if decoding:
            tokens = batch["input_ids"].numel()
            result[name]["prefill_tokens_per_s"] = 1e3 * tokens / statistics.median(taken)
            result[name] |= decoding[name]
    return result


def _decoding(models: dict[str, Any], batch: Any, repeats: int = 2) -> dict[str, dict[str, float]]:
    """Tokens per second of generation with a cache, the prompt's own time included."""
    times: dict[str, list[float]] = {name: [] for name in models}
    prompt = {name: value[:, :32] for name, value in batch.items()}
    for round_ in range(1 + repeats):
        for name, model in models.items():
            start = time.perf_counter()
            made = model.generate(
                **prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
                use_cache=True, pad_token_id=0,
            )  # fmt: skip
            made.cpu()
            if round_:
                times[name].append(time.perf_counter() - start)
    made_tokens = NEW_TOKENS * len(batch["input_ids"])
    dense = statistics.median(times["dense"])
    return {
        name: {
            "decode_tokens_per_s": made_tokens / statistics.median(taken),
            "decode_time_ratio": statistics.median(taken) / dense,
        }
        for name, taken in times.items()
    }


def table_part(
    model: Any, path: SolutionPath, batch: Any, clock: Clock, repeats: int
) -> dict[str, Any]:
    """Members planned by the table for shares of the dense time, timed beside the dense model."""
    start = time.perf_counter()
    table = measure_latency(model, batch, repeats=3)
    result: dict[str, Any] = {"table_s": time.perf_counter() - start, "dense_ms": table.dense_ms}
    predicted, models = {}, {"dense": model}
    for share in (0.8, 0.6, 0.4):
        name = f"{share:g} of dense"
        try:
            plan = path.plan(latency_ms=share * table.dense_ms, latency=table, multiple_of=8)
        except Exception as error:
            result[name] = {"error": _words(error)}
            continue
        predicted[name] = plan.latency_ms["predicted"]
        models[name] = extract(model, plan, check=False)
    with inferring(*models.values()):
        passes = {name: partial(run, one, batch, labels=False) for name, one in models.items()}
        times = clock.in_turns(passes, repeats)
    for name, guess in predicted.items():
        pairs = zip(times[name], times["dense"], strict=True)
        measured = table.dense_ms * statistics.median(a / b for a, b in pairs)
        result[name] = {
            "predicted_ms": guess,
            "measured_ms": measured,
            "error": guess / measured - 1,
        }
    return result


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _show(results: dict[str, Any]) -> None:
    rows: list[list[Any]] = []
    for name, parts in results.items():
        for part, entry in parts.items():
            found = entry.get("results", {})
            if "error" in entry:
                rows.append([f"{name}, {part}", entry["error"], "", "", ""])
            elif part == "search":
                row = [found[key] for key in ("step_ms", "floor_ms", "ratio", "memory_ratio")]
                rows.append([f"{name}, search: step ms, floor ms, ratio, memory ratio", *row])
            for member, one in found.items() if part != "search" else ():
                keys = ("predicted_ms", "measured_ms", "error")
                if part == "latency":
                    keys = ("ms", "latency_ratio", "macs_ratio", "latency_over_macs")
                if isinstance(one, dict):
                    row = [one.get(key, "") for key in keys]
                    rows.append([f"{name}, {member}: {', '.join(keys)}", *row, *[""] * 4][:5])
    show("On a GPU", ["", "", "", "", ""], rows)


def main(
    models: Annotated[str, typer.Option(help="Which, comma-separated.")] = ",".join(SHAPES),
    minutes: Annotated[float, typer.Option(help="No part starts after these.")] = 6.0,
    steps: Annotated[int, typer.Option(help="Search steps that are timed.")] = 15,
    repeats: Annotated[int, typer.Option(help="Timed passes of each model.")] = 30,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    tiny: Annotated[bool, typer.Option(help="Tiny shapes: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "gpu.json",
) -> None:
    """Search, members and latency table on a GPU, each beside what it is compared to."""
    quiet()
    where, start = torch.device(device), time.monotonic()
    clock = Clock(where)
    settings = {"models": models.split(","), "steps": steps, "repeats": repeats, "tiny": tiny}
    results: dict[str, Any] = {}
    for name in models.split(","):
        shape, parts = SHAPES[name], results.setdefault(name, {})
        if tiny:  # a CPU searches nothing in half precision
            shape = replace(shape, sizes=shape.sizes | shape.tiny, dtype=torch.float32)
        model = batch = path = None
        for part in shape.parts:
            began = time.monotonic()
            if began - start > 60 * minutes:
                parts[part] = {"error": f"not started within {minutes:g} minutes"}
                continue
            try:
                if model is None:
                    model = build(shape, where)
                    batch = batch_for(model, shape, where, tiny)
                if part == "search":
                    found = search_part(model, batch, clock, steps)
                else:  # the widths are what matters
                    path = path or baselines.magnitude(model, [batch])
                    measured = latency_part if part == "latency" else table_part
                    found = measured(model, path, batch, clock, repeats)
                parts[part] = {"results": found}
            except Exception as error:
                parts[part] = {"error": _words(error)}
            parts[part]["seconds"] = time.monotonic() - began
            save(out, settings, results, device=where)
        del model, batch, path
        gc.collect()
        if where.type == "cuda":
            torch.cuda.empty_cache()
    save(out, settings, results, device=where)
    _show(results)


if __name__ == "__main__":
    typer.run(main)
