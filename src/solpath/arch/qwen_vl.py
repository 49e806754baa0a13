"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: the language model. The patches of all images are one sequence,
which no mask of one sample fits, so the vision tower stays whole.
"""

from dataclasses import replace

from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.qwen3 import ATTENTION as NORMED
from solpath.arch.table import Attention, Stack
from solpath.nn.rotary import rotary

_PLAIN = replace(ATTENTION, forward=rotary("sliding_window"))
_NORMED = replace(NORMED, forward=rotary())


def _text(attention: Attention) -> tuple[Stack]:
    return (Stack("language_model.layers", (attention,), (MLP,)),)


TABLES = {
    "qwen2_5_vl": _text(_PLAIN),
    "qwen2_vl": _text(_PLAIN),
    "qwen3_vl": _text(_NORMED),
}
