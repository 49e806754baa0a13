"""StarCoder2: LLaMA's attention with biases, plain MLP."""

from solpath.arch.llama import stacks
from solpath.arch.table import Mlp
from solpath.nn.rotary import rotary, with_residual_dropout

_FORWARD = with_residual_dropout(rotary("config.sliding_window"))
TABLES = {"starcoder2": stacks(Mlp(left=("mlp.c_fc",), right="mlp.c_proj"), forward=_FORWARD)}
