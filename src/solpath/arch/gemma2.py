"""Gemma 2: LLaMA with bounded logits and local attention in every second block."""

from solpath.arch.llama import stacks
from solpath.nn.rotary import rotary

TABLES = {
    "gemma2": stacks(forward=rotary("sliding_window", softcap="attn_logit_softcapping")),
}
