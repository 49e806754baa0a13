"""The output embedding of a language model, left out of its forward pass and compared in blocks.

Logits over a large vocabulary are most of the memory and the time of a search, and only two things
of them are needed: the level of every token, which is the logarithm of the sum of the exponentials
of its logits, and the mean row of the embedding under its probabilities. Both are added up block by
block of the vocabulary, as attention kernels do it, and no block is kept. With the logits
``t = W h + b`` of the dense model, p = softmax t, and the states h' of the other model, whose
embedding is the same,

    KL(p, q) = level(h') - level(h) - ⟨h' - h, E_p[W]⟩,    ∂KL/∂h' = E_q[W] - E_p[W].
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from solpath.running.forward import Batch, at_least_float, output_tensor, run
from solpath.running.hooks import Hook, hooked

_ROWS = 4096  # of the embedding, in one block: with 512 tokens a block of logits is 8 MB
_TOKENS = 2048  # at once


class HeadTarget(NamedTuple):
    """What the dense model gives a batch, without its logits.

    Attributes:
        states: What its output embedding gets, ``[batch, tokens, features]``, in its own dtype.
        level: Logarithm of the sum of the exponentials of the logits, float32 or float64 ``[batch,
            tokens]``.
        mean: Mean row of the embedding under the probabilities, ``[batch, tokens, features]``, in
            the dtype of `level`.
    """

    states: Tensor
    level: Tensor
    mean: Tensor


def output_embedding(model: nn.Module) -> nn.Module | None:
    """Return the layer that turns hidden states into logits over a vocabulary, if there is one."""
    find: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except NotImplementedError:
        return None
    return head if isinstance(head, nn.Module) else None


def separable_head(model: nn.Module, sample: Batch, logits: Tensor) -> nn.Linear | None:
    """Return the output embedding of a model if its logits are what this layer gives, or None.

    That is tried on `sample`: the logits must be equal to the last bit. They are not if the model
    caps or scales them afterwards. On the meta device, where there are no values, they must be the
    very tensor that the layer returns.

    Args:
        model: The model.
        sample: A batch of one sample.
        logits: What the model gives it.
    """
    head = output_embedding(model)
    if type(head) is not nn.Linear:
        return None
    with torch.no_grad():
        try:
            states = run_without_head(model, head, sample)
        except (IndexError, LookupError, RuntimeError, TypeError, ValueError):
            return None  # what follows the embedding wants all of its output
        if logits.shape != (*states.shape[:-1], head.out_features):
            return None
        if logits.is_meta:
            return head if _returned_by(head, model, sample) else None
        return head if torch.equal(head(states), logits) else None


def _returned_by(head: nn.Module, model: nn.Module, sample: Batch) -> bool:
    """Return whether the output of a model is that of its output embedding, left as it was."""
    seen: list[tuple[Tensor, int]] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append((output, output._version))

    with hooked([Hook(head, "after", note)]):
        output = output_tensor(run(model, sample, labels=False))
    return any(output is one and one._version == version for one, version in seen)


def run_without_head(model: nn.Module, head: nn.Module, batch: Batch) -> Tensor:
    """Return what the output embedding of a model gets, ``[batch, tokens, features]``.

    The embedding itself runs on no tokens. Labels are left out.

    Args:
        model: The model.
        head: Its output embedding, from `separable_head`.
        batch: The batch.

    Raises:
        LookupError: The model did not call its output embedding.
    """
    seen: list[Tensor] = []

    def empty(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    with hooked([Hook(head, "before", empty)]):
        run(model, batch, labels=False)
    return seen[-1]


def blocks_of(head: nn.Linear) -> int:
    """Return in how many blocks the rows of an output embedding are gone through."""
    return -(-head.out_features // _ROWS)


def head_target(head: nn.Linear, states: Tensor) -> HeadTarget:
    """Return the target of a batch.

    Args:
        head: The output embedding.
        states: What it gets, ``[batch, tokens, features]``.
    """
    states = states.detach()
    parts = [_softmax_mean(head, part) for part in torch.split(states.flatten(0, -2), _TOKENS)]
    level, mean = (torch.cat(column) for column in zip(*parts, strict=True))
    return HeadTarget(states, level.view(states.shape[:-1]), mean.view(states.shape))


def mean_of_drawn(head: nn.Linear, states: Tensor, uniforms: Tensor) -> Tensor:
    """Draw tokens from the probabilities of every token, and return the mean of their rows.

    Args:
        head: The output embedding.
        states: What it gets, ``[batch, tokens, features]``.
        uniforms: Independent uniform numbers, ``[batch, tokens, draws, blocks]``; see `blocks_of`.

    Returns:
        Mean row of the embedding over the draws, of the shape of `states`.
    """
    rows, chances = states.detach().flatten(0, -2), uniforms.flatten(0, -3)
    parts = zip(torch.split(rows, _TOKENS), torch.split(chances, _TOKENS), strict=True)
    return torch.cat([_drawn_mean(head, *part) for part in parts]).view(states.shape)


def head_divergence(head: nn.Linear, states: Tensor, target: HeadTarget) -> Tensor:
    """Return KL(target, output) of every token in nats, differentiable in `states`.

    Args:
        head: The output embedding of the smaller model, equal to that of the dense model.
        states: What it gets, ``[batch, tokens, features]``.
        target: Of the dense model for the same batch.

    Returns:
        ``[batch, tokens]``, in the dtype of the level of `target`.
    """
    return cast("Tensor", _Divergence.apply(states, head, *target))  # type: ignore[no-untyped-call]


class _Divergence(torch.autograd.Function):
    """`head_divergence`, whose gradient is known when its value is."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: nn.Linear, dense: Tensor, level: Tensor, mean: Tensor
    ) -> Tensor:
        own = head_target(head, states)
        ctx.save_for_backward(own.mean - mean)
        ctx.dtype = states.dtype
        apart = states.double() - dense.double()
        value = own.level.double() - level.double() - (apart * mean.double()).sum(-1)
        return value.clamp(min=0).to(level)  # below 0 by rounding alone

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        [slope] = ctx.saved_tensors
        return (slope * slopes[0].unsqueeze(-1)).to(ctx.dtype), None, None, None, None


def _softmax_mean(head: nn.Linear, states: Tensor) -> tuple[Tensor, Tensor]:
    """Return the level of every token, and its mean row, of states ``[tokens, features]``."""
    mean = torch.zeros_like(at_least_float(states))
    total, top = torch.zeros_like(mean[:, :1]), torch.full_like(mean[:, :1], -torch.inf)
    for rows, logits in _blocks(head, states):
        peak = torch.maximum(top, logits.amax(-1, keepdim=True))
        share, shrink = logits.sub_(peak).exp_(), (top - peak).exp()
        total = total * shrink + share.sum(-1, keepdim=True)
        mean = torch.addmm(mean * shrink, share, rows)
        top = peak
    return (top + total.log()).squeeze(-1), mean / total


def _drawn_mean(head: nn.Linear, states: Tensor, uniforms: Tensor) -> Tensor:
    """Return the mean row of the drawn tokens, of states and uniforms that begin with ``[tokens``.

    Blocks come one after the other, and each takes over with its share of the mass so far.
    """
    drawn = torch.zeros_like(uniforms[..., 0], dtype=torch.int64)
    total: Tensor | float = 0.0
    top = uniforms.new_full((len(states), 1), -torch.inf, dtype=at_least_float(states).dtype)
    for i, (_, logits) in enumerate(_blocks(head, states)):
        peak = torch.maximum(top, logits.amax(-1, keepdim=True))
        before = total * (top - peak).exp()
        reached = logits.sub_(peak).exp_().cumsum(-1).add_(before)
        total, top = reached[:, -1:], peak
        wanted = uniforms[..., i] * total
        inside = torch.searchsorted(reached, wanted, right=True).clamp(max=logits.shape[1] - 1)
        drawn = torch.where(wanted < before, drawn, i * _ROWS + inside)
    with align_module_device(head):
        return at_least_float(head.weight.detach()[drawn]).mean(1)


def _blocks(head: nn.Linear, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows of the embedding and the logits that they give, block by block.

    All blocks of logits have one place in memory: the last one is gone when the next one comes.
    """
    states = at_least_float(states)
    place = states.new_empty(len(states) * min(_ROWS, head.out_features))
    with align_module_device(head):  # the weight may be off-loaded
        for start in range(0, head.out_features, _ROWS):
            rows = head.weight.detach()[start : start + _ROWS].to(states.dtype)
            logits = place[: len(states) * len(rows)].view(len(states), -1)
            torch.mm(states, rows.T, out=logits)
            if head.bias is not None:
                logits += head.bias.detach()[start : start + _ROWS]
            yield rows, logits
