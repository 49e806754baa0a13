"""Run a model up to its language-modelling head, and its head on some tokens at a time.

The logits of 8 texts of 512 tokens over 262,144 classes take 4.3 GB; the hidden states ahead of the
head take 10 MB at a width of 640.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from solpath.errors import BatchError
from solpath.running.forward import Batch, has_logits, run
from solpath.running.head import output_embedding
from solpath.running.hooks import Hook, hooked
from solpath.running.modes import inferring, undoing

LARGE = 256 * 2**20
"""Bytes of the logits of one batch, in float32, from which on they are computed in parts."""
_PART = 64 * 2**20  # bytes of the logits of one part
_HIDDEN = "last_hidden_state"


class LazyLogits:
    """The logits of one batch, which are computed some tokens at a time.

    The head runs again for every part, as the `forward` of the model's class does it.

    Args:
        model: The model.
        batch: The batch.
        body: The name of the module in `model` whose last hidden state the head gets.
        outputs: What this module and the children of the model returned for the batch, by name.
        first: The logits of the first token, ``[batch, 1, classes]``.

    Attributes:
        shape: The shape of all logits, ``[batch, tokens, classes]``.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        body: str,
        outputs: Mapping[str, ModelOutput],
        first: Tensor,
    ) -> None:
        self._model, self._batch, self._body = model, batch, body
        self._outputs = dict(outputs)
        self._device = first.device
        self._first = first[0].cpu()
        self.shape = torch.Size((*outputs[body][_HIDDEN].shape[:2], first.shape[-1]))

    def part(self, start: int, stop: int) -> Tensor:
        """Return the logits of some tokens, ``[batch, stop - start, classes]``.

        Args:
            start, stop: The tokens, as in a slice.
        """
        known = {name: _on(output, self._device) for name, output in self._outputs.items()}
        known[self._body] = _of_tokens(known[self._body], start, stop)
        with inferring(self._model), ExitStack() as stack:
            for name, output in known.items():
                stack.enter_context(_answering(self._model.get_submodule(name), output))
            logits: Tensor = run(self._model, self._batch, labels=False).logits
        return logits

    def cpu(self) -> "LazyLogits":
        """Move what is kept to the CPU, and return the logits themselves."""
        cpu = torch.device("cpu")
        self._outputs = {name: _on(output, cpu) for name, output in self._outputs.items()}
        return self

    def check(self, place: str) -> None:
        """Raise `BatchError` if the head of the model is not what it was when the model was run.

        Args:
            place: What the message calls these logits.
        """
        first = self.part(0, 1)[0].cpu()
        if not torch.allclose(first, self._first, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise BatchError(
                f"{place}: the head of this {type(self._model).__name__} has changed since its "
                "outputs were taken; take reference_outputs(dense, batches) again."
            )


def logits_in_parts(model: nn.Module, batch: Batch) -> LazyLogits | None:
    """Run a model up to its head if its logits would take at least `LARGE` bytes.

    Args:
        model: The model, in eval mode.
        batch: The batch.

    Returns:
        The logits to be; None if they are small, or if it is not known how the model gets them.

    Example:
        >>> logits_in_parts(model, batch) is None  # two classes
        True
    """
    head = output_embedding(model)
    bodies = _bodies(model)
    weight = getattr(head, "weight", None)
    if not bodies or not isinstance(batch, Mapping) or not isinstance(weight, Tensor):
        return None
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return None  # compiled code takes no notice of what a child is told
    ids = batch.get("decoder_input_ids", batch.get("input_ids"))
    if not isinstance(ids, Tensor) or 4 * ids.numel() * len(weight) < LARGE:
        return None
    outputs: dict[str, ModelOutput] = {}
    with hooked(_noting(model, bodies, outputs)):
        found = run(model, batch, labels=False)
    first = found.logits if has_logits(found) else torch.empty(0)
    body = next((name for name in bodies if name in outputs), "")
    if not body or first.shape[:-1] != (len(ids), 1):
        return None
    return LazyLogits(model, batch, body, outputs, first)


def parts(shape: torch.Size) -> Iterator[tuple[int, int]]:
    """Yield the first token of every part of some logits, and the first one after it.

    Args:
        shape: ``[batch, tokens, classes]``.
    """
    samples, tokens, classes = shape
    step = max(1, _PART // (4 * samples * classes))
    for start in range(0, tokens, step):
        yield start, min(start + step, tokens)


def _bodies(model: Any) -> list[str]:
    """Return the names of the modules whose last hidden state the head may get, outer ones first.

    Most models call their base model, some the decoder in it, and those without one their decoder.
    """
    found = [getattr(model, "base_model", None)]
    found += [model.get_decoder()] if hasattr(model, "get_decoder") else []
    return [name for name, module in model.named_modules() if name and module in found]


def _noting(
    model: nn.Module, bodies: Sequence[str], outputs: dict[str, ModelOutput]
) -> Iterator[Hook]:
    """Keep the hidden states of all children, and show the head those of the first token alone."""
    called: list[str] = []

    def calling(name: str) -> Callable[..., None]:
        return lambda module, args: called.append(name)

    def note(name: str) -> Callable[..., ModelOutput | None]:
        def hook(module: nn.Module, args: Any, output: Any) -> ModelOutput | None:
            hidden = getattr(output, _HIDDEN, None) if isinstance(output, ModelOutput) else None
            if not isinstance(hidden, Tensor) or hidden.dim() != 3 or name not in wanted():
                return None
            outputs[name] = type(output)(**{_HIDDEN: hidden})
            return _of_tokens(output, 0, 1) if name in bodies else None

        return hook

    def wanted() -> list[str]:
        """The outermost body that was called, and the children besides."""
        outer = next((name for name in bodies if name in called), "")
        return [name for name in watched if name == outer or name not in bodies]

    watched = [*dict.fromkeys([*(name for name, _ in model.named_children()), *bodies])]
    for name in watched:
        module = model.get_submodule(name)
        yield Hook(module, "before", calling(name))
        yield Hook(module, "after", note(name))


@contextmanager
def _answering(module: nn.Module, output: ModelOutput) -> Iterator[None]:
    """Let a module return an output without running."""
    own = vars(module).get("forward")

    def restore() -> None:
        vars(module).pop("forward", None)
        if own is not None:
            vars(module)["forward"] = own

    with undoing(restore):
        vars(module)["forward"] = lambda *args, **kwargs: output
        yield


def _of_tokens(output: ModelOutput, start: int, stop: int) -> ModelOutput:
    kind: Any = type(output)
    part: ModelOutput = kind(**{_HIDDEN: output[_HIDDEN][:, start:stop]})
    return part


def _on(output: ModelOutput, device: torch.device) -> ModelOutput:
    kind: Any = type(output)
    moved: ModelOutput = kind(**{_HIDDEN: output[_HIDDEN].to(device)})
    return moved
