"""The longest text that a model has positions for."""

import pytest
import torch

from conftest import build
from solpath.positions import most_tokens
from solpath.running.forward import run


@pytest.mark.parametrize(
    ("label", "most"),
    [("bert", 40), ("roberta", 38), ("esm absolute", 38), ("mpnet", 38), ("gpt2", 40), ("opt", 40)],
)
def test_a_text_of_that_length_runs_and_a_longer_one_does_not(label, most):
    """RoBERTa's first positions belong to padding, and so do those of its kin."""
    model = build(label, pad_token_id=1, max_position_embeddings=40)
    assert most_tokens(model) == most
    ids = torch.full((1, most + 1), 5)
    run(model, {"input_ids": ids[:, :most]}, labels=False)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run(model, {"input_ids": ids}, labels=False)


def test_a_model_without_positions_has_no_limit():
    assert most_tokens(build("t5")) is None
