"""What a zoo model is made of, and the one training loop."""

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Recipe:
    """A stock model class with its configuration, its data and how it is trained.

    Attributes:
        model: class of transformers.
        config: its configuration.
        loss: ``loss(model, draw, size)``: the mean loss of `size` samples. `draw` is a number that
            no other step of this seed has; the global random generator may be used too.
            A model with a teacher gets ``teacher=`` as well.
        scores: ``scores(model)``: test metrics, by name.
        data: digest of the data.
        steps: training steps.
        batch_size: samples in a step.
        learning_rate: its peak.
        optimizer: arguments of AdamW.
        schedule: arguments of OneCycleLR.
        teacher: name of the zoo model that this one is distilled from.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    loss: Callable[..., Tensor]
    scores: Callable[[PreTrainedModel], dict[str, float]]
    data: Callable[[], str]
    steps: int
    batch_size: int
    learning_rate: float
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    teacher: str | None = None

    def settings(self, seed: int) -> dict[str, Any]:
        """All that the weights depend on, apart from versions of software."""
        config = self.config.to_dict()
        config.pop("transformers_version", None)
        return {
            "model": self.model.__name__,
            "config": config,
            "data": self.data(),
            "seed": seed,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "optimizer": dict(self.optimizer),
            "schedule": dict(self.schedule),
            "teacher": self.teacher,
        }


def digest(settings: Mapping[str, Any]) -> str:
    """Sixteen hex digits that change when a setting does."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fit(recipe: Recipe, seed: int, teacher: PreTrainedModel | None = None) -> PreTrainedModel:
    """Train from random weights with one thread; the same seed gives the same bits.

    Sets torch's number of threads and its global seed.

    Args:
        recipe: what to train.
        seed: of the weights and the batches.
        teacher: the trained model that `recipe.teacher` names.

    Returns:
        The model, in eval mode.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = recipe.model(copy.deepcopy(recipe.config)).train()  # models change their config
    loss_of = recipe.loss if teacher is None else partial(recipe.loss, teacher=teacher)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, **recipe.optimizer)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, **recipe.schedule
    )
    for step in track(range(recipe.steps), description=recipe.model.__name__):
        loss = loss_of(model, seed * recipe.steps + step + 1, recipe.batch_size)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
