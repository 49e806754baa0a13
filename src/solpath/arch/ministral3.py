"""Ministral 3: Mistral with queries scaled by their position."""

from typing import Any

import torch
from torch import Tensor

from solpath.arch.llama import stacks
from solpath.nn.rotary import project_apart, rotary


def _project(
    self: Any, hidden: Tensor, *, position_ids: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = project_apart(self, hidden)
    rope = self.config.rope_parameters
    period = torch.floor(position_ids / rope["original_max_position_embeddings"])
    scale = 1 + rope["llama_4_scaling_beta"] * torch.log(1 + period)
    return query * scale[:, None, :, None].to(query.dtype), key, value


TABLES = {"ministral3": stacks(forward=rotary("config.sliding_window", project=_project))}
