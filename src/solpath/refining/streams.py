"""Find the residual streams that layers add to, by looking at one forward pass."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from solpath.model.linear import linear_map
from solpath.refining.layerwise import Enough, Place, Stream, run_part
from solpath.running.forward import Batch, activation_mask
from solpath.running.head import output_embedding
from solpath.running.hooks import Hook

_REACH = 60  # inputs and outputs of modules to look at on each side of a layer's output
_TOKENS = 256  # of a sample, in which residual streams are looked for


@dataclass
class _Sought:
    """A layer's output whose sum is looked for among what comes later.

    Attributes:
        output: The output of the layer.
        before: What came before it and has its shape, the nearest first.
        seen: How many tensors came after it.
    """

    output: Tensor
    before: Sequence[tuple[Place, Tensor]]
    seen: int = 0


@dataclass
class _Finder:
    """Reads the tensors of a forward pass one after the other, and finds streams among them."""

    sample: Batch
    layers: Collection[str]
    widths: Collection[int]
    recent: deque[tuple[Place, Tensor | None]] = field(default_factory=lambda: deque(maxlen=_REACH))
    sought: dict[str, _Sought] = field(default_factory=dict)
    found: dict[str, Stream] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)

    def note(self, place: Place, value: Any) -> None:
        """Take the next tensor of the forward pass."""
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1):
            return
        kept = self._tokens(place, value) if value.shape[-1] in self.widths else None
        for name, one in list(self.sought.items()):
            one.seen += 1
            if kept is not None and not place.output and kept.shape == one.output.shape:
                stream = _sum_of(one, kept)
                if stream is not None:
                    self.found[name] = stream
            if name in self.found or one.seen == _REACH - 1:
                del self.sought[name]
        name = place.module
        self.ran |= {name} if place.output else set()
        wanted = place.output and name in self.layers
        if wanted and not (name in self.found or name in self.sought):
            near = [(where, v) for where, v in reversed(self.recent) if v is not None]
            if kept is not None and len(kept) > 1:
                before = [(where, v) for where, v in near if v.shape == kept.shape]
                self.sought[name] = _Sought(kept, before)
        self.recent.append((place, kept))
        if len(self.found) == len(self.layers):
            raise Enough

    def _tokens(self, place: Place, value: Tensor) -> Tensor:
        """Return a copy of some tokens of an activation, without padding, ``[tokens, features]``.

        They are the same tokens in every activation of as many.
        """
        keep = activation_mask(self.sample, value, place.module)
        rows = value.flatten(0, -2)
        rows = rows if keep is None else rows[keep.flatten()]
        return rows[:: len(rows) // _TOKENS + 1].clone()


def residual_streams(model: nn.Module, layers: Sequence[str], sample: Batch) -> dict[str, Stream]:
    """Find out where the outputs of `layers` are added to a residual stream, by looking.

    The input t of a later module is the stream after the sum, and an earlier tensor a is the stream
    before it, if ``t = a + gain * output`` holds for all tokens, channel by channel. The tensors
    are inputs and outputs of modules that have no children. What a norm after the layer makes of
    its output is not such a sum.

    What a layer adds may be as small as rounding, so a small distance shows nothing: t must be the
    sum to the bit, or, if the gain is not 1, every element of it as near as rounding explains.
    Tokens that are all alike show no gain, since some gain always fits them.

    Args:
        model: The dense model. It runs once, up to its output embedding, and its hooks are removed
            afterwards. Few of its tensors are kept at a time, whatever its depth.
        layers: Dotted paths of the layers.
        sample: A few samples to run.

    Returns:
        The stream of every layer for which such tensors were found, by layer.
    """
    widths = {linear_map(model, name).out_features for name in layers}
    finder = _Finder(sample, layers, widths)

    def before(name: str) -> Any:
        return lambda module, args: finder.note(Place(name, False), args[0] if args else None)

    def after(name: str) -> Any:
        return lambda module, args, output: finder.note(Place(name, True), output)

    def at_head(module: nn.Module, args: Any) -> None:
        if finder.ran.issuperset(layers):
            raise Enough

    def noting() -> Iterator[Hook]:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                yield Hook(module, "before", before(name))
                yield Hook(module, "after", after(name))
        head = output_embedding(model)
        if head is not None:
            yield Hook(head, "before", at_head)

    run_part(model, sample, noting())
    return finder.found


def _sum_of(one: _Sought, after: Tensor) -> Stream | None:
    """Return the nearest stream before an output that the output times a gain turns to `after`."""
    if not one.output.any() or torch.equal(after, one.output):
        return None
    for place, value in one.before:
        if torch.equal(after, value):
            continue
        if torch.equal((value + one.output).to(after.dtype), after):
            return Stream(place, torch.ones_like(after[0], dtype=torch.float32))
        gain = _gain(value, one.output, after)
        if gain is not None:
            return Stream(place, gain.float())
    return None


def _gain(value: Tensor, output: Tensor, after: Tensor) -> Tensor | None:
    """Return the gain by which ``value + gain * output`` is `after` but for rounding, if any is.

    Args:
        value, output, after: ``[tokens, features]``.

    Returns:
        ``[features]``, float64; None also if the tokens are too much alike to tell.
    """
    eps = max(torch.finfo(rows.dtype).eps for rows in (value, output, after)) / 2
    value, output, after = value.double(), output.double(), after.double()
    step = after - value
    energy = output.square().sum(0).clamp(min=1e-30)
    gain = (step * output).sum(0) / energy
    added = gain * output
    rounding = eps * (after.abs() + added.abs())
    shift = (rounding * output).norm(dim=0) / energy  # of the gain, if they are independent
    fits = (step - added).abs() <= rounding + 4 * shift * output.abs()
    told = (added - added.mean(0)).norm() > 4 * rounding.norm()
    return gain if fits.all() and told else None
