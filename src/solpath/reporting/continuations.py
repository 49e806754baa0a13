"""Let the models of a family go on with the same prompts, for the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from solpath.config import check_count
from solpath.errors import BatchError, ConfigError
from solpath.measuring.generation import check_generates, greedy
from solpath.reporting.family import Continuation, Line
from solpath.running.claims import claimed
from solpath.running.forward import device_of
from solpath.running.modes import contained, inferring
from solpath.wrapping import unwrapped


@contained
def continuations(
    models: Mapping[str, nn.Module], tokenizer: Any, prompts: Sequence[str], *, tokens: int = 32
) -> tuple[Continuation, ...]:
    """Return what decoders write after some prompts, the likeliest token again and again.

    Every prompt runs alone, so no padding matters. A text ends at the first end-of-text token.

    Args:
        models: Name to model, the dense model first. They are left as they were found.
        tokenizer: The tokenizer of all of them.
        prompts: The prompts.
        tokens: The number of new tokens.

    Returns:
        One continuation per prompt, with one line per model.

    Raises:
        ConfigError: There is no model or no prompt, `tokens` is below 1, or prompt and new tokens
            are more than a model has positions.
        BatchError: A prompt has no tokens.
        UnsupportedModelError: A model cannot generate text.
        ModelInUseError: A model is searched, or another thread works on it.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=300))
        >>> def letters(text, return_tensors):  # a tokenizer of one token a letter
        ...     return {"input_ids": torch.tensor([[ord(letter) for letter in text]])}
        >>> letters.eos_token_id, letters.decode = 0, lambda ids, **_: "".join(map(chr, ids))
        >>> [found] = continuations({"dense": gpt2, "same": gpt2}, letters, ["Once"], tokens=5)
        >>> [(line.name, line.agreed) for line in found.lines] == [
        ...     ("dense", found.lines[0].tokens), ("same", found.lines[0].tokens)]
        True
    """
    check_count("tokens", tokens, 1)
    if not models or not prompts:
        raise ConfigError("give at least one model and one prompt, for example ['Once upon a'].")
    models = {name: unwrapped(model) for name, model in models.items()}
    found = []
    with (
        claimed(*models.values(), doing="run", admits="anything", runs=True),
        inferring(*models.values()),
    ):
        for i, prompt in enumerate(prompts):
            read = tokenizer(prompt, return_tensors="pt")
            batch = {name: read[name] for name in ("input_ids", "attention_mask") if name in read}
            if not batch["input_ids"].numel():
                raise BatchError(f"prompt {i} has no tokens; write something in it.")
            lines: list[Line] = []
            first: list[int] = []
            for name, model in models.items():
                check_generates(model, batch, tokens, name=name)
                here = {key: value.to(device_of(model)) for key, value in batch.items()}
                new = _until_end(greedy(model, here, tokens).new[0].tolist(), tokenizer, model)
                first = first if lines else new
                agreed = next(
                    (j for j, (a, b) in enumerate(zip(new, first, strict=False)) if a != b),
                    min(len(new), len(first)),
                )
                text = tokenizer.decode(new, skip_special_tokens=True)
                lines.append(Line(name, text, len(new), agreed))
            found.append(Continuation(prompt, tuple(lines)))
    return tuple(found)


def _until_end(tokens: list[int], tokenizer: Any, model: Any) -> list[int]:
    """Return the tokens up to the first one that ends a text, that one among them."""
    ends: list[Any] = [tokenizer.eos_token_id]
    own = model.generation_config.eos_token_id
    ends += own if isinstance(own, list) else [own]
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
