"""Cohere, Cohere 2, Helium, ERNIE 4.5: LLaMA with the channels of a rotary couple side by side."""

from functools import partial

from solpath.arch.llama import stacks
from solpath.nn.rotary import rotary

_rotary = partial(rotary, neighbours=True)
_cohere2 = _rotary(
    "sliding_window",
    table=2,
    upcast=True,
    rotates=lambda self: self.sliding_window is not None,
)
TABLES = {
    "cohere": stacks(
        forward=_rotary(table=2, upcast=True), interleaved=True, identity=("q_norm", "k_norm")
    ),
    "cohere2": stacks(forward=_cohere2, interleaved=True),
    "ernie4_5": stacks(forward=_rotary(upcast=True), interleaved=True),
    "helium": stacks(forward=_rotary(), interleaved=True),
}
