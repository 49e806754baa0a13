"""Batches of the data that a command's options name. Commands import this when they run."""

from collections.abc import Sequence
from typing import Any

import torch

from solpath.cli.arguments import Data
from solpath.cli.terminal import say
from solpath.data.columns import ROLES, Role
from solpath.data.docstrings import read_corpus, texts_of
from solpath.data.feeding import Feed, feed, longest_text, takes
from solpath.data.mixture import split_weight
from solpath.data.tables import Table, images_table, lines_table, open_table
from solpath.errors import ConfigError
from solpath.positions import most_tokens
from solpath.pretrained import load_processor
from solpath.running.forward import device_of


def random_tokens(model: Any, samples: int, tokens: int, *, new: int = 0) -> dict[str, Any]:
    """Return a batch of random tokens without padding, for timings.

    Its tensors are int64 ``[samples, tokens]``, and the same in every run.

    Args:
        model: The model.
        samples: The number of texts.
        tokens: The number of tokens per text.
        new: The number of tokens that the model will generate after them.

    Raises:
        ConfigError: The model takes something other than text alone, or takes fewer tokens.
    """
    if takes(model) != {"text"}:
        raise ConfigError(
            f"{type(model).__name__} takes {' and '.join(sorted(takes(model)))}; time it from "
            "Python, with solpath.measure or solpath.plan_for_latency and a batch of yours."
        )
    limit = most_tokens(model)
    if limit is not None and tokens + new > limit:
        most = f"{limit} for this model" + (f", less {new} new ones" if new else "")
        raise ConfigError(f"tokens must be at most {most}, got {tokens}.")
    shape, generator = (samples, tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    ids = ids.to(device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def batches_for(
    name: str,
    model: Any,
    data: Data,
    seed: int,
    *,
    labels: bool | None = False,
    pack: bool | None = None,
    grouped: bool = False,
    device: Any = "cpu",
) -> Feed:
    """Return batches of the data that was named, or of the docstrings of installed packages.

    What is read is said.

    Args:
        name: The folder or Hub id of the model, from where its processor is read.
        model: The model.
        data: What the options say.
        seed: Seeds the order of the samples.
        labels: See `solpath.data.feeding.feed`.
        pack: See `solpath.data.feeding.feed`. A row of its own for every text is padded with the
            end token where there is no token for it.
        grouped: Whether rows may belong together: by a column that says so, or as a pair of texts.
        device: The device of the batches.

    Raises:
        ConfigError: The model takes something else than what was given.
    """
    if not data.named and not labels and takes(model) == {"text"}:
        known = texts_of(read_corpus(calibration=0, test=0).search, seed=seed)
        return docstring_batches(model, load_processor(name), known, data, device)
    if labels and not data.named:
        raise ConfigError("there are no labels without data; give some with --data.")
    tables = _tables(name, model, data)
    columns = _columns(model, [table for table, _ in tables], data.column or ())
    if "group" in columns and not grouped:
        raise ConfigError("a column of groups is for solpath choose; leave group= out here.")
    found = feed(
        model,
        _padding(load_processor(name), pack),
        tables,
        columns=columns,
        labels=labels,
        pack=pack,
        grouped=grouped,
        batch_size=data.batch_size,
        length=data.length,
        limit=data.limit,
        batches=data.batches,
        seed=seed,
        device=device,
    )
    for line in found.said:
        say(f"data: {line}")
    return found


def docstring_batches(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    data: Data,
    device: Any,
    *,
    pack: bool | None = None,
) -> Feed:
    """Return batches of docstrings, in their order, of 32 tokens if no length is given.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The docstrings.
        data: Says how many, and how long. Data that it names is not read.
        device: The device of the batches.
        pack: See `batches_for`.
    """
    length = data.length or min(32, longest_text(model, tokenizer) or 32)
    table = Table("docstrings", [{"text": text} for text in texts], {"text": "text"})
    return feed(
        model,
        _padding(tokenizer, pack),
        [(table, None)],
        pack=pack,
        batch_size=data.batch_size,
        length=length,
        limit=data.limit,
        batches=data.batches,
        seed=None,
        device=device,
    )


def _padding(processor: Any, pack: bool | None) -> Any:
    """Return a processor whose tokenizer pads, on the right, where texts are rows of their own."""
    if pack is False and getattr(processor, "pad_token_id", 0) is None:
        processor.pad_token = processor.eos_token
        processor.padding_side = "right"
    return processor


def _tables(name: str, model: Any, data: Data) -> list[tuple[Table, float | None]]:
    """Open what the options name."""
    kinds = takes(model)
    if kinds == {"image"} and (data.text or not data.named):
        raise ConfigError(f"{name} takes images; give a folder of them with --images or --data.")
    if kinds == {"text"} and data.images:
        raise ConfigError(f"{name} takes text, not images; give a file with --text or --data.")
    if len([given for given in (data.text, data.images, data.data) if given]) > 1:
        raise ConfigError("give one of --text, --images and --data.")
    if not data.named:
        found = " and ".join(sorted(kinds))
        hint = "; give them with --data" if kinds == {"image", "text"} else ""
        raise ConfigError(f"{name} takes {found}; use it from Python, with your own batches{hint}.")
    chosen = {"config": data.config, "split": data.split}
    if not data.data:
        for option, values in {**chosen, "column": data.column}.items():
            if values and (option != "column" or data.text):
                raise ConfigError(f"--{option} is for --data.")
        if data.text:
            return [(lines_table(str(data.text)), None)]
        assert data.images is not None
        return [(images_table(str(data.images), data.images), None)]
    count = len(data.data)
    each = {option: _once_or_each(option, values, count) for option, values in chosen.items()}
    parts = [split_weight(text) for text in data.data]
    return [
        (open_table(part, config=each["config"][i], split=each["split"][i]), weight)
        for i, (part, weight) in enumerate(parts)
    ]


def _once_or_each(option: str, values: Sequence[str] | None, count: int) -> Sequence[str | None]:
    if not values:
        return [None] * count
    if len(values) not in (1, count):
        raise ConfigError(f"give --{option} once, or once for each of the {count} --data.")
    return list(values) * (count // len(values))


def _columns(model: Any, tables: Sequence[Table], given: Sequence[str]) -> dict[Role, str]:
    """Return role to column, of ``COLUMN`` or ``ROLE=COLUMN``."""
    found: dict[Role, str] = {}
    for text in given:
        before, mark, column = text.partition("=")
        known = [role for role in ROLES if mark and role == before]
        role: Role = "image" if takes(model) == {"image"} else "text"
        if known:
            role = known[0]
        elif mark and not any(text in table.holds for table in tables):
            raise ConfigError(
                f"--column {text}: {before!r} is none of the roles {', '.join(ROLES)}."
            )
        else:
            column = text
        if role in found:
            raise ConfigError(f"--column gives the {role} twice: {found[role]} and {column}.")
        found[role] = column
    return found
