"""Interrupt searches, compensations and tunings at every line, and look for what they leave behind.

`interrupt` runs a piece of work again and again and raises KeyboardInterrupt at another line of
solpath each time. After each it compares the models and torch with how they were found, while the
exception is still there, as in an interactive session: whatever is undone only when the traceback
is dropped counts as left behind.
"""

import gc
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.state import is_initialized
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import solpath
from solpath.running import claims

ROOT = str(Path(solpath.__file__).parent)
Line = tuple[str, int]


@dataclass
class Found:
    """What the interrupts of one piece of work found.

    Attributes:
        lines: Lines of solpath that it runs.
        interrupts: How often it was interrupted, each time at another line while there are any.
        left: What was left behind, to how often.
        where: For everything left behind, the lines at which that happened.
    """

    lines: int = 0
    interrupts: int = 0
    left: Counter[str] = field(default_factory=Counter)
    where: dict[str, list[str]] = field(default_factory=dict)


def state_of(models: list[nn.Module]) -> dict[str, Any]:
    """Everything that must be as before after an interrupt, by what it is."""
    modules = [module for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    return {
        "hooks": [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in modules],
        "classes": [type(module) for module in modules],
        "training": [module.training for module in modules],
        "parameters": [id(parameter) for parameter in parameters],
        "weights": [parameter.detach().double().sum().item() for parameter in parameters],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "attention": [model.config._attn_implementation for model in models],
        "claims": len(claims._claims),
        "random state": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "autocast": [
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
            (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting())[1],
        ],
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "garbage collection": gc.isenabled(),
        "accelerate": is_initialized(),
    }


def interrupt(
    work: Callable[[], Any], models: list[nn.Module], *, seconds: float, seed: int, limit: int
) -> Found:
    """Interrupt a piece of work at lines of solpath, chosen at random, and say what was left.

    Args:
        work: Called without arguments. It must do the same every time.
        models: The models that it must leave as they are.
        seconds: When to stop.
        seed: Seeds the choice of the lines.
        limit: How many interrupts to make at most.
    """
    end, chance, found = time.monotonic() + seconds, random.Random(seed), Found()
    work()  # what is imported or compiled once
    seen: Counter[Line] = Counter()
    _traced(work, lambda line: seen.update([line]))
    found.lines = len(seen)
    for line in _in_turns(list(seen), chance):
        if found.interrupts == limit or time.monotonic() > end:
            return found
        left = _interrupted(work, models, line, chance.randint(1, seen[line]))
        found.interrupts += left is not None
        for name in left or ():
            found.left[name] += 1
            place = f"{Path(line[0]).relative_to(ROOT)}:{line[1]}"
            found.where.setdefault(name, []).append(place)
    return found


def _in_turns(lines: list[Line], chance: random.Random) -> Iterator[Line]:
    """Every line once, in random order, again and again."""
    while True:
        yield from chance.sample(lines, len(lines))


def _interrupted(
    work: Callable[[], Any], models: list[nn.Module], line: Line, nth: int
) -> list[str] | None:
    """Interrupt the work when it comes to a line for the n-th time, and name what it left.

    None if the work went through, because it came to the line less often than before.
    """
    count = 0

    def at(here: Line) -> None:
        nonlocal count
        count += here == line
        if here == line and count == nth:
            raise KeyboardInterrupt

    before = state_of(models)
    try:
        _traced(work, at)
    except KeyboardInterrupt:
        after = state_of(models)
    else:
        return None
    return [name for name in before if before[name] != after[name]]


def _traced(work: Callable[[], Any], at: Callable[[Line], None]) -> None:
    """Run the work, and call `at` before every line of solpath."""

    def local(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            at((frame.f_code.co_filename, frame.f_lineno))
        return local

    def call(frame: FrameType, event: str, arg: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(ROOT) else None

    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(None)


def works() -> dict[str, tuple[Callable[[], Any], list[nn.Module]]]:
    """A search, a compensation, a tuning and others of a tiny model, and the models they are of."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=12,
    )
    model = BertForSequenceClassification(config).train()
    model.bert.embeddings.requires_grad_(False)
    batches = [{"input_ids": torch.randint(1, 40, (2, 6))} for _ in range(4)]
    settings = solpath.SearchConfig(steps=2)
    path = solpath.search(model, batches, settings, progress=False)
    plan = path.plan(sparsity=0.5)
    small = solpath.extract(model, plan)
    tuning = solpath.TuneConfig(steps=2, learning_rate=1e-3)
    held = batches[:1]

    def masked() -> None:
        with solpath.masked(model, plan):
            solpath.evaluate(model, targets, batches)

    def stored() -> None:
        with tempfile.TemporaryDirectory() as folder:
            solpath.save(small, f"{folder}/small")
            solpath.load(f"{folder}/small")

    targets = [model(**batch).logits.detach() for batch in batches]
    both: list[nn.Module] = [model, small]
    return {
        "search": (lambda: solpath.search(model, batches, settings, progress=False), [model]),
        "compensate": (
            lambda: solpath.compensate(small, model, batches, progress=False),
            both,
        ),
        "tune": (
            lambda: solpath.tune(small, model, batches, tuning, heldout=held, progress=False),
            both,
        ),
        "extract": (lambda: solpath.extract(model, plan), [model]),
        "save and load": (stored, [small]),
        "masked": (masked, [model]),
        "measure": (lambda: solpath.measure({"a": model, "b": small}, batches[0], repeats=1), both),
    }
