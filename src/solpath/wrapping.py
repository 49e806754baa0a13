"""Take the model out of its wrapper, or say what to pass instead."""

from typing import Any, cast

from torch import nn

from solpath.errors import UnsupportedModelError


def unwrapped(model: Any, *, adapters: bool = False, hooks: bool = False) -> nn.Module:
    """Return the model of transformers or timm inside a wrapper, or say what to pass instead.

    ``DataParallel``, ``DistributedDataParallel`` and what `torch.compile` returns hold one model,
    which is returned. Any other model is returned as it is.

    Args:
        model: What a user passed as a model.
        adapters: Whether a model that peft wrapped will do.
        hooks: Whether hooks on its layers will have to run.

    Raises:
        UnsupportedModelError: It is a pipeline or a ``SentenceTransformer``, whose inputs are not
            the batches of its model; a model that peft wrapped; one that was compiled in place,
            which runs no hooks; or no model at all. The message says what to pass.

    Example:
        >>> unwrapped(torch.nn.DataParallel(model)) is model
        True
    """
    while isinstance(model, nn.Module):
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]
        else:
            break
    check_takes_batches(model)
    if _is(model, "peft", "PeftModel") and not adapters:
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters of peft on its layers; pass "
            "model.merge_and_unload(), or model.unload() to leave them out."
        )
    if hooks and any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedModelError(
            f"this {type(model).__name__} was compiled in place, and compiled code takes no notice "
            "of masks; pass a model without model.compile(), and compile the extracted one."
        )
    return cast("nn.Module", model)


def check_takes_batches(model: Any) -> None:
    """Raise `UnsupportedModelError` if something is no module that can be called on batches.

    Args:
        model: What a user passed as a model.
    """
    kind = type(model).__name__
    if _is(model, "sentence_transformers", "SentenceTransformer"):
        first = next(model.children())
        name = next((name for name, _ in first.named_children()), "auto_model")  # by its version
        raise UnsupportedModelError(
            f"a {kind} takes texts; pass st[0].{name} with batches from st.tokenizer (see "
            f"solpath.text_batches), and set st[0].{name} to the extracted model."
        )
    if _is(model, "transformers.pipelines", "Pipeline"):
        raise UnsupportedModelError(
            f"a {kind} takes raw inputs; pass pipe.model, and set it to the extracted model."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"a {kind} is no model; pass a torch.nn.Module.")


def _is(value: Any, package: str, name: str) -> bool:
    """Return whether a value is of a class, without importing its package."""
    kinds = [kind for kind in type(value).__mro__ if kind.__name__ == name]
    return any(f"{kind.__module__}.".startswith(f"{package}.") for kind in kinds)
