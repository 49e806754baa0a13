"""How many tokens a model has positions for."""

from typing import Any

from torch import nn

_LIMITS = ("max_position_embeddings", "max_target_positions")


def most_tokens(model: nn.Module, *, decoder: bool = False) -> int | None:
    """Return the largest number of tokens of a text that a model has positions for.

    RoBERTa and its kin count positions from that of padding, so they never use the first ones.

    Args:
        model: The model, of transformers.
        decoder: Whether the decoder is asked about, of a model that has an encoder, too.

    Returns:
        The number, or None if the configuration names none.

    Example:
        >>> most_tokens(model)
        512
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True) if decoder else config.get_text_config()
    known = [count for name in _LIMITS if isinstance(count := getattr(text, name, None), int)]
    unused = (
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
        and isinstance(module, nn.Embedding)
        and module.padding_idx is not None
    )
    return min(known) - max(unused, default=0) if known else None
