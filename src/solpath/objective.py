"""What a search minimises: the divergence of a model's output from the dense model's output.

What is compared follows from what the model says of itself (`kind_of`); `solpath.divergence` has
the divergences. The last matrix product of a text model is done in blocks, if it can be.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Generic, TypeAlias, TypeVar, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.data.source import slice_samples
from solpath.divergence import Kind, averaged, curvature_sketch, divergence, token_mean
from solpath.errors import ConfigError
from solpath.running.forward import (
    Batch,
    at_least_float,
    attended,
    has_logits,
    has_spans,
    is_per_token,
    output_mask,
    output_tensor,
    run,
)
from solpath.running.head import (
    HeadTarget,
    blocks_of,
    head_divergence,
    head_target,
    mean_of_drawn,
    output_embedding,
    run_without_head,
    separable_head,
)

TARGET_CACHE_BYTES = 256 * 2**20
"""Most bytes of dense targets that are remembered."""

_DRAWS = 8  # tokens drawn for every token of a text, in the place of noise on its logits

Loss = Callable[[Any, Batch], Tensor]
"""A function ``loss(outputs, batch)`` that returns a scalar: a mean over the batch's samples."""

Kept = TypeVar("Kept")


def mean_loss(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """Return what a user's loss gives for a batch, a scalar.

    Where gradients are off, a plain number will do.

    Args:
        loss: The loss of the user.
        outputs: What a model returned for the batch.
        batch: The batch.

    Raises:
        ConfigError: The loss is no function, it returns anything but one number, or there is no
            gradient to take of it where gradients are on.

    Example:
        >>> loss = lambda outputs, batch: outputs.logits.square().mean()
        >>> mean_loss(loss, model(**batch), batch).shape
        torch.Size([])
    """
    if not callable(loss):
        raise ConfigError(f"loss must be a function loss(outputs, batch), got {loss!r:.60}.")
    graded, value = torch.is_grad_enabled(), cast("Any", loss)(outputs, batch)
    if isinstance(value, Real) and not graded:
        value = torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise ConfigError(
            f"loss returned {value!r:.60}, a {type(value).__name__}; let it return a scalar tensor,"
            " the mean over the samples of the batch."
        )
    if value.numel() != 1:
        raise ConfigError(
            f"loss returned a tensor of shape {list(value.shape)}, not one number; let it return "
            "the mean over the samples of the batch, for example with .mean()."
        )
    if graded and not value.requires_grad:
        raise ConfigError(
            "loss returned a tensor without a gradient, which is needed here; compute it from the "
            "outputs, without detach(), item() or torch.no_grad()."
        )
    return value.reshape(())


def kind_of(model: nn.Module, outputs: Any) -> Kind:
    """Return what the outputs of a model mean, from its configuration and their class.

    Args:
        model: Its ``config.problem_type`` decides about the logits of a classifier.
        outputs: What the model returned.

    Raises:
        BatchError: The outputs have nothing, or too much, to compare (see `output_tensor`).

    Example:
        >>> kind_of(model, model(**batch))
        'classes'
    """
    output = output_tensor(outputs)
    if has_spans(outputs):
        return "spans"
    if not has_logits(outputs):
        return "hidden"
    if is_per_token(outputs):
        return "labels"
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None) if output.dim() == 2 else None
    if output.shape[-1] == 1 or problem == "regression":
        return "regression"
    if problem == "multi_label_classification":
        return "labels"
    return "classes"


Target: TypeAlias = Tensor | HeadTarget
"""What the dense model gives a batch: its output, or what stands for its logits."""


class Objective:
    """How far the outputs of a smaller model are from those of its dense model.

    One sample says what is compared. Only a regression looks at another batch, the first: its
    spread is the mean squared distance of the dense outputs of that batch from their mean, or their
    mean square if they are all equal. Logits over a vocabulary are never made whole if the output
    embedding is a layer of its own (see `separable_head`): models are run up to it, and compared
    block by block.

    Args:
        dense: The dense model.
        first: Returns the whole first batch, on the device of the models. Every process must
            return the same.
        smaller: The smaller models that will be compared, besides the dense model under masks.
            Logits are made whole if one of them has another output embedding.
        whole: Whether targets must be whole outputs, which `divergence` takes.
    """

    def __init__(
        self,
        dense: nn.Module,
        first: Callable[[], Batch],
        *,
        smaller: Sequence[nn.Module] = (),
        whole: bool = False,
    ) -> None:
        self._dense, self._first, self._smaller, self._whole = dense, first, smaller, whole
        self._kind: Kind | None = None
        self._separable = False
        self._spread = 1.0

    def run(self, model: nn.Module, batch: Batch) -> Any:
        """Run a model without labels; return its outputs, or what its output embedding gets.

        Args:
            model: The dense model or a smaller one.
            batch: The batch.
        """
        self.learn(batch)
        if self._separable:
            return run_without_head(model, _head(model), batch)
        return run(model, batch, labels=False)

    def target(self, batch: Batch) -> Target:
        """Return what the dense model gives a batch, without gradients; labels are left out."""
        with torch.no_grad():
            outputs = self.run(self._dense, batch)
            if self._separable:
                return head_target(_head(self._dense), outputs)
            return output_tensor(outputs).clone()

    def divergence(self, target: Target, outputs: Any, batch: Batch) -> Tensor:
        """Return the `divergence` of every sample from the dense model's output, ``[batch]``.

        Args:
            target: From `target`, for the same batch.
            outputs: From `run`, of the smaller model.
            batch: The batch, whose mask says which tokens count.
        """
        if isinstance(target, HeadTarget):
            tokens = head_divergence(_head(self._dense), outputs, target)
            return token_mean(tokens, output_mask(batch, outputs))
        output = output_tensor(outputs)
        mask = self._mask(batch, output)
        return divergence(output, target, mask, kind=self._known, spread=self._spread)

    def projection(
        self, target: Target, outputs: Any, batch: Batch, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Return a random projection of the outputs of every sample, ``[batch]``.

        The derivatives of the projection have the second moments of the curvature of the
        divergence at the target: it is ``⟨u, f⟩`` with u of that covariance. Where logits are
        never whole, u is the mean of some draws of ``e_y - p``, y from p, times the root of their
        number.

        Args:
            target: From `target`, for the same batch.
            outputs: From `run`, of the dense model under masks.
            batch: The batch, whose mask says which tokens count.
            generators: One for every sample.
        """
        if isinstance(target, HeadTarget):
            head, states = _head(self._dense), target.states
            shape = (states.shape[1], _DRAWS, blocks_of(head))
            chance = torch.stack([torch.rand(shape, generator=one) for one in generators])
            drawn = mean_of_drawn(head, states, chance.to(states.device))
            draw = averaged((drawn - target.mean) * math.sqrt(_DRAWS), output_mask(batch, states))
            return (draw * at_least_float(outputs)).flatten(1).sum(1)
        output = output_tensor(outputs)
        noise = torch.stack([torch.randn(output.shape[1:], generator=one) for one in generators])
        mask, noise = self._mask(batch, target), noise.to(output.device)
        draw = curvature_sketch(target, mask, noise, kind=self._known, spread=self._spread)
        return (draw * at_least_float(output)).reshape(len(draw), -1).sum(1)

    def learn(self, batch: Batch) -> None:
        """Learn, once, from the dense model on a sample of a batch what is compared, and how.

        `run` does it where it was not done before.
        """
        if self._kind is not None:
            return
        sample = slice_samples(batch, 0, 1)
        with torch.no_grad():
            outputs = run(self._dense, sample, labels=False)
            self._kind = kind_of(self._dense, outputs)
            if self._kind == "regression":
                first = self._first()
                whole = output_tensor(run(self._dense, first, labels=False))
                mask = output_mask(first, whole)
                rows = whole.flatten(0, -2) if mask is None else whole[mask]
                self._spread = _spread(rows.double())
            if self._kind == "classes" and not self._whole:
                head = separable_head(self._dense, sample, output_tensor(outputs))
                self._separable = head is not None and all(
                    _equal(head, _head(model)) for model in self._smaller
                )

    def _mask(self, batch: Batch, output: Tensor) -> Tensor | None:
        return attended(batch, output) if self._known == "spans" else output_mask(batch, output)

    @property
    def _known(self) -> Kind:
        assert self._kind is not None, "run a model first"
        return self._kind


def _equal(one: nn.Linear, other: nn.Linear) -> bool:
    """Return whether two layers have equal weights and biases, those that are packed never."""
    with align_module_device(one), align_module_device(other):
        mine, theirs = one.state_dict(), other.state_dict()
        return mine.keys() == theirs.keys() and all(
            type(value) is type(theirs[name]) is Tensor and torch.equal(value, theirs[name])
            for name, value in mine.items()
        )


def _head(model: nn.Module) -> nn.Linear:
    return cast("nn.Linear", output_embedding(model))


def _spread(values: Tensor) -> float:
    """The mean squared distance of rows from their mean; of rows that are all equal, from 0."""
    error = float((values - values.mean(0)).square().sum(-1).mean())
    square = float(values.square().sum(-1).mean())
    return (error if error > 1e-12 * square else square) or 1.0


class Targets(Generic[Kept]):
    """A memory for the targets of batches that come again, of at most 256 MiB."""

    def __init__(self) -> None:
        self._known: dict[int, Kept] = {}
        self._bytes = 0

    def get(self, index: int | None, compute: Callable[[], Kept]) -> Kept:
        """Return the target of a batch, computed unless it is remembered.

        Args:
            index: Number of the batch among those that repeat. None, where it is not known,
                remembers nothing.
            compute: Called to compute the target.
        """
        if index is None:
            return compute()
        if index in self._known:
            return self._known[index]
        target = compute()
        size = sum(part.nbytes for part in tree_leaves(target))
        if self._bytes + size <= TARGET_CACHE_BYTES:
            self._bytes += size
            self._known[index] = target
        return target
