"""BERT, ViT and LLaMA written from nothing, masks applied by hand, against what is extracted.

The forward passes below share no code with solpath or transformers: they read the dense weights
by name and keep channels by multiplying the inner activations with zeros and ones.
"""

import math

import pytest
import torch
from torch import nn

import solpath
from conftest import build, inputs
from plans import random_plan


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def layer_norm(weights, name, x, eps):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def rms_norm(weights, name, x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def heads(x, count):
    """[batch, tokens, count * width] -> [batch, count, tokens, width]"""
    return torch.stack(x.chunk(count, -1), 1)


def attention(query, key, value, allowed):
    """All ``[batch, heads, tokens, width]``; the scale is that of the dense head."""
    logits = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    logits = torch.where(allowed, logits, torch.tensor(-1e30, dtype=logits.dtype))
    logits = (logits - logits.amax(-1, keepdim=True)).exp()
    mixed = logits / logits.sum(-1, keepdim=True) @ value
    return torch.cat(tuple(mixed.unbind(1)), -1)


def bert(weights, masks, batch, count):
    ids, keep = batch["input_ids"], batch["attention_mask"].bool()
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = layer_norm(weights, "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        block = f"encoder.layer.{i}"
        qk, vo, mlp = (masks[f"{block}.{kind}"] for kind in ("attention.qk", "attention.vo", "mlp"))
        q, k, v = (
            linear(weights, f"{block}.attention.self.{name}", x)
            for name in ("query", "key", "value")
        )
        q, k, v = heads(q * qk, count), heads(k, count), heads(v * vo, count)
        y = linear(
            weights, f"{block}.attention.output.dense", attention(q, k, v, keep[:, None, None])
        )
        x = layer_norm(weights, f"{block}.attention.output.LayerNorm", x + y, 1e-12)
        y = gelu(linear(weights, f"{block}.intermediate.dense", x)) * mlp
        y = linear(weights, f"{block}.output.dense", y)
        x = layer_norm(weights, f"{block}.output.LayerNorm", x + y, 1e-12)
    return x


def vit(weights, masks, batch, count):
    pixels, size = batch["pixel_values"], 4
    tiles = [
        pixels[:, :, row : row + size, column : column + size].flatten(1)
        for row in range(0, pixels.shape[2], size)
        for column in range(0, pixels.shape[3], size)
    ]
    patch = "vit.embeddings.patch_embeddings.projection"
    x = torch.stack(tiles, 1) @ weights[f"{patch}.weight"].flatten(1).T + weights[f"{patch}.bias"]
    x = torch.cat([weights["vit.embeddings.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + weights["vit.embeddings.position_embeddings"]
    for i in range(2):
        block = f"vit.layers.{i}"
        qk, vo, mlp = (masks[f"{block}.{kind}"] for kind in ("attention.qk", "attention.vo", "mlp"))
        y = layer_norm(weights, f"{block}.layernorm_before", x, 1e-12)
        q, k, v = (linear(weights, f"{block}.attention.{name}_proj", y) for name in "qkv")
        q, k, v = heads(q * qk, count), heads(k, count), heads(v * vo, count)
        x = x + linear(weights, f"{block}.attention.o_proj", attention(q, k, v, torch.tensor(True)))
        y = layer_norm(weights, f"{block}.layernorm_after", x, 1e-12)
        y = gelu(linear(weights, f"{block}.mlp.fc1", y)) * mlp
        x = x + linear(weights, f"{block}.mlp.fc2", y)
    return linear(weights, "classifier", layer_norm(weights, "vit.layernorm", x, 1e-12)[:, 0])


def rotate(x, count):
    """Channel i and channel i + half are a couple, turned by position / 10000 ** (i / half)."""
    x = heads(x, count)
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[2])[:, None] / 10000 ** (torch.arange(half).double() / half)
    turned = torch.polar(torch.ones_like(angle), angle) * torch.complex(
        x[..., :half].double(), x[..., half:].double()
    )
    return torch.cat([turned.real, turned.imag], -1).to(x.dtype)


def llama(weights, masks, batch, count):
    ids, keep, groups = batch["input_ids"], batch["attention_mask"].bool(), 2
    tokens = torch.arange(ids.shape[1])
    allowed = (tokens[:, None] >= tokens) & keep[:, None, None]
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(2):
        block = f"model.layers.{i}"
        qk, vo, mlp = (masks[f"{block}.{kind}"] for kind in ("attention.qk", "attention.vo", "mlp"))
        # A couple is in both halves of a head; two query heads share each key-value head.
        qk = torch.cat(
            [torch.cat([m, m]) for m in qk.chunk(count // groups) for _ in range(groups)]
        )
        y = rms_norm(weights, f"{block}.input_layernorm", x, 1e-6)
        q, k, v = (linear(weights, f"{block}.self_attn.{name}_proj", y) for name in "qkv")
        q = rotate(q * qk, count)
        k = rotate(k, count // groups).repeat_interleave(groups, 1)
        v = heads(v * vo, count // groups).repeat_interleave(groups, 1)
        x = x + linear(weights, f"{block}.self_attn.o_proj", attention(q, k, v, allowed))
        y = rms_norm(weights, f"{block}.post_attention_layernorm", x, 1e-6)
        gate = linear(weights, f"{block}.mlp.gate_proj", y)
        y = gate / (1 + (-gate).exp()) * linear(weights, f"{block}.mlp.up_proj", y) * mlp
        x = x + linear(weights, f"{block}.mlp.down_proj", y)
    return linear(weights, "lm_head", rms_norm(weights, "model.norm", x, 1e-6))


class Tables(nn.Module):
    def forward(self, x, position_ids):
        angle = position_ids[..., None] / 10000 ** (torch.arange(4).double() / 4)
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()


def leave_float32_(model):
    """LLaMA's norms and rotary tables are in float32 whatever its precision; put doubles there."""
    model.model.rotary_emb = Tables()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            norm = nn.RMSNorm(module.weight.shape, eps=1e-6)
            norm.weight = module.weight
            model.set_submodule(name, norm)


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.25, 0.75), (0.0, 0.5, 0.3), (0.6, 0.0)])
@pytest.mark.parametrize("reference", [bert, vit, llama], ids=lambda f: f.__name__)
def test_extracted_is_the_reference_with_masks(reference, fractions):
    model = build(reference.__name__)
    model.set_attn_implementation("sdpa")  # eager attention of LLaMA leaves double precision
    plan = random_plan(model, fractions)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model.to(dtype)
        small = solpath.extract(model, plan, check=False)
        if reference is llama and dtype is torch.float64:
            leave_float32_(small)
        masks = {}
        for pair in plan.pairs:
            masks[pair.name] = torch.zeros(pair.heads, pair.width, dtype=dtype)
            for head, units in enumerate(plan.kept[pair.name].tolist()):
                masks[pair.name][head, units] = 1
            masks[pair.name] = masks[pair.name].flatten()
        batch = inputs(model)
        with torch.no_grad():
            expected = reference(dict(model.state_dict()), masks, batch, 4)
            actual = small(**batch)[0]
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() <= bound * expected.abs().max()
