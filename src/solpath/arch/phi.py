"""Phi-1, Phi-1.5, Phi-2: some channels of a head are rotated, attention and MLP side by side."""

from solpath.arch.llama import stacks
from solpath.arch.table import Mlp
from solpath.nn.rotary import rotary

TABLES = {
    "phi": stacks(
        Mlp(left=("mlp.fc1",), right="mlp.fc2"),
        output="self_attn.dense",
        forward=rotary(output="dense"),
        rotated=lambda attention: attention.rotary_ndims,
        identity=("q_layernorm", "k_layernorm"),
    )
}
