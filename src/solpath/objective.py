"""What a search minimises: the divergence of a model's output from the dense model's output.

What is compared follows from what the model says of itself (`kind_of`):

| kind | models | divergence of a sample |
|---|---|---|
| ``classes`` | language models, classifiers, multiple choice, next sentence | KL(target, output) |
| ``labels`` | multi-label classifiers, ELECTRA's discriminator | mean KL of every yes or no |
| ``spans`` | question answering | mean KL over positions, of start and end |
| ``regression`` | one output or ``problem_type="regression"`` | squared error / spread of targets |
| ``hidden`` | no head, embeddings, images, bare tensors | squared error / squared target |

Each is 0, with gradient 0, where output and target are equal.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from solpath.data.source import slice_samples
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

_TINY = 1e-30
_DRAWS = 8  # tokens drawn for every token of a text, in the place of noise on its logits

Loss = Callable[[Any, Batch], Tensor]
"""A function ``loss(outputs, batch)`` that returns a scalar: a mean over the batch's samples."""

Kept = TypeVar("Kept")

Kind = Literal["classes", "labels", "spans", "regression", "hidden"]
"""What an output means, and so how far one is from another."""


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
        self._learn(batch)
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
            return _token_mean(tokens, output_mask(batch, outputs))
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
            draw = _averaged((drawn - target.mean) * math.sqrt(_DRAWS), output_mask(batch, states))
            return (draw * at_least_float(outputs)).flatten(1).sum(1)
        output = output_tensor(outputs)
        noise = torch.stack([torch.randn(output.shape[1:], generator=one) for one in generators])
        mask, noise = self._mask(batch, target), noise.to(output.device)
        draw = curvature_sketch(target, mask, noise, kind=self._known, spread=self._spread)
        return _total(draw * at_least_float(output))

    def _learn(self, batch: Batch) -> None:
        """Learn, once, from the dense model on a sample of a batch what is compared, and how."""
        if self._kind is not None:
            return
        sample = slice_samples(batch, 0, 1)
        with torch.no_grad():
            outputs = run(self._dense, sample, labels=False)
            self._kind = kind_of(self._dense, outputs)
            if self._kind == "regression":
                whole = output_tensor(run(self._dense, self._first(), labels=False))
                self._spread = _spread(whole.double().flatten(0, -2))
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


def divergence(
    output: Tensor, target: Tensor, mask: Tensor | None, *, kind: Kind, spread: float = 1.0
) -> Tensor:
    """Return how far every sample is from its target; docs/method.md, "Objective".

    Where output and target are equal, the divergence and its gradient are 0.

    Args:
        output: Output of the model, ``[batch, ..., features]``.
        target: Output of the dense model, of the same shape.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        kind: What the outputs mean; the divergences are in the table of this module, those of
            logits in nats.
        spread: For a regression, what the squared error is divided by.

    Returns:
        float32 ``[batch]``, or float64 where an input is. A sample without any token that counts
        is 0.

    Example:
        >>> output = torch.tensor([[0.0, 2.0], [0.0, 1.0]])
        >>> target = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> divergence(output, target, None, kind="hidden").tolist()
        [1.0, 0.0]
    """
    output, target = at_least_float(output), at_least_float(target)
    if kind == "hidden":
        error, norm = (output - target).square().sum(-1), target.square().sum(-1)
        if mask is not None:
            error, norm = error * mask, norm * mask
        total = _total(norm)
        return torch.where(total > 0, _total(error) / total.clamp(min=_TINY), _total(error))
    if kind == "regression":
        return _token_mean((output - target).square().sum(-1) / spread, mask)
    if kind == "labels":
        return _token_mean(_kl(_yes_no(output), _yes_no(target)).mean(-1), mask)
    if kind == "spans":
        return _token_mean(_kl(_inside(output, mask), _inside(target, mask)), None)
    return _token_mean(_kl(output, target), mask)


def curvature_sketch(
    target: Tensor, mask: Tensor | None, noise: Tensor, *, kind: Kind, spread: float = 1.0
) -> Tensor:
    """Turn white noise into a draw whose covariance is the curvature of `divergence` at 0.

    With the probabilities p of the target, the curvature is ``diag(p) - p pᵀ`` for classes and
    spans, ``diag(p (1 - p))`` for labels, ``2 I / spread`` for a regression and
    ``2 I / ‖target‖²`` for hidden states, each divided by the number of what it is averaged over.

    Args:
        target: Output of the dense model, ``[batch, ..., features]``.
        mask: Tokens that count, bool ``[batch, tokens]``; None counts all.
        noise: Independent standard normal numbers, of the shape of `target`.
        kind: What the outputs mean.
        spread: For a regression, what the squared error is divided by.

    Returns:
        The draw, of the shape of `target`. It is 0 at tokens that do not count.
    """
    target = at_least_float(target)
    if kind == "hidden":
        norm = target.square().sum(-1)
        total = _total(norm if mask is None else norm * mask)
        scale = torch.where(total > 0, 2 / total.clamp(min=_TINY), 2.0).sqrt()
        draw = noise
    else:
        if kind == "regression":
            draw = noise * math.sqrt(2 / spread)
        elif kind == "labels":
            probability = target.sigmoid()
            draw = noise * (probability * (1 - probability) / target.shape[-1]).sqrt()
        else:
            logits = _inside(target, mask) if kind == "spans" else target
            mask = None if kind == "spans" else mask
            probability = logits.softmax(-1)
            root = noise * probability.sqrt()
            draw = root - probability * root.sum(-1, keepdim=True)
        return _averaged(draw, mask)
    draw = draw * scale.view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def _averaged(draw: Tensor, mask: Tensor | None) -> Tensor:
    """Return a draw for every token as one for their mean: 0 at tokens that do not count."""
    tokens = math.prod(draw.shape[1:-1])
    counts = torch.full((len(draw),), tokens) if mask is None else mask.sum(1).clamp(min=1)
    draw = draw * counts.to(draw).rsqrt().view(-1, *[1] * (draw.dim() - 1))
    return draw if mask is None else draw * mask.unsqueeze(-1)


def _kl(output: Tensor, target: Tensor) -> Tensor:
    """KL(target, output) of the logits in the last dimension, in nats."""
    goal = target.log_softmax(-1)
    return (goal.exp() * (goal - output.log_softmax(-1))).sum(-1)


def _yes_no(logit: Tensor) -> Tensor:
    """The logits of yes and of no, in a new last dimension."""
    return torch.stack([logit, torch.zeros_like(logit)], -1)


def _inside(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits over positions ``[batch, spans, tokens]`` with those of padding out of reach."""
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), -1e4)


def _total(values: Tensor) -> Tensor:
    """Sum all but the first dimension."""
    return values.flatten(1).sum(1) if values.dim() > 1 else values


def _token_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average over the tokens that count."""
    if values.dim() == 1:
        return values
    if mask is None:
        return values.flatten(1).mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
