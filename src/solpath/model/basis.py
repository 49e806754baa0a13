"""Rotate inner dimensions to where their energy sits; the dense model stays the same function.

The inner dimension between two linear maps has no axes of its own: any invertible matrix may
stand between them with its inverse. Along principal axes the first r carry the best r-dimensional
product, so that what a unit is worth differs most from unit to unit.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from solpath.model.hooks import Hook, hooked
from solpath.model.linear import linear_map
from solpath.pair import Pair, Side
from solpath.running.forward import Batch, activation_mask

Basis = Mapping[str, Tensor]
"""Pair name to float64 ``[heads, width, width]``: what multiplies the layer before it."""

_FLOOR = 1e-8  # of eigenvalues and singular values, relative to the largest


def obstacle(model: nn.Module, pair: Pair) -> str | None:
    """What stands between the two maps of `pair`, so that it keeps its axes; None if nothing."""
    if pair.kind == "mlp":
        return "an activation"
    if pair.channels > 1:
        return "a rotary embedding"
    if pair.norms:
        return "a norm over the heads"
    layers = {model.get_submodule(side.module) for side in pair.left}
    if any(isinstance(layer, nn.MultiheadAttention) for layer in layers):
        return "a fused nn.MultiheadAttention"
    return None


def principal_axes(one: Tensor, other: Tensor) -> Tensor:
    """The matrix T with which ``T x`` and ``T⁻ᵀ y`` are principal axes of the product ``xᵀ y``.

    With ``one^½ other^½ = U s Vᵀ``, ``T = s^½ Uᵀ one^-½``. Keeping r axes is then the best
    approximation of rank r in the mean square, and both sides have the second moment ``diag(s)``.

    Args:
        one: second moments of x, float64 ``[..., width, width]``.
        other: second moments of y, likewise.

    Returns:
        ``[..., width, width]``.
    """
    root, inverse = _roots(one)
    u, s, _ = torch.linalg.svd(root @ _roots(other)[0])
    s = s.clamp(min=_FLOOR * float(s.max().clamp(min=1e-30)))
    axes: Tensor = s.sqrt().unsqueeze(-1) * u.mT @ inverse
    return axes


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive semidefinite matrix, and the inverse of the root."""
    values, vectors = torch.linalg.eigh(moment)
    top = values.amax(-1, keepdim=True).clamp(min=1e-30)
    root = torch.maximum(values, _FLOOR * top).sqrt().unsqueeze(-2)
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def principal_basis(
    model: nn.Module, pairs: Sequence[Pair], moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The principal axes of every pair that has `moments`, see `moment_hooks`.

    Pairs that no batch reached are left out. For ``qk`` the product is that of query and key; for
    ``vo`` that of the output projection and the attention output, whose axes are the value's.
    """
    basis = {}
    for pair in pairs:
        left, right = moments[pair.name]
        if not left.any():
            continue
        if pair.kind == "vo":
            weight = linear_map(model, pair.right.module)
            columns = weight.weight.detach().double().cpu().movedim(1 - weight.outputs, 0)
            columns = _by_head(pair, pair.right, columns)
            right = torch.einsum("hrio,hrjo->hij", columns, columns)
        if right.any():
            basis[pair.name] = principal_axes(left, right)
    return basis


@contextlib.contextmanager
def moment_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[dict[str, Tensor]]:
    """Add up second moments while the model runs.

    Args:
        batch: what it runs on; its padding does not count.

    Yields:
        Pair name to float64 ``[2, heads, width, width]`` on the CPU: of query and key; or of the
        attention output, and zeros.
    """
    moments = {p.name: torch.zeros(2, p.heads, p.width, p.width).double() for p in pairs}

    def watch(pair: Pair, side: Side, total: Tensor) -> Hook:
        def note(states: Tensor) -> None:
            states = states.detach().double()
            keep = activation_mask(batch, states)
            states = states if keep is None else states * keep.unsqueeze(-1)
            rows = _by_head(pair, side, states.flatten(0, -2).mT)
            total.add_(torch.einsum("hrin,hrjn->hij", rows, rows).cpu())

        module = model.get_submodule(side.module)
        if side.axis == 1:
            return Hook(module, "before", lambda module, args: note(args[0]))
        return Hook(module, "after", lambda module, args, output: note(output))

    def watched() -> Iterator[Hook]:
        for pair in pairs:
            first, second = moments[pair.name]
            if pair.kind == "vo":
                yield watch(pair, pair.right, first)
            else:
                yield watch(pair, pair.left[0], first)
                yield watch(pair, pair.right, second)

    with hooked(watched()):
        yield moments


@contextlib.contextmanager
def rotated(model: nn.Module, pairs: Sequence[Pair], basis: Basis) -> Iterator[nn.Module]:
    """Give `model` rotated parameters in place of its own, until the block ends.

    Args:
        model: gets its own parameters back, the same objects.
        pairs: of the model; those without a basis stay as they are.
        basis: from `principal_basis`.
    """
    values: dict[int, Tensor] = {}
    places: dict[int, tuple[nn.Module, str, nn.Parameter]] = {}
    for pair in pairs:
        if pair.name not in basis:
            continue
        turn = basis[pair.name].double()
        back = torch.linalg.inv(turn)
        for side in pair.sides:
            layer, linear = model.get_submodule(side.module), linear_map(model, side.module)
            matrix = turn if side is not pair.right else back.mT
            for name, parameter in layer.named_parameters(recurse=False):
                if parameter is linear.weight:
                    dim = linear.outputs if side.axis == 0 else 1 - linear.outputs
                elif side.axis == 0:
                    dim = 0
                else:
                    continue
                places[id(parameter)] = layer, name, parameter
                value = values.setdefault(id(parameter), parameter.detach().double().clone())
                _rotate_(value.movedim(dim, 0), pair, side, matrix.to(value.device))
    try:
        for key, (layer, name, parameter) in places.items():
            value = values[key].to(parameter.dtype)
            layer._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        yield model
    finally:
        for layer, name, parameter in places.values():
            layer._parameters[name] = parameter


def _rotate_(value: Tensor, pair: Pair, side: Side, matrix: Tensor) -> None:
    """Multiply the channels of `side`, the first dimension of `value`, head by head, in place."""
    heads = torch.einsum("hij,hrjk->hrik", matrix, _by_head(pair, side, value))
    part = value[side.offset : side.offset + heads.shape[:-1].numel()]
    part.copy_(heads.reshape(part.shape))


def _by_head(pair: Pair, side: Side, channels: Tensor) -> Tensor:
    """Channels of `side`, first, by head. ``[channels, n] -> [heads, repeat, width, n]``."""
    count = pair.heads * side.repeat * pair.width
    part = channels[side.offset : side.offset + count]
    return part.reshape(pair.heads, side.repeat, pair.width, -1)
