"""One search over a model; its result is an order that gives every size."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.config import InclusionConfig, SearchConfig, check_count
from solpath.errors import NonFiniteLossError
from solpath.model.basis import turned
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs, fingerprint
from solpath.objective import Loss
from solpath.pair import Fingerprint, Pair
from solpath.planning.cost import CostTable
from solpath.planning.path import SolutionPath, unflatten
from solpath.pretrained import Name, for_batches
from solpath.running.checkpoint import State, kept, read_checkpoint, write_checkpoint
from solpath.running.progress import Report, progress_bar
from solpath.searching.dynamics import (
    Equilibrium,
    Inclusion,
    equilibrium_step,
    extrapolated_entry,
    inclusion_step,
    read_order,
)
from solpath.searching.probe import Probe, probing, process
from solpath.searching.redundancy import Inputs, own_share

_OWN_EVERY = 20  # steps between looks at what units can make up for each other
_BASIS = "basis/"  # before the name of a pair, in a state
_FIGURES = "loss {task.fields[loss]:.4f}  size {task.fields[size]:.0%}"


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
    pairs = find_pairs(model)
    identity = fingerprint(model, pairs)
    file = None if checkpoint is None else Path(checkpoint) / "search.safetensors"
    header = {
        "version": 1,
        "kind": type(config).__name__,
        "config": config.to_dict(),
        "loss": "divergence" if loss is None else "user",
        "fingerprint": asdict(identity),
    }
    state = None if file is None else read_checkpoint(file, header)

    with probing(model, pairs, batches, loss=loss, seed=config.seed) as probe:
        costs = count_costs(model, pairs, probe.first_sample())
        basis = _basis(probe, config, state)
        with turned(model, pairs, basis):
            state = state or _start(probe, config, basis)
            show, done = progress and process()[0] == 0, state["history"].shape[1]
            with progress_bar(
                "search", _FIGURES, config.steps, done, show=show, loss=0.0, size=1.0
            ) as report:
                own = _Own(model, pairs, _inputs(probe, config))
                state = _run(probe, config, state, own, file, header, checkpoint_every, report)
        return _path(pairs, config, state, costs, identity, probe.energy)


def _basis(
    probe: Probe, config: SearchConfig | InclusionConfig, state: State | None
) -> dict[str, Tensor]:
    """The axes to search along: those of the state that goes on, or measured."""
    if isinstance(config, InclusionConfig) or config.basis == "coordinate":
        return {}
    return probe.measure_basis(config.scale_batches) if state is None else _basis_of(state)


def _inputs(probe: Probe, config: SearchConfig | InclusionConfig) -> Inputs:
    """What units are predicted from, where that counts; it is measured again on the way on."""
    if isinstance(config, InclusionConfig) or not config.compensated:
        return {}
    return probe.measure_inputs(config.scale_batches)


def _basis_of(state: State) -> dict[str, Tensor]:
    found = {name: value for name, value in state.items() if name.startswith(_BASIS)}
    return {name.removeprefix(_BASIS): value for name, value in found.items()}


def _start(
    probe: Probe, config: SearchConfig | InclusionConfig, basis: Mapping[str, Tensor]
) -> State:
    scale, slope = probe.curvature(config.scale_batches)
    zeros = torch.zeros_like(scale)
    state = {"scale": scale, "mask": torch.ones_like(scale), "history": torch.zeros(2, 0)}
    state["history"] = state["history"].double()
    if isinstance(config, SearchConfig):
        state |= {"marginal": scale / 2 - slope, "noise": zeros}
        state["masks"] = torch.zeros(0, probe.units, dtype=torch.float16)
    else:
        state |= {"dual": zeros, "entry": torch.full_like(zeros, torch.inf)}
    return state | {f"{_BASIS}{name}": value for name, value in basis.items()}


class _Own:
    """What of each unit counts, by step: `own_share` at the masks of a few steps ago, or all."""

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], inputs: Inputs) -> None:
        self._model, self._pairs, self._inputs = model, pairs, inputs
        self._step = -1
        self._share: Tensor | None = None

    def __call__(self, masks: Tensor) -> Tensor | None:
        """For the step that follows `masks`, ``[steps, units]``: a function of these alone."""
        step = len(masks) // _OWN_EVERY * _OWN_EVERY
        if self._inputs and step != self._step:
            mask = masks[step - 1] if step else torch.ones(masks.shape[1])
            self._step = step
            self._share = own_share(self._model, self._pairs, self._inputs, mask)
        return self._share


def _run(
    probe: Probe,
    config: SearchConfig | InclusionConfig,
    state: State,
    own: _Own,
    file: Path | None,
    header: Mapping[str, Any],
    every: int,
    report: Report,
) -> State:
    done = saved = state["history"].shape[1]
    try:
        for k in range(done, config.steps):
            if isinstance(config, SearchConfig):
                state = _equilibrium(probe, config, state, own(state["masks"]), k)
            else:
                state = _inclusion(probe, config, state, k)
            loss, size = state["history"][:, -1].tolist()
            report(loss=loss, size=size)
            if (k + 1) % every == 0 or k + 1 == config.steps:
                saved = _save(file, header, state)
    except NonFiniteLossError as error:
        text = f"{str(error).rstrip('.')} of {config.steps}{kept(file, saved)}."
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


def _equilibrium(
    probe: Probe, config: SearchConfig, state: State, own: Tensor | None, k: int
) -> State:
    """One step of the default search; returns a new state."""
    loss, rows, gradient = probe.gradients(k, state["mask"], binary=config.binary)
    marginals = state["scale"] * (rows - 0.5) - gradient
    mean, variance = probe.mean(marginals, probe.batch_size(k))
    keep = _share(config, k)
    after = equilibrium_step(
        Equilibrium(state["marginal"], state["noise"] if k else variance, state["mask"]),
        mean,
        variance,
        scale=state["scale"],
        cost=probe.cost,
        pair=probe.pair,
        share=keep,
        momentum=config.momentum,
        relaxation=config.relaxation,
        sharpness=config.sharpness,
        shrinkage=config.shrinkage,
        own=own,
    )
    masks = torch.cat([state["masks"], after.mask.half().unsqueeze(0)])
    return state | after._asdict() | {"masks": masks, "history": _record(state, loss, keep)}


def _share(config: SearchConfig, k: int) -> float:
    if not config.growing_pull:
        return 0.5
    return 1 - (1 - config.final_size) * (k + 1) / config.steps


def _inclusion(probe: Probe, config: InclusionConfig, state: State, k: int) -> State:
    """One step of the paper's inclusion; returns a new state."""
    loss, _, gradient = probe.gradients(k, state["mask"], binary=False)
    nu, lam = inclusion_constants(config, state["scale"])
    after = inclusion_step(
        Inclusion(state["mask"], state["dual"], state["entry"]),
        probe.mean(gradient, probe.batch_size(k))[0],
        scale=state["scale"],
        nu=nu,
        kappa=config.kappa,
        lam=lam,
        step_size=config.step_size,
        time=k,
    )
    keep = float((after.mask * probe.cost).sum() / probe.cost.sum())
    return state | after._asdict() | {"history": _record(state, loss, keep)}


def inclusion_constants(config: InclusionConfig, scale: Tensor) -> tuple[float, float]:
    """ν and λ of the inclusion, with the defaults that follow from the scale and the steps."""
    positive = scale[scale > 0]
    median = float(positive.median()) if len(positive) else 1.0
    nu = 0.2 / median if config.nu is None else config.nu
    lam = config.step_size * config.steps / 4 if config.lam is None else config.lam
    return nu, lam


def _record(state: State, loss: float, keep: float) -> Tensor:
    return torch.cat([state["history"], torch.tensor([[loss], [keep]], dtype=torch.float64)], 1)


def _path(
    pairs: Sequence[Pair],
    config: SearchConfig | InclusionConfig,
    state: State,
    costs: CostTable,
    identity: Fingerprint,
    energy: Mapping[str, Tensor],
) -> SolutionPath:
    if isinstance(config, SearchConfig):
        sizes = torch.tensor([pair.units for pair in pairs])
        cost = torch.tensor([float(p.cost) for p in pairs]).repeat_interleave(sizes).double()
        entry = read_order(
            state["masks"].float(),
            state["history"][1].tolist(),
            cost,
            [(pair.heads, pair.width) for pair in pairs],
            round(config.memory * config.steps),
        )
        method = "spp"
    else:
        lam = inclusion_constants(config, state["scale"])[1]
        final = Inclusion(state["mask"], state["dual"], state["entry"])
        entry = extrapolated_entry(final, lam, config.steps)
        method = "inclusion"
    return SolutionPath(
        pairs=tuple(pairs),
        score=unflatten(pairs, -entry),
        entry_time=unflatten(pairs, entry),
        costs=costs,
        method=method,
        config=config.to_dict(),
        fingerprint=identity,
        history=state["history"],
        energy=energy,
        basis=_basis_of(state),
    )
