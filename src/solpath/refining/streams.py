"""Find the residual streams that layers add to, by looking at one forward pass."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from solpath.model.linear import linear_map
from solpath.refining.layerwise import Enough, Place, Stream, run_part
from solpath.running.forward import Batch
from solpath.running.head import output_embedding
from solpath.running.hooks import Hook

_REACH = 60  # inputs and outputs of modules to look at on each side of a layer's output
_TOKENS = 32  # tokens of a sample in which residual streams are looked for
_HALF = (torch.float16, torch.bfloat16)


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
        fits = value.shape[-1] in self.widths
        rows = value if value.dim() == 2 else value[:, :_TOKENS].flatten(0, -2)
        kept = rows.clone() if fits else None
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


def residual_streams(model: nn.Module, layers: Sequence[str], sample: Batch) -> dict[str, Stream]:
    """Find out where the outputs of `layers` are added to a residual stream, by looking.

    The input t of a later module is the stream after the sum, and an earlier tensor a is the stream
    before it, if ``t = a + gain * output`` holds for all tokens, channel by channel. The tensors
    are inputs and outputs of modules that have no children. A sample of one token shows nothing:
    some gain always fits it. What a norm after the layer makes of its output is not such a sum.

    In half precision a sum is rounded, and what a layer adds may be as small as that, so a small
    distance shows nothing. There t must be the sum to the bit, or, if the gain is not 1, every
    element of it as near as rounding explains.

    Args:
        model: The dense model. It runs once, up to its output embedding, and its hooks are removed
            afterwards. Few of its tensors are kept at a time, whatever its depth.
        layers: Dotted paths of the layers.
        sample: A few samples to run.

    Returns:
        The stream of every layer for which such tensors were found, by layer.
    """
    widths = {linear_map(model, name).out_features for name in layers}
    finder = _Finder(layers, widths)

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
    if torch.equal(after, one.output):
        return None
    half = any(value.dtype in _HALF for value in (after, one.output))
    output, total = one.output.float(), after.float()
    energy = output.square().sum(0).clamp(min=1e-30)
    for place, value in one.before:
        if half and torch.equal((value + one.output).to(after.dtype), after) and output.any():
            return Stream(place, torch.ones_like(output[0]))
        step = total - value.float()
        gain = (step * output).sum(0) / energy
        error = step - gain * output
        if half:
            eps = max(torch.finfo(value.dtype).eps for value in (after, one.output)) / 2
            rounding = eps * (total.abs() + (gain * output).abs())
            shift = (rounding * output).norm(dim=0) / energy  # of the gain, if they are independent
            fits = bool((error.abs() <= rounding + 4 * shift * output.abs()).all())
        else:
            fits = bool(error.norm() < min(1e-4 * total.norm(), 1e-2 * step.norm()))
        if gain.any() and fits:
            return Stream(place, gain)
    return None
