"""Tune a smaller model: train it to give the outputs of the dense one, without labels."""

import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from solpath.config import TuneConfig, check_count
from solpath.data.source import BatchSource, derive_seed
from solpath.errors import BatchError, UnsupportedModelError
from solpath.model.extraction import copy_extracted
from solpath.model.fingerprint import weights_digest
from solpath.refining.adapters import add_adapters_, merge_adapters_
from solpath.refining.distillation import Distillation
from solpath.refining.distributed import accelerating
from solpath.refining.training import Training, train_
from solpath.running.checkpoint import read_checkpoint
from solpath.running.modes import evaluating, keeping_random_state
from solpath.running.progress import progress_bar

Model = TypeVar("Model", bound=nn.Module)

_FIGURES = (
    "loss {task.fields[loss]:.4f}  held out {task.fields[now]:.4f}  best {task.fields[best]:.4f}"
)


def tune(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    config: TuneConfig | None = None,
    *,
    heldout: Iterable[Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> Model:
    """Train a copy of `small` to give the outputs of `dense`, on unlabelled batches.

    The loss is that of the search: KL of the logits, or the squared error of the last hidden
    states. Parameters of `small` that do not require gradients stay as they are. The weights with
    the least held-out loss are returned, and the start counts: on the held-out batches the result
    is never worse than `small`. Dropout is off. Both models are left as they were found.

    On one machine with one number of threads the result is bit-identical from run to run and does
    not depend on `checkpoint_every`, on `progress`, or on being interrupted and resumed. Several
    processes (``accelerate launch``, ``torchrun``) must see the same batches; each takes its share
    of the samples of each, which gives the same updates up to sums of floats.

    Args:
        small: from `extract` or `load`; any module with outputs of the shape of `dense`'s will do.
            Tuning runs where it is.
        dense: the model to imitate, on the same device.
        batches: iterable of what both models take, repeated when shorter than the steps.
        config: see `TuneConfig`.
        heldout: batches that decide which weights are best. Default: the last tenth of
            `batches`, which must then be a sequence of at least 10.
        checkpoint: folder for the state. If it holds the state of the same tuning, that goes on.
        checkpoint_every: steps between checkpoints; each is four times the trained weights.
        progress: show a progress bar with loss, held-out loss and time left.

    Returns:
        A model like `small` with other weights: same class, plan, flags, names and shapes.

    Raises:
        BatchError: empty batches, on another device, or outputs of different shapes.
        ConfigError: `lora_rank` without peft, a bad `checkpoint_every`, or a way of ``accelerate``
            that does not fit.
        FileError: a damaged checkpoint, or one that cannot be written.
        UnsupportedModelError: no parameter to train, or half-precision ones.
        NonFiniteLossError: the loss became NaN or infinite; the last checkpoint is kept.
        FingerprintError: the checkpoint belongs to other models or other settings.

    Example:
        >>> small = solpath.extract(dense, path.plan(sparsity=0.6))  # doctest: +SKIP
        >>> tuned = solpath.tune(small, dense, batches)  # doctest: +SKIP
        >>> solpath.save(tuned, "tuned/")  # doctest: +SKIP
    """
    check_count("checkpoint_every", checkpoint_every, 1)
    config = config or TuneConfig()
    device = _check_model(small, config)
    file = None if checkpoint is None else Path(checkpoint) / "tune.safetensors"
    header: dict[str, Any] = {"kind": "TuneConfig", "version": 2, "config": config.to_dict()}
    header["fingerprint"] = {}
    if file is not None:
        header["fingerprint"] = {"small": weights_digest(small), "dense": weights_digest(dense)}
    state = None if file is None else read_checkpoint(file, header)

    with (
        accelerating(device, config.mixed_precision) as accelerator,
        keeping_random_state(small),
        torch.enable_grad(),
        evaluating(dense),
    ):
        torch.manual_seed(derive_seed(config.seed, "tune"))
        train, held = _split(batches, heldout, config.seed)
        bf16 = config.mixed_precision == "bf16"
        taught = Distillation(dense, train, device, accelerator, bf16=bf16)
        judge = Distillation(dense, held, device, accelerator, bf16=False)
        work = copy_extracted(small).eval()
        if config.lora_rank is not None:
            add_adapters_(work, config.lora_rank, config.lora_alpha)
        training = Training(work, config, taught, judge, accelerator, _width(small))
        if state is not None and file is not None:
            training.restore_(state, file)
        show = progress and accelerator.is_main_process
        figures = {"loss": math.nan, "now": math.nan, "best": math.nan}
        with progress_bar(
            "tune", _FIGURES, config.steps, training.steps, show=show, **figures
        ) as report:
            train_(training, file, header, checkpoint_every, report)
        return _result(small, config, training, judge)


def _result(small: Model, config: TuneConfig, training: Training, judge: Distillation) -> Model:
    """A copy of `small` with the best weights."""
    result = copy_extracted(small)
    values: Mapping[str, Tensor] = training.best
    if config.lora_rank is not None:
        tuner = add_adapters_(copy_extracted(small), config.lora_rank, config.lora_alpha)
        values = merge_adapters_(tuner, training.best)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    if config.lora_rank is not None:  # a merge rounds, so look again
        with evaluating(result):
            merged = judge.divergence(result)
        if not merged < training.checks[0][1]:
            return copy_extracted(small)
    return result


def _width(model: nn.Module) -> float:
    """Median number of inputs of the matrices that are trained."""
    inputs = [p.shape[-1] for p in model.parameters() if p.requires_grad and p.dim() == 2]
    return statistics.median(inputs) if inputs else 1.0


def _split(
    batches: Iterable[Any], heldout: Iterable[Any] | None, seed: int
) -> tuple[BatchSource, BatchSource]:
    """Batches to train on and batches to judge by."""
    train = BatchSource(batches, seed)
    if heldout is not None:
        held = BatchSource(heldout, seed)
        if held.length is None:  # a loader, read once
            torch.manual_seed(derive_seed(seed, "heldout"))
            held = BatchSource(list(heldout), seed)
        return train, held
    if not isinstance(batches, Sequence) or len(batches) < 10:
        found = f"{train.length} batches" if train.length else f"a {type(batches).__name__}"
        raise BatchError(
            f"cannot hold out a tenth of {found}; pass heldout=, or a sequence of at least 10."
        )
    count = len(batches) // 10
    last = list(batches[-count:])  # read once, as they are looked at again and again
    return BatchSource(batches[:-count], seed), BatchSource(last, seed)


def _check_model(model: nn.Module, config: TuneConfig) -> torch.device:
    """Where the model is. Raises `UnsupportedModelError` if it cannot be trained."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UnsupportedModelError(
            f"no parameter of this {type(model).__name__} requires gradients; call "
            "requires_grad_() on what is to be trained."
        )
    for name, parameter in trained:
        if config.lora_rank is None and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UnsupportedModelError(
                f"{name} is {parameter.dtype}, in which small updates are lost to rounding; use "
                "model.float() with mixed_precision='bf16', or lora_rank."
            )
    return trained[0][1].device
