"""Tiny random models of every known architecture, and batches for them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jaxtyping

# Shapes in the signatures of the mathematics are checked in tests, before its first import.
jaxtyping.install_import_hook("solpath.dynamics", "beartype.beartype")

import pytest
import torch
import transformers
from torch import nn

from solpath.arch import known_model_types

torch.set_num_threads(1)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
TEXT = {"vocab_size": 60, "max_position_embeddings": 40, "pad_token_id": 0}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}

# Class to build for a model type; every known type must be here.
CASES = {
    "bert": ("BertModel", TEXT),
    "camembert": ("CamembertForSequenceClassification", TEXT),
    "deit": ("DeiTForImageClassification", IMAGE),
    "electra": ("ElectraForTokenClassification", TEXT | {"embedding_size": 16}),
    "llama": ("LlamaForCausalLM", TEXT | {"num_key_value_heads": 2}),
    "roberta": ("RobertaForMaskedLM", TEXT),
    "vit": ("ViTForImageClassification", IMAGE),
    "xlm-roberta": ("XLMRobertaModel", TEXT),
}


def build(model_type: str, *, seed: int = 0, **changes: object) -> nn.Module:
    """A tiny random model in eval mode. All weights, biases too, are of order one."""
    name, sizes = CASES[model_type]
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**SIZES | sizes | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
    return model


def inputs(model: nn.Module, *, samples: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """One batch; texts are padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(samples, 1, 8, 8, generator=generator).to(dtype)}
    tokens = torch.randint(1, 60, (samples, 9), generator=generator)
    lengths = torch.randint(3, 10, (samples, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


def batches(model: nn.Module, count: int = 3, samples: int = 4) -> list[dict[str, torch.Tensor]]:
    """A few different batches."""
    return [inputs(model, samples=samples, seed=i) for i in range(count)]


@pytest.fixture(params=known_model_types())
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Every known architecture in turn."""
    return build(request.param)


@pytest.fixture
def bert() -> nn.Module:
    """The architecture most tests of searching use."""
    return build("bert")
