"""ViT and its relatives: DeiT, BEiT, DINOv2 (layer scale; plain or gated MLP), ViViT, AST."""

from dataclasses import replace

from solpath.arch.table import Attention, Mlp, Stack
from solpath.nn.attention import separate

ATTENTION = Attention(
    module="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    forward=separate("q_proj", "k_proj", "v_proj", "o_proj"),
)
_PLAIN = Mlp(left=("mlp.fc1",), right="mlp.fc2")
GATED = Mlp(left=("mlp.gate_proj", "mlp.up_proj"), right="mlp.down_proj")
_BY_HEAD = replace(ATTENTION, by_head=True)
_VIT = Stack("layers", (_BY_HEAD,), (_PLAIN,))
_DINO = Stack("encoder.layer", (_BY_HEAD,), (_PLAIN, GATED))
_PLAIN_TYPES = ("audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_mae")
TABLES = dict.fromkeys((*_PLAIN_TYPES, "vit_msn", "vivit"), (_VIT,))
TABLES["beit"] = (Stack("layers", (ATTENTION,), (_PLAIN,)),)  # has a bias for every head
TABLES |= dict.fromkeys(("dinov2", "dinov2_with_registers"), (_DINO,))
