"""LLaVA on LLaMA: the language model, and the vision tower of CLIP or SigLIP."""

from dataclasses import replace

from solpath.arch.clip import tower
from solpath.arch.llama import ATTENTION, MLP
from solpath.arch.table import Stack

_TEXT = replace(ATTENTION, kind="LlamaAttention")
TABLES = {
    "llava": (
        Stack("language_model.layers", (_TEXT,), (MLP,)),
        tower("vision_tower.encoder.layers"),
        tower("vision_tower.vision_model.encoder.layers"),  # up to transformers 5.20
    )
}
