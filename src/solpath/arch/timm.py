"""ViT, DeiT and Swin of timm: fused projections, one table per class of timm."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from solpath.arch.table import Attention, Mlp, Stack
from solpath.errors import ConfigError
from solpath.nn.attention import pad_to, split_fused


def _attend(self: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Run attention with the widths of `qkv` and `proj`, fused whatever `fused_attn` says."""
    width = self.proj.in_features // self.num_heads
    query, key, value = split_fused(self.qkv(x), self.num_heads, width)
    common = max(query.shape[-1], width, 1)
    query, key, value = (pad_to(part, common) for part in (query, key, value))
    states = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=self.attn_drop.p if self.training else 0.0,
        is_causal=is_causal,
        scale=self.scale,
    )
    result: Tensor = self.proj_drop(self.proj(states[..., :width].transpose(1, 2).flatten(2)))
    return result


def _tokens(
    self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return _attend(self, x, attn_mask, is_causal)


def _windows(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    bias = self._get_rel_pos_bias()
    if mask is not None:
        # [windows, tokens, tokens] -> [batch * windows, 1, tokens, tokens]
        bias = bias + mask.unsqueeze(1).repeat(len(x) // len(mask), 1, 1, 1)
    return _attend(self, x, bias)


def _stack(blocks: str, kind: str, forward: Any) -> Stack:
    attention = Attention(
        module="attn",
        query="attn.qkv",
        key="attn.qkv",
        value="attn.qkv",
        output="attn.proj",
        forward=forward,
        heads="num_heads",
        kind=kind,
        identity=("q_norm", "k_norm", "norm", "gate"),
    )
    mlp = Mlp(("mlp.fc1",), "mlp.fc2", identity=("mlp.norm",))
    return Stack(blocks, (attention,), (mlp,))


_VIT = (_stack("blocks", "Attention", _tokens),)
TABLES = {
    "timm/VisionTransformer": _VIT,
    "timm/VisionTransformerDistilled": _VIT,
    "timm/SwinTransformer": (_stack("layers.*.blocks", "WindowAttention", _windows),),
}


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse settings that would make `timm.create_model` do more than build a model.

    Its arguments can also make it read files and repositories, or allocate memory.

    Args:
        config: The configuration of a model of transformers that wraps one of timm.

    Raises:
        ConfigError: timm cannot be imported, does not list `architecture`, or `model_args` has an
            argument that the models of this module do not take.
    """
    try:
        import timm
        from timm.models.swin_transformer import SwinTransformer
        from timm.models.vision_transformer import VisionTransformer
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit
        raise ConfigError(
            f"this model needs timm: pip install 'solpath[timm]', with the torchvision that goes "
            f"with your torch ({error})."
        ) from error

    architecture, options = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ConfigError(f"architecture is {architecture!r}, which timm does not list.")
    known = {*inspect.signature(VisionTransformer).parameters}
    known |= {*inspect.signature(SwinTransformer).parameters}
    if unknown := set(options) - (known - {"device", "dtype", "num_classes"}):
        raise ConfigError(f"model_args has {min(unknown)!r}, which no known model of timm takes.")
