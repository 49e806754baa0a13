"""Check the batches that a user gives, and complete them as the model itself would.

Every function that runs a model on batches of a user passes each of them through one `Preparation`
first, so that all of them refuse, skip and complete the same.
"""

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from solpath.data.source import batch_size, check_device
from solpath.errors import BatchError

_IDS = ("input_ids", "decoder_input_ids", "token_type_ids", "position_ids")
_VALUES = ("pixel_values", "input_features", "input_values", "inputs_embeds")
_MASKS = ("attention_mask", "decoder_attention_mask", "pixel_attention_mask")
_DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
_IGNORED = -100  # what transformers puts in labels where no token is predicted


@contextmanager
def preparing(
    model: nn.Module, *devices: torch.device, name: str = "batch"
) -> "Iterator[Preparation]":
    """Yield a `Preparation`. When the block ends without an error, say which rows were skipped.

    Args:
        model: See `Preparation`.
        devices: See `Preparation`.
        name: See `Preparation`.

    Example:
        >>> with preparing(model, torch.device("cpu")) as prepare:
        ...     prepare(0, batch) is batch  # nothing was wrong with it, and nothing missing
        True
    """
    prepare = Preparation(model, *devices, name=name)
    yield prepare
    if prepare.skipped:
        rows = sum(len(numbers) for numbers in prepare.skipped.values())
        index, numbers = next(iter(prepare.skipped.items()))
        warnings.warn(
            f"skipped {rows} {'row' if rows == 1 else 'rows'} of padding alone (the attention mask "
            f"is all 0, or the labels are all -100); the first is row {numbers[0]} of {name} "
            f"{index}.",
            stacklevel=4,
        )


class Preparation:
    """Checks and completes the batches of one model, called as ``prepare(index, batch)``.

    - A batch that no model takes is refused by its number, with what to give instead, and so are
      token numbers that the model has no embedding for.
    - Rows of padding alone, whose attention mask is all 0 or whose labels are all -100, are left
      out: attention over no token means nothing, and is NaN in many models. `skipped` says which.
    - A model with encoder and decoder gets its decoder inputs from ``labels``, if a batch has
      labels and no decoder inputs, by the model's own shift to the right. Labels of -100 at the end
      of a row do not count, also where a collator has made decoder inputs of them. The labels stay.

    A batch of which all this is true already comes back as it is.

    Args:
        model: The model. Its weights are not looked at.
        devices: The devices that tensors must be on.
        name: What messages call a batch.

    Attributes:
        skipped: The numbers of the rows that were left out, by the number of their batch.
    """

    def __init__(self, model: nn.Module, *devices: torch.device, name: str = "batch") -> None:
        self._model, self._devices, self._name = model, devices, name
        self.skipped: dict[int, list[int]] = {}

    def __call__(self, index: int, batch: Any) -> Any:
        """Return the batch, checked and completed. The given one is left untouched.

        Args:
            index: The number of the batch, for messages.
            batch: What a user gave.

        Raises:
            BatchError: It is no batch, has no samples or nothing but padding, is on another device,
                or has numbers of another kind than the model takes, or of tokens it does not know.
        """
        name = self.place(index)
        _check_values(self._model, batch, name)
        batch_size(batch)
        for device in self._devices:
            check_device(batch, device)
        if not isinstance(batch, Mapping):
            return batch
        batch = _with_decoder_inputs(self._model, batch)
        keep = _rows_with_tokens(batch)
        if keep is None or bool(keep.all()):
            return batch
        if not keep.any():
            raise BatchError(
                f"all {len(keep)} rows of {name} are padding alone (the attention mask is all 0, "
                "or the labels are all -100); leave the batch out."
            )
        self.skipped[index] = (~keep).nonzero().flatten().tolist()
        batched = {
            n for n, v in batch.items() if isinstance(v, Tensor) and v.shape[:1] == keep.shape
        }
        return {n: v[keep] if n in batched else v for n, v in batch.items()}

    def place(self, index: int, row: int | None = None) -> str:
        """Return the words for a row of a batch, such as ``"row 2 of batch 5"``.

        Args:
            index: The number of the batch.
            row: The number of the row among those that were not left out. None, if it is not known,
                names the batch alone.
        """
        if row is None:
            return f"{self._name} {index}"
        for skipped in self.skipped.get(index, ()):
            row += skipped <= row
        return f"row {row} of {self._name} {index}"


def _check_values(model: nn.Module, batch: Any, name: str) -> None:
    """Raise `BatchError` unless a batch holds tensors of the kinds of numbers that models take."""
    if isinstance(batch, str):
        raise BatchError(
            f"{name} is a str, and a batch is a dict of tensors or a tensor; make batches of texts "
            "with solpath.text_batches(texts, tokenizer)."
        )
    if isinstance(batch, list | tuple):
        raise BatchError(
            f"{name} is a {type(batch).__name__}, and a batch is a dict of tensors or a tensor; "
            "take what the model gets out of it, for example "
            "[{'pixel_values': images} for images, _ in loader]."
        )
    if not isinstance(batch, Mapping | Tensor):
        raise BatchError(
            f"{name} is a {type(batch).__name__}, and a batch is a dict of tensors or a tensor."
        )
    first = next(iter(inspect.signature(model.forward).parameters), "")
    values = batch.items() if isinstance(batch, Mapping) else [(first, batch)]
    for key, value in values:
        if isinstance(value, list) or type(value).__module__ == "numpy":
            raise BatchError(
                f"{key} of {name} is a {type(value).__name__}, not a tensor; give a tokenizer or "
                "processor return_tensors='pt', or a data set .with_format('torch')."
            )
        if not isinstance(value, Tensor):
            continue
        if key in _IDS and value.dtype not in (torch.int64, torch.int32):
            raise BatchError(
                f"{key} of {name} is {value.dtype}, and numbers of tokens are integers; "
                "give .long()."
            )
        if key in ("input_ids", "decoder_input_ids") and value.dim() < 2:
            raise BatchError(
                f"{key} of {name} has the shape {list(value.shape)}, not [samples, tokens]; add "
                "a dimension with .unsqueeze(0) if it is a single sample."
            )
        if key == "input_ids":
            _check_tokens(model, value, name)
        if key in _VALUES and not value.is_floating_point():
            raise BatchError(
                f"{key} of {name} is {value.dtype}, and the model takes floats; let its processor "
                "make them (solpath.image_batches does), which also scales them."
            )


def _check_tokens(model: nn.Module, ids: Tensor, name: str) -> None:
    """Raise `BatchError` if token numbers on the CPU go beyond the embedding of a model."""
    embedding = _embedding(model)
    if embedding is None or ids.device.type != "cpu" or not ids.numel():
        return
    if int(ids.max()) < embedding.num_embeddings:
        return
    unknown = {one for one in ids.flatten().tolist() if one >= embedding.num_embeddings}
    if unknown := unknown - _placeholders(model):
        kind = type(model).__name__
        raise BatchError(
            f"input_ids of {name} go up to {max(unknown):,}, and the embedding of {kind} ends at "
            f"{embedding.num_embeddings - 1:,}; give the tokenizer of this model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and train the new rows first."
        )


def _placeholders(model: nn.Module) -> set[Any]:
    """Return the tokens that stand for images or sounds, which some models embed otherwise."""
    config = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    names = [name for name in settings if name.endswith(("_token_id", "_token_index"))]
    return {settings[name] for name in names if isinstance(settings[name], int)}


def _embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the embedding of a model's tokens, if transformers knows one."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = None if find is None else find()
    except (AttributeError, NotImplementedError):  # that of a model of images
        return None
    return found if isinstance(found, nn.Embedding) else None


def _with_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch with the decoder inputs that the model makes of its labels itself.

    It gets their mask, too, also if its collator has made the inputs of the labels.
    """
    labels = batch.get("labels")
    config: Any = getattr(model, "config", None)
    generates: Any = getattr(model, "can_generate", bool)
    if (
        not isinstance(labels, Tensor)
        or labels.dim() != 2
        or not getattr(config, "is_encoder_decoder", False)
        or not generates()  # the labels of a classifier are classes
    ):
        return batch
    added = {name: batch[name] for name in _DECODER if batch.get(name) is not None}
    if not added:
        ids = _shifted(model, labels)
        if ids is None:
            return batch
        added = {"decoder_input_ids": ids}
    # A causal decoder gives the same for what comes before, so what follows the last label may go.
    counts = (labels != _IGNORED).flip(1).cummax(1).values.flip(1)
    fits = all(inputs.shape[:2] == labels.shape for inputs in added.values())
    if fits and batch.get("decoder_attention_mask") is None and not counts.all():
        added["decoder_attention_mask"] = counts.long()
    return batch if added.keys() <= batch.keys() else {**batch, **added}


def _shifted(model: Any, labels: Tensor) -> Tensor | None:
    """Return the decoder inputs that a model makes of labels, if transformers says how."""
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        return cast("Tensor", shift(labels))
    # Whisper, M2M-100 and Blenderbot have a function beside the class
    homes = (sys.modules[kind.__module__] for kind in type(model).__mro__)
    shift = next((h.shift_tokens_right for h in homes if hasattr(h, "shift_tokens_right")), None)
    if shift is None:
        return None
    config = model.config
    return cast("Tensor", shift(labels, config.pad_token_id, config.decoder_start_token_id))


def _rows_with_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """Return which rows have a token in every attention mask, bool ``[batch]``; None without any.

    Only masks ``[batch, tokens]`` are looked at.
    """
    masks = [batch.get(name) for name in _MASKS]
    found = [(mask != 0).any(1) for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2]
    size = batch_size(batch)
    found = [rows for rows in found if len(rows) == size]
    return torch.stack(found).all(0) if found else None
