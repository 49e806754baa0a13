"""Tune a smaller model: train it to give the outputs of the dense model, without labels."""

import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from solpath.config import TuneConfig, check_config, check_count
from solpath.data.preparation import Preparation, preparing
from solpath.data.source import BatchSource, check_ends, derive_seed
from solpath.errors import BatchError, UnsupportedModelError
from solpath.holding import TUNE_STATE
from solpath.model.extraction import copy_extracted
from solpath.model.fingerprint import weights_digest
from solpath.model.plain import check_floats
from solpath.objective import Loss
from solpath.refining.adapters import add_adapters_, merge_adapters_
from solpath.refining.distillation import Distillation
from solpath.refining.distributed import (
    accelerating,
    aliased,
    is_sharding,
    sharded_like,
    unalias_,
)
from solpath.refining.training import Training, prepared, train_
from solpath.running.checkpoint import checkpoint_file, read_checkpoint
from solpath.running.claims import claimed
from solpath.running.forward import device_of
from solpath.running.modes import contained, evaluating, gradients, keeping_random_state
from solpath.running.placement import is_placed
from solpath.running.progress import progress_bar
from solpath.wrapping import unwrapped

Model = TypeVar("Model", bound=nn.Module)

_FIGURES = (
    "loss {task.fields[loss]:.4f}  held out {task.fields[now]:.4f}  best {task.fields[best]:.4f}"
)


@contained
def tune(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    config: TuneConfig | None = None,
    *,
    heldout: Iterable[Any] | None = None,
    loss: Loss | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> Model:
    """Train a copy of `small` to give the outputs of `dense`, on batches without labels.

    The loss is that of the search, the divergence from the dense model (docs/method.md), or one of
    yours. Parameters of `small` that do not require gradients stay as they are, and dropout is
    off. The weights with the least held-out loss are returned, and those before the first step
    compete: on the held-out batches the result is never worse than `small`. Both models are left as
    they were found.

    On one machine with one number of threads the result is the same bit for bit in every run, but
    for kernels of a GPU that add up in any order (see docs/large-models.md). It does not depend on
    `checkpoint_every`, on `progress`, or on being interrupted and resumed.
    Several processes (``accelerate launch``, ``torchrun``) must see the same batches. Each takes
    some samples of every batch, which gives the updates of a single process up to the rounding of
    sums.

    Args:
        small: A model from `extract` or `load`, or any module whose outputs have the shape of
            `dense`'s. Tuning runs on its device.
        dense: The model to imitate, on the same device.
        batches: An iterable of what both models take. It is repeated if it is shorter than the
            training. An iterator may be endless: it is read only as far as the steps need, and what
            was read is kept. Rows of padding alone are skipped, with one warning.
        config: The settings; None takes `TuneConfig` as it is.
        heldout: The held-out batches, which decide which weights are best. None takes the last
            tenth of `batches`, which must then be a sequence of at least 10. All of them are read
            and kept, so they must have a length.
        loss: ``loss(outputs, batch)``, a mean over samples, that is trained on and judged by in
            place of the divergence from `dense`. It gets the labels of the batches.
        checkpoint: A folder for the state. If it holds the state of the same tuning, that tuning is
            resumed. None saves no state.
        checkpoint_every: Steps between checkpoints. A checkpoint is about four times as large as
            the weights that are trained.
        progress: Whether to show a progress bar with the loss, the held-out loss and the time left.

    Returns:
        A model with other weights and the class, plan, flags, names and shapes of `small`.

    Raises:
        BatchError: There are no batches or too few to hold some out, a batch is on another device
            or has fewer samples than there are processes, or the outputs of the models differ in
            shape.
        ConfigError: `config` is no `TuneConfig`, `lora_rank` is set and peft is not installed,
            `checkpoint_every` is below 1, ``accelerate`` is set up in a way that does not fit,
            `loss` is negative at the start, from which no default learning rate follows, or it
            returns anything but a scalar with a gradient.
        FileError: A checkpoint is damaged, cannot be written, or would lie beside a model, a path
            or a family.
        UnsupportedModelError: No parameter can be trained, one is quantised, or one that is to be
            trained is in half precision and `lora_rank` is None. Adapters are trained in float32
            and merged once. Or `lora_rank` is set, and `small` has adapters of peft already.
        NonFiniteLossError: The loss became NaN or infinite; the message names batch and row. The
            last checkpoint is kept.
        FingerprintError: The checkpoint belongs to other models or other settings.
        ModelInUseError: A model is masked or searched, or another thread works on it.

    Example:
        >>> config = solpath.TuneConfig(steps=2, learning_rate=1e-4)
        >>> tuned = solpath.tune(small, model, batches, config, progress=False)
        >>> tuned.solpath_plan is small.solpath_plan
        True
    """
    check_count("checkpoint_every", checkpoint_every, 1)
    config = TuneConfig() if config is None else config
    check_config(config, TuneConfig)
    if heldout is not None:
        check_ends(heldout, "heldout")
    small = cast("Model", unwrapped(small, adapters=config.lora_rank is None))
    dense = unwrapped(dense, adapters=True)
    device = _check_model(small, config)
    file = checkpoint_file(checkpoint, TUNE_STATE)
    with claimed(small, dense, doing="tuned"):
        return _tune(
            small, dense, batches, config, heldout, loss, file, checkpoint_every, progress, device
        )


def _tune(
    small: Model,
    dense: nn.Module,
    batches: Iterable[Any],
    config: TuneConfig,
    heldout: Iterable[Any] | None,
    loss: Loss | None,
    file: Path | None,
    checkpoint_every: int,
    progress: bool,
    device: torch.device,
) -> Model:
    header: dict[str, Any] = {"kind": "TuneConfig", "version": 5, "config": config.to_dict()}
    header["fingerprint"] = {}
    if loss is not None:
        header["loss"] = "user"
    if file is not None:
        header["fingerprint"] = {"small": weights_digest(small), "dense": weights_digest(dense)}
    state = None if file is None else read_checkpoint(file, header)

    with (
        accelerating(device, config.mixed_precision) as accelerator,
        keeping_random_state(),
        gradients(True),
        evaluating(dense),
    ):
        sharding = is_sharding(accelerator)
        devices = {device, device_of(dense)}
        if sharding and accelerator.device.type != device.type:  # its shards are on GPUs
            device = accelerator.device
            devices = {device}
        with (
            preparing(small, *devices) as prepare,
            preparing(small, *devices, name="held-out batch") as prepare_held,
        ):
            torch.manual_seed(derive_seed(config.seed, "tune"))
            train, held = _split(batches, heldout, config.seed, prepare, prepare_held)
            alias = sharding and not is_placed(small)
            work = (aliased(small) if alias else copy_extracted(small)).eval()
            if config.lora_rank is not None:
                add_adapters_(work, config.lora_rank, config.lora_alpha)
            model, optimizer = prepared(work, config, accelerator)
            if alias:
                unalias_(model)
            teacher = sharded_like(dense, model)
            bf16 = config.mixed_precision == "bf16"
            common: Any = {"device": device, "accelerator": accelerator, "loss": loss}
            taught = Distillation(teacher, train, prepare, bf16=bf16, **common)
            judge = Distillation(teacher, held, prepare_held, bf16=False, **common)
            training = Training(
                model, optimizer, config, taught, judge, accelerator, typical_width(small)
            )
            if state is not None and file is not None:
                training.restore_(state, file)
            show = progress and accelerator.is_main_process
            figures = {"loss": math.nan, "now": math.nan, "best": math.nan}
            with progress_bar(
                "tune", _FIGURES, config.steps, training.steps, show=show, **figures
            ) as report:
                train_(training, file, header, checkpoint_every, report)
            return _result(small, config, training, model, judge)


def _result(
    small: Model,
    config: TuneConfig,
    training: Training,
    trained: nn.Module,
    judge: Distillation,
) -> Model:
    """Return a copy of `small` with the best weights."""
    best: Iterable[tuple[str, Tensor]] = training.finish_()
    result = copy_extracted(small)
    if config.lora_rank is not None:
        tuner = add_adapters_(copy_extracted(small), config.lora_rank, config.lora_alpha)
        best = merge_adapters_(tuner, dict(best)).items()
    own = dict(result.named_parameters())
    with torch.no_grad():
        for name, value in best:
            own[name].copy_(value)
    if config.lora_rank is not None:  # a merge rounds, so the result is checked once more
        with evaluating(result):
            merged = judge.divergence(sharded_like(result, trained))
        if not merged < training.checks[0][1]:
            return copy_extracted(small)
    return result


def typical_width(model: nn.Module) -> float:
    """Return the median number of inputs of the matrices that are trained, which are not empty."""
    first = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    trained = (p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p.numel())
    inputs = [matrix.shape[0 if id(matrix) in first else 1] for matrix in trained]
    return statistics.median(inputs) if inputs else 1.0


def _split(
    batches: Iterable[Any],
    heldout: Iterable[Any] | None,
    seed: int,
    prepare: Preparation,
    prepare_held: Preparation,
) -> tuple[BatchSource, BatchSource]:
    """Return the batches to train on and the held-out batches.

    Raise `BatchError` if none can be held out.
    """
    train = BatchSource(batches, seed, prepare)
    if heldout is not None:
        if not isinstance(heldout, Sequence):  # a DataLoader, read only once
            torch.manual_seed(derive_seed(seed, "heldout"))
            heldout = list(heldout)
        return train, BatchSource(heldout, seed, prepare_held)
    if not isinstance(batches, Sequence) or len(batches) < 10:
        found = f"{train.length} batches" if train.length else f"a {type(batches).__name__}"
        raise BatchError(
            f"cannot hold out a tenth of {found}; pass heldout=, or a sequence of at least 10."
        )
    count = len(batches) // 10
    last = list(batches[-count:])  # read only once, although every check needs them
    return BatchSource(batches[:-count], seed, prepare), BatchSource(last, seed, prepare_held)


def _check_model(model: nn.Module, config: TuneConfig) -> torch.device:
    """Return the device of the model; raise `UnsupportedModelError` if it cannot be trained."""
    check_floats(model, "tune before quantising")
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
                "lora_rank, or tune model.float() (--dtype float32 on the command line) and cast "
                "the result back."
            )
    return device_of(model)
