"""One search over a model; its result is an order that gives every size."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from solpath.config import InclusionConfig, SearchConfig, check_count
from solpath.errors import NonFiniteLossError
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.objective import Loss
from solpath.planning.path import SolutionPath, unflatten
from solpath.pretrained import Name, for_batches
from solpath.running.checkpoint import State, read_checkpoint, resume_hint, write_checkpoint
from solpath.running.processes import process
from solpath.running.progress import Report, progress_bar
from solpath.searching.engine import Engine, open_engine
from solpath.searching.equilibrium import EquilibriumSearch
from solpath.searching.inclusion import InclusionSearch

_BASIS = "basis/"  # before the name of a pair, in a state
_FIGURES = "loss {task.fields[loss]:.4f}  size {task.fields[size]:.0%}"


class Method(Protocol):
    """One way to search: where it starts, what a step does, and the order it ends with.

    The state is all that a step changes, so that it can be written and resumed; ``history`` in it
    belongs to the frame.
    """

    name: str

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """The axes to search along, by pair name; empty for the channels as they are."""

    def start(self, engine: Engine) -> State:
        """The state before the first step."""

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """A new state after step `k`, the loss there, and the share of the cost it stands for."""

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """When every unit enters, the first ones first. float64 ``[units]``."""


def search(
    model: nn.Module | Name,
    batches: Iterable[Any],
    config: SearchConfig | InclusionConfig | None = None,
    *,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 25,
    progress: bool = True,
) -> SolutionPath:
    """Order every removable unit of `model` by one search (paper, section 3; docs/method.md).

    The model is left as it was found, bit for bit. The result depends on the model, the batches,
    `config` and `loss` alone: not on `checkpoint_every`, on `progress`, or on being interrupted
    and resumed. On one machine with one number of threads it is bit-identical from run to run;
    other numbers of threads or processes change sums of floats in their last bits.

    Args:
        model: a transformers model; see `find_pairs`. The search runs where the model is. A folder
            or hub id is loaded by `from_pretrained`, to where the batches are.
        batches: iterable of what the model takes (dicts or tensors on the model's device),
            repeated when shorter than the search; 8 to 64 samples each.
        config: `SearchConfig` (default) or `InclusionConfig`.
        loss: ``loss(outputs, batch) -> scalar``, a mean over the samples of the batch. Default:
            distance to the dense model's own output, without labels.
        checkpoint: folder for the state of the search. If it holds the state of the same search,
            that search goes on from there.
        checkpoint_every: steps between checkpoints.
        progress: show a progress bar with loss, expected size and time left.

    Returns:
        The path; `SolutionPath.plan` cuts it to any size.

    Raises:
        UnsupportedModelError: see `find_pairs`; or half precision on a CPU.
        FileError: see `from_pretrained`; or a damaged checkpoint, or one that cannot be written.
        ConfigError: a bad `checkpoint_every`.
        BatchError: empty batches, or on another device.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
        FingerprintError: the checkpoint belongs to another model or other settings.

    Example:
        >>> path = solpath.search(model, batches)  # doctest: +SKIP
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))  # doctest: +SKIP
    """
    check_count("checkpoint_every", checkpoint_every, 1)
    model, batches = for_batches(model, batches)
    config = config or SearchConfig()
    identity = fingerprint(model, find_pairs(model))
    file = None if checkpoint is None else Path(checkpoint) / "search.safetensors"
    header = {
        "version": 1,
        "kind": type(config).__name__,
        "config": config.to_dict(),
        "loss": "divergence" if loss is None else "user",
        "fingerprint": asdict(identity),
    }
    state = None if file is None else read_checkpoint(file, header)
    method = _method(config)
    with open_engine(model, batches, loss=loss, seed=config.seed) as engine:
        costs = engine.count_costs()
        basis = method.basis(engine) if state is None else _basis_of(state)
        with engine.rotated(basis):
            if state is None:
                state = method.start(engine) | {_BASIS + name: axes for name, axes in basis.items()}
                state["history"] = torch.zeros(2, 0, dtype=torch.float64)
            show, done = progress and process()[0] == 0, state["history"].shape[1]
            with progress_bar(
                "search", _FIGURES, config.steps, done, show=show, loss=0.0, size=1.0
            ) as report:
                state = _run(
                    engine, method, state, config.steps, file, header, checkpoint_every, report
                )
        entry = method.entry_times(engine, state)
        return SolutionPath(
            pairs=tuple(engine.pairs),
            score=unflatten(engine.pairs, -entry),
            entry_time=unflatten(engine.pairs, entry),
            costs=costs,
            method=method.name,
            config=config.to_dict(),
            fingerprint=identity,
            history=state["history"],
            energy=engine.energy,
            basis=basis,
        )


def _method(config: SearchConfig | InclusionConfig) -> Method:
    if isinstance(config, SearchConfig):
        return EquilibriumSearch(config)
    return InclusionSearch(config)


def _basis_of(state: State) -> dict[str, Tensor]:
    found = {name: value for name, value in state.items() if name.startswith(_BASIS)}
    return {name.removeprefix(_BASIS): value for name, value in found.items()}


def _run(
    engine: Engine,
    method: Method,
    state: State,
    steps: int,
    file: Path | None,
    header: Mapping[str, Any],
    every: int,
    report: Report,
) -> State:
    """Step to the end, saving on the way and on Ctrl-C."""
    done = saved = state["history"].shape[1]
    try:
        for k in range(done, steps):
            after, loss, keep = method.step(engine, state, k)
            state = after | {"history": _record(state, loss, keep)}
            report(loss=loss, size=keep)
            if (k + 1) % every == 0 or k + 1 == steps:
                saved = _save(file, header, state)
    except NonFiniteLossError as error:
        text = f"{str(error).rstrip('.')} of {steps}{resume_hint(file, saved)}."
        raise NonFiniteLossError(text) from error
    except KeyboardInterrupt:
        _save(file, header, state)
        raise
    return state


def _save(file: Path | None, header: Mapping[str, Any], state: State) -> int:
    """Write the checkpoint, if one is kept, on the first process; returns the steps it holds."""
    if file is not None and process()[0] == 0:
        write_checkpoint(file, header, state)
    return state["history"].shape[1]


def _record(state: State, loss: float, keep: float) -> Tensor:
    return torch.cat([state["history"], torch.tensor([[loss], [keep]], dtype=torch.float64)], 1)
