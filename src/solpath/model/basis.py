"""Rotate pairs to a basis in which units differ most, without changing what the model computes.

The inner dimension between two linear maps has no axes of its own: any invertible matrix may follow
the first map if its inverse precedes the second. Along principal axes the first r units carry the
best product of rank r. The mathematics is in docs/method.md, "Principal axes".
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from solpath.model.linear import linear_map
from solpath.pair import Pair, Side
from solpath.running.forward import Batch, activation_mask
from solpath.running.hooks import Hook, hooked
from solpath.running.modes import plain_torch, undoing
from solpath.running.placement import put_weight_, weight_at

Basis = Mapping[str, Tensor]
"""Pair name to the matrix that multiplies the outputs of its first layer.

Every matrix is float64 ``[heads, width, width]``. A pair without an entry keeps its own axes.
"""

_Place = tuple[nn.Module, str, nn.Parameter, nn.Parameter]  # a layer, a name, its old and new
_FLOOR = 1e-8  # smallest eigenvalue or singular value that counts, relative to the largest


def obstacle(model: nn.Module, pair: Pair) -> str | None:
    """Return what stands between the two maps of `pair` and forbids a rotation.

    Args:
        model: The dense model. It is only looked at.
        pair: A pair of `model`.

    Returns:
        A noun phrase such as ``"an activation"``, or None if the pair can be rotated.

    Example:
        >>> qk, vo, mlp = solpath.find_pairs(model)[:3]
        >>> obstacle(model, mlp)
        'an activation'
        >>> obstacle(model, qk) is None
        True
    """
    if pair.kind in ("mlp", "experts"):
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
    """Return the matrix T that turns x and y to the principal axes of their product ``xᵀ y``.

    With ``one^½ other^½ = U s Vᵀ``, T is ``s^½ Uᵀ one^-½``. Then ``T x`` and ``T⁻ᵀ y`` have the
    same product and both the second moment ``diag(s)``, and keeping the first r axes is its best
    approximation of rank r in the mean square (docs/method.md, "Principal axes").

    Args:
        one: Second moments of x, float64 ``[..., width, width]``.
        other: Second moments of y, of the same shape and dtype.

    Returns:
        T, float64 ``[..., width, width]``.

    Example:
        >>> one, other = torch.eye(2).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
        >>> axes = principal_axes(one, other)
        >>> (axes @ one @ axes.mT).diagonal().round(decimals=4).tolist()
        [3.0, 2.0]
    """
    root, inverse = _roots(one)
    u, s, _ = torch.linalg.svd(root @ _roots(other)[0])
    s = s.clamp(min=_FLOOR * float(s.max().clamp(min=1e-30)))
    axes: Tensor = s.sqrt().unsqueeze(-1) * u.mT @ inverse
    return axes


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of a positive semidefinite matrix, and the inverse of that root."""
    values, vectors = torch.linalg.eigh(moment)
    top = values.amax(-1, keepdim=True).clamp(min=1e-30)
    root = torch.maximum(values, _FLOOR * top).sqrt().unsqueeze(-2)
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def principal_basis(
    model: nn.Module, pairs: Sequence[Pair], moments: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the principal axes of every pair in `pairs` that some batch reached.

    The product of a ``qk`` pair is that of query and key. The product of a ``vo`` pair is that of
    the output projection and the attention output, which has the axes of the values it sums up.

    Args:
        model: The dense model. It is only looked at.
        pairs: The pairs to rotate; `obstacle` must find nothing in their way.
        moments: The second moments of these pairs, from `moment_hooks`.

    Returns:
        The basis of these pairs.
    """
    basis = {}
    for pair in pairs:
        left, right = moments[pair.name]
        if not left.any():
            continue
        if pair.kind == "vo":
            weight = linear_map(model, pair.right.module)
            columns = weight.read(weight.weight).double().cpu().movedim(1 - weight.outputs, 0)
            columns = _by_head(pair, pair.right, columns)
            right = torch.einsum("hrio,hrjo->hij", columns, columns)
        if right.any():
            basis[pair.name] = principal_axes(left, right)
    return basis


@contextlib.contextmanager
def moment_hooks(
    model: nn.Module, pairs: Sequence[Pair], batch: Batch
) -> Iterator[dict[str, Tensor]]:
    """Add up the second moments of activations while `model` runs inside the block.

    Args:
        model: The dense model. Its hooks are removed when the block ends.
        pairs: The pairs to watch.
        batch: The batch that `model` will run on. Its padding does not count.

    Yields:
        Pair name to float64 ``[2, heads, width, width]`` on the CPU. The two moments of a ``qk``
        pair are those of the query and of the key. For a ``vo`` pair the first is that of the
        attention output, and the second stays zero.
    """
    moments = {p.name: torch.zeros(2, p.heads, p.width, p.width).double() for p in pairs}

    def watch(pair: Pair, side: Side, total: Tensor) -> Hook:
        def note(states: Tensor) -> None:
            states = states.detach().double()
            keep = activation_mask(batch, states, side.module)
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
    """Give `model` rotated parameters until the block ends.

    The parameters are rotated in float64 and rounded to their own dtype.

    Args:
        model: The dense model. It gets its own parameter objects back when the block ends.
        pairs: The pairs of `model`. Those without an entry in `basis` are left untouched.
        basis: From `principal_basis`.

    Yields:
        `model` itself.
    """
    with plain_torch():
        places = _rotated_parameters(model, pairs, basis)

    def restore() -> None:
        for layer, name, parameter, _ in places:
            put_weight_(layer, name, parameter)

    with undoing(restore):
        for layer, name, _, turned in places:
            put_weight_(layer, name, turned)
        yield model


def _rotated_parameters(model: nn.Module, pairs: Sequence[Pair], basis: Basis) -> list[_Place]:
    """Return what each parameter that turns with `basis` turns into, and where it belongs."""
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
                value = values.setdefault(id(parameter), weight_at(layer, name).double().clone())
                _rotate_(value.movedim(dim, 0), pair, side, matrix.to(value.device))
    return [
        (layer, name, old, nn.Parameter(values[key].to(old.dtype), old.requires_grad))
        for key, (layer, name, old) in places.items()
    ]


def _rotate_(value: Tensor, pair: Pair, side: Side, matrix: Tensor) -> None:
    """Multiply the channels of `side` in `value` by `matrix`, head by head, in place.

    The channels are the first dimension of `value`; `matrix` is ``[heads, width, width]``.
    """
    heads = torch.einsum("hij,hrjk->hrik", matrix, _by_head(pair, side, value))
    index = pair.channels_of(side).to(value.device)
    value[index] = heads.reshape(-1, *value.shape[1:])


def _by_head(pair: Pair, side: Side, channels: Tensor) -> Tensor:
    """Split the channels of `side` by head: ``[channels, ...] -> [heads, repeat, width, n]``."""
    part = channels[pair.channels_of(side).to(channels.device)]
    return part.reshape(pair.heads, side.repeat, pair.width, -1)
