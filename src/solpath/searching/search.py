"""One search over a model, which puts all its units in order."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from solpath.config import InclusionConfig, SearchConfig, check_config, check_count
from solpath.data.samples import union
from solpath.data.source import check_batches
from solpath.errors import FileError, NonFiniteLossError
from solpath.holding import SEARCH_STATE
from solpath.loading import for_batches
from solpath.model.basis import obstacle
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.objective import Loss
from solpath.pair import Pair, unflatten
from solpath.planning.path import SolutionPath
from solpath.planning.path_files import check_axes, check_seen
from solpath.pretrained import Name
from solpath.reading import Expected
from solpath.running.checkpoint import (
    State,
    check_state,
    checkpoint_file,
    read_checkpoint,
    resume_hint,
    write_checkpoint,
)
from solpath.running.claims import claimed
from solpath.running.modes import contained
from solpath.running.processes import process
from solpath.running.progress import Report, progress_bar, say
from solpath.searching.engine import Engine, open_engine
from solpath.searching.equilibrium import EquilibriumSearch
from solpath.searching.inclusion import InclusionSearch
from solpath.searching.signal import keep_pairs

_REACHED = "reached"  # bool [pairs], in a state, if not all of them are
_SEEN = "seen"  # int64 [samples], in every state but those of older versions
_BASIS = "basis/"  # prefix of the entries of a state that hold the axes of a pair
_FIGURES = "loss {task.fields[loss]:.4f}  size {task.fields[size]:.0%}"


class Method(Protocol):
    """One way to search: where it starts, what a step does, and which order it ends with.

    A step changes nothing but the state, so that the state can be written to disk and resumed. The
    entries ``history`` and ``seen`` of the state belong to `search`.

    Attributes:
        name: Name of the method in its paths.
    """

    name: str

    def basis(self, engine: Engine) -> dict[str, Tensor]:
        """Return the axes to search along, by pair name; none for the channels as they are.

        Args:
            engine: Answers for the model.
        """

    def start(self, engine: Engine) -> State:
        """Return the state before the first step.

        Args:
            engine: Answers for the model.
        """

    def expected(self, units: int, steps: int) -> Expected:
        """Return the dtype and shape of every entry of a state by name, to check a file against.

        Args:
            units: Number of units.
            steps: Number of steps that are done.
        """

    def step(self, engine: Engine, state: State, k: int) -> tuple[State, float, float]:
        """Return the state after step `k`, its loss, and the share of the cost that it stands for.

        Args:
            engine: Answers for the model.
            state: State before the step. It is not changed.
            k: Number of the step, from 0.
        """

    def looks(self, done: int) -> tuple[int, int]:
        """Return on how many batches moments are measured, and how often they are looked at.

        Args:
            done: Steps that are done.
        """

    def entry_times(self, engine: Engine, state: State) -> Tensor:
        """Return when every unit enters, the most important ones first, float64 ``[units]``.

        Args:
            engine: Answers for the model.
            state: State after the last step.
        """


@contained
def search(
    model: nn.Module | Name,
    batches: Iterable[Any],
    config: SearchConfig | InclusionConfig | None = None,
    *,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 25,
    recompute: bool | None = None,
    micro_batch: int | None = None,
    progress: bool = True,
) -> SolutionPath:
    """Put every unit of `model` in order by one search, and return the path.

    The default search and the differential inclusion it comes from (SPP, ICLR 2025, arXiv
    2501.03289, section 3) are derived in docs/method.md. The model is left as it was found, bit for
    bit. The path depends on the model, the batches, `config` and `loss` alone: not on
    `checkpoint_every`, on `progress`, or on being interrupted and resumed. On one machine with one
    number of threads it is the same to the last bit; another number of threads or processes changes
    the last bits of sums. So do kernels of a GPU that add up in any order; docs/large-models.md
    says how to turn them off.

    Args:
        model: A model of transformers or timm, searched on the device that it is on. A folder or a
            Hub id is loaded by `from_pretrained`, to the device of the batches. If that is the CPU
            and the weights do not fit into what is free, they stay on disk, and each layer's are
            read when it runs.
        batches: An iterable of dicts of arguments or of input tensors, on the model's device, with
            8 to 64 samples each. They are repeated when there are fewer than steps. An iterator may
            be endless: it is read only as far as the steps need, and what was read is kept. Rows of
            padding alone are skipped, with one warning. Labels become the inputs of a decoder that
            is given none, as in the model itself.
        config: A `SearchConfig` for the default search or an `InclusionConfig` for the paper's.
            None is ``SearchConfig()``.
        loss: A function ``loss(outputs, batch)`` that returns a scalar, a mean over the samples of
            the batch. None takes the divergence from the dense model's own output, which needs no
            labels.
        checkpoint: Folder for the state of the search. If it holds the state of the same search,
            that search is resumed.
        checkpoint_every: Steps between two checkpoints. At least 1.
        recompute: Keep only what goes into the blocks of the model, and compute the activations of
            one block after another again in the backward pass. The path is the same to the last
            bit, in less memory and a third more time. None does it if a batch needs more than is
            free, or if accelerate off-loads weights, which are read again with each block.
        micro_batch: Samples of a batch that run at once, the others after them. Less memory, with
            sums that may round otherwise. None runs all of them.
        progress: Say first what the search will take, and show a progress bar with the loss, the
            expected size and the time left.

    Returns:
        The path; `SolutionPath.plan` cuts it to any size.

    Raises:
        UnsupportedModelError: The model cannot be cut (see `find_pairs`), or it is in float16.
        FileError: The model cannot be loaded (see `from_pretrained`), or the checkpoint is damaged,
            cannot be written, or would lie beside a model, a path or a family.
        ConfigError: `config` is of another kind, `checkpoint_every` or `micro_batch` is out of its
            range, timm is needed and not installed, a measure in `MEASURES` does not count whole
            numbers, or `loss` returns anything but a scalar with a gradient.
        BatchError: There are no batches, or one is empty, on another device, or of a wrong type.
        NonFiniteLossError: The loss is NaN or infinite; the message names batch and row. The last
            checkpoint is kept.
        FingerprintError: The checkpoint belongs to another model or to other settings.
        ModelInUseError: The model is masked, or another thread works on it.

    Example:
        >>> path = solpath.search(model, batches, solpath.SearchConfig(steps=4), progress=False)
        >>> path
        SolutionPath(spp: 256 units in 6 pairs of BertForSequenceClassification,
        16,704 of 37,922 parameters prunable, 4 steps, seed 0)
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))
    """
    check_count("checkpoint_every", checkpoint_every, 1)
    if micro_batch is not None:
        check_count("micro_batch", micro_batch, 1)
    check_batches(batches)
    config = SearchConfig() if config is None else config
    check_config(config, SearchConfig, InclusionConfig)
    file = checkpoint_file(checkpoint, SEARCH_STATE)
    model, batches = for_batches(model, batches)
    with claimed(model, doing="searched"):
        opened = open_engine(
            model,
            batches,
            loss=loss,
            seed=config.seed,
            recompute=recompute,
            micro_batch=micro_batch,
        )
        kind = "divergence" if loss is None else "user"
        return _search(model, opened, config, kind, file, checkpoint_every, progress)


def _search(
    model: nn.Module,
    opened: AbstractContextManager[Engine],
    config: SearchConfig | InclusionConfig,
    loss: str,
    file: Path | None,
    checkpoint_every: int,
    progress: bool,
) -> SolutionPath:
    identity = fingerprint(model, find_pairs(model))
    header = {
        "version": 2,
        "kind": type(config).__name__,
        "config": config.to_dict(),
        "loss": loss,
        "fingerprint": asdict(identity),
    }
    state = None if file is None else read_checkpoint(file, header)
    method = _method(config)
    with opened as engine:
        costs, every = engine.count_costs(), engine.pairs
        basis: dict[str, Tensor] = {}
        done = 0
        if state is not None and file is not None:
            basis = _check(file, state, model, engine, method, config)
            if _REACHED in state:
                keep_pairs(engine, state[_REACHED])
            done = state["history"].shape[1]
        show = progress and process()[0] == 0
        if show:
            passes = config.steps - done + (config.scale_batches if state is None else 0)
            said = engine.estimate(passes, config.steps, method.looks(done))
            say(f"search: {said.line(config.steps - done)}")
        if state is None:
            basis = method.basis(engine)
        with engine.rotated(basis):
            if state is None:
                state = method.start(engine)
                names = {pair.name for pair in engine.pairs}
                basis = {name: axes for name, axes in basis.items() if name in names}
                state |= {_BASIS + name: axes for name, axes in basis.items()}
                state["history"] = torch.zeros(2, 0, dtype=torch.float64)
                state[_SEEN] = union(engine.new_samples())
                if len(names) < len(every):
                    state[_REACHED] = torch.tensor([pair.name in names for pair in every])
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
            costs=costs.only(engine.pairs),
            method=method.name,
            config=config.to_dict(),
            fingerprint=identity,
            history=state["history"],
            energy=engine.energy,
            basis=basis,
            unreached=_unreached(every, engine.pairs),
            seen=state.get(_SEEN, torch.zeros(0, dtype=torch.int64)),
        )


def _method(config: SearchConfig | InclusionConfig) -> Method:
    if isinstance(config, SearchConfig):
        return EquilibriumSearch(config)
    return InclusionSearch(config)


def _unreached(every: Sequence[Pair], reached: Sequence[Pair]) -> tuple[str, ...]:
    names = {pair.name for pair in reached}
    return tuple(pair.name for pair in every if pair.name not in names)


def _check(
    file: Path,
    state: State,
    model: nn.Module,
    engine: Engine,
    method: Method,
    config: SearchConfig | InclusionConfig,
) -> dict[str, Tensor]:
    """Raise `FileError` unless a state can be one of this search; return the axes in it."""
    steps = state.get("history", torch.zeros(2, 0)).shape[-1:].numel()
    if steps > config.steps:
        raise FileError(f"{file}: {steps} steps are done in a search of {config.steps}.")
    pairs: Sequence[Pair] = engine.pairs
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    expected["history"] = (torch.float64, (2, steps))
    if _SEEN in state:
        expected[_SEEN] = (torch.int64, (state[_SEEN].numel(),))
    if _REACHED in state:
        reached = state[_REACHED]
        expected[_REACHED] = (torch.bool, (len(pairs),))
        if reached.shape == (len(pairs),):
            pairs = [pair for pair, kept in zip(pairs, reached.tolist(), strict=True) if kept]
    if isinstance(config, SearchConfig) and config.basis == "principal":
        for pair in pairs:
            if obstacle(model, pair) is None:
                expected[_BASIS + pair.name] = (torch.float64, (pair.heads, *2 * (pair.width,)))
    expected |= method.expected(sum(pair.units for pair in pairs), steps)
    check_state(file, state, expected)
    for name in {"mask", "masks"} & state.keys():
        if not ((state[name] >= 0) & (state[name] <= 1)).all():
            raise FileError(f"{file}: {name} is not between 0 and 1.")
    loss, size = state["history"]
    if not (loss.isfinite() & (size > 0) & (size <= 1)).all():
        raise FileError(f"{file}: history has a loss that is not finite, or a size beyond 0 and 1.")
    if not pairs:
        raise FileError(f"{file}: no pair is reached.")
    basis = _basis_of(state)
    check_axes(file, basis)
    if _SEEN in state:
        check_seen(file, state[_SEEN])
    return basis


def _basis_of(state: State) -> dict[str, Tensor]:
    """Return the axes that a state holds, by pair name."""
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
    """Run the remaining steps, saving the state on the way and on Ctrl-C."""
    done = saved = state["history"].shape[1]
    try:
        for k in range(done, steps):
            after, loss, keep = method.step(engine, state, k)
            state = after | {"history": _record(state, loss, keep)} | _seen(state, engine)
            report(loss=loss, size=keep, work=engine.work(k))
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
    """Write the checkpoint, if one is kept, in the first process; return the steps it holds."""
    if file is not None and process()[0] == 0:
        write_checkpoint(file, header, state)
    return state["history"].shape[1]


def _seen(state: State, engine: Engine) -> State:
    """Return the digests of all samples up to now, if those of earlier steps are known."""
    if _SEEN not in state:
        return {}
    new = engine.new_samples()
    return {_SEEN: union(new, state[_SEEN]) if len(new) else state[_SEEN]}


def _record(state: State, loss: float, keep: float) -> Tensor:
    """Return the history with the loss and the size of one more step."""
    return torch.cat([state["history"], torch.tensor([[loss], [keep]], dtype=torch.float64)], 1)
