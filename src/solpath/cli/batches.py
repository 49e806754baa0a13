"""Batches of the data that a command's options name. Commands import this when they run."""

from collections.abc import Hashable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from solpath.cli.arguments import Data
from solpath.cli.terminal import say
from solpath.data.columns import ROLES, Role
from solpath.data.docstrings import TextPair, read_corpus, texts_of
from solpath.data.feeding import Feed, feed, longest_text, takes
from solpath.data.mixture import split_weight
from solpath.data.preparation import Preparation
from solpath.data.samples import batches_apart, sample_digests, unseen_samples
from solpath.data.source import batch_size
from solpath.data.tables import Table, images_table, lines_table, open_table
from solpath.errors import ConfigError
from solpath.pretrained import load_processor
from solpath.refining.fitting import CHECKED
from solpath.running.forward import device_of

FITTED = 128
"""The batches that members are refitted on, if no number is given."""


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
    limit = getattr(model.config, "max_position_embeddings", tokens + new)
    if tokens + new > limit:
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
        grouped: Whether a column may say which rows belong together.
        device: The device of the batches.

    Raises:
        ConfigError: The model takes something else than what was given.
    """
    if not data.named and not labels and takes(model) == {"text"}:
        known = texts_of(read_corpus(calibration=0, test=0).search, seed=seed)
        return docstring_batches(model, load_processor(name), known, data, device)
    if labels and not data.named:
        raise ConfigError("there are no labels without data; give some with --data.")
    tables, columns = _tables(name, model, data), _columns(model, data.column or ())
    if "group" in columns and not grouped:
        raise ConfigError("a column of groups is for solpath choose; leave group= out here.")
    found = feed(
        model,
        _padding(load_processor(name), pack),
        tables,
        columns=columns,
        labels=labels,
        pack=pack,
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


def _columns(model: Any, given: Sequence[str]) -> dict[Role, str]:
    """Return role to column, of ``COLUMN`` or ``ROLE=COLUMN``."""
    found: dict[Role, str] = {}
    for text in given:
        before, mark, column = text.partition("=")
        known = [role for role in ROLES if mark and role == before]
        role: Role = "image" if takes(model) == {"image"} else "text"
        if known:
            role = known[0]
        else:
            column = text
        if role in found:
            raise ConfigError(f"--column gives the {role} twice: {found[role]} and {column}.")
        found[role] = column
    return found


class Split(NamedTuple):
    """Data in two parts that have no sample in common.

    Attributes:
        batches: The batches to train or fit on.
        heldout: The batches to judge by.
        pairs: The pairs of texts in the second part, where the data has pairs for a model that
            takes single texts.
        groups: What every sample of the second part is from; None if each stands for itself.
        left_out: The number of samples that are not in the second part because a search ran on
            them, or on others of their groups.
    """

    batches: Sequence[Any]
    heldout: Sequence[Any]
    pairs: Sequence[TextPair] = ()
    groups: Sequence[Hashable] | None = None
    left_out: int = 0


def split_batches(
    name: str,
    model: Any,
    data: Data,
    seed: int,
    *,
    labels: bool | None = False,
    pack: bool | None = None,
    device: Any = "cpu",
) -> Split:
    """Return batches to train on, and held-out batches to judge by.

    Docstrings are split by file. Of the user's own data, the last tenth of the batches is held out.
    The arguments are those of `batches_for`.

    Raises:
        ConfigError: There is only one batch, or the model takes something else than what was given.
    """
    if not data.named and not labels and takes(model) == {"text"}:
        corpus, tokenizer = read_corpus(search=2048, test=0), load_processor(name)
        texts = texts_of(corpus.search, seed=seed)
        held = docstring_batches(
            model, tokenizer, texts_of(corpus.calibration), replace(data, batches=None), device
        )
        fitted = docstring_batches(model, tokenizer, texts, data, device).batches
        return Split(fitted, list(held.batches), corpus.calibration)
    found = batches_for(
        name, model, replace(data, batches=None), seed, labels=labels, pack=pack, device=device
    )
    batches = found.batches
    count = max(1, len(batches) // 10)
    if len(batches) == count:
        raise ConfigError("there is one batch of data; give more: a tenth of it is held out.")
    last = list(batches[-count:])  # read again and again
    pairs = pairs_of(found, sum(map(batch_size, last)))
    return Split(batches[:-count][: data.batches], last, pairs)


def choice_batches(
    name: str,
    model: Any,
    data: Data,
    *,
    labels: bool,
    fit: bool,
    device: Any,
    seen: Set[int] = frozenset(),
) -> Split:
    """Return the batches to choose a size by, and if members are fitted, batches apart for that.

    Texts are a row each, for decoders too, and both texts of a pair belong together. Members are
    fitted on `FITTED` batches of docstrings, or of the user's data, of which they get half at most
    and whole groups. What both parts hold is judged by only.

    Args:
        name: See `batches_for`.
        model: See `batches_for`.
        data: What the options say. Its number of batches is that of those to choose by.
        labels: See `batches_for`.
        fit: Whether members are fitted.
        device: See `batches_for`.
        seen: Digests of the samples that the search ran on, which cannot judge.

    Raises:
        ConfigError: There are too few batches to fit on, the search saw all of the data, or the
            model takes something else.
    """
    whole = replace(data, batches=None)
    fitted: Sequence[Any]
    if not data.named and not labels and takes(model) == {"text"}:
        corpus, tokenizer = read_corpus(search=2048, calibration=0), load_processor(name)
        judged, other = (
            docstring_batches(model, tokenizer, texts_of(pairs), whole, device, pack=False)
            for pairs in (corpus.test, corpus.search)
        )
        of = {text: i for i, pair in enumerate(corpus.test) for text in pair}
        held, fitted = judged.batches, other.batches
        groups: Sequence[Hashable] | None = [of[row["text"]] for row in judged.rows]
    else:
        found = batches_for(
            name, model, whole, 0, labels=labels, pack=False, grouped=True, device=device
        )
        most = found.batches.batch_size * min(FITTED, len(found.batches) // 2) if fit else 0
        apart = found.groups or range(found.batches.samples)
        first, rest = _halves(apart, most)
        held, fitted = found.batches.select(rest), found.batches.select(first)
        groups = None if found.groups is None else [apart[i] for i in rest]
    most = held.samples if data.batches is None else data.batches * held.batch_size
    kept, left_out = list(range(min(most, held.samples))), 0
    if seen:
        kept, left_out = unseen_samples(held, seen, Preparation(model), most=most, groups=groups)
    if not kept:
        raise ConfigError(
            f"the search saw all {left_out:,} rows of the data, or others of their groups; give "
            "rows that it did not see."
        )
    held = held.select(kept)
    groups = None if groups is None else [groups[i] for i in kept]
    if not fit:
        return Split((), held, groups=groups, left_out=left_out)
    known = {digest for batch in held for digest in sample_digests(batch)}
    others = list(batches_apart(fitted[:FITTED], known))
    if len(others) < CHECKED:
        raise ConfigError(
            f"members are fitted on half of the data, and {len(others)} batches apart from the "
            f"rest are too few; give data for {CHECKED} or more, or smaller batches."
        )
    return Split(others, held, groups=groups, left_out=left_out)


def _halves(groups: Sequence[Hashable], most: int) -> tuple[list[int], list[int]]:
    """Return the samples of the first groups that are `most` together or fewer, and the others."""
    of: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        of.setdefault(group, []).append(i)
    first: set[int] = set()
    for samples in of.values():
        if len(first) + len(samples) <= most:
            first.update(samples)
    return sorted(first), [i for i in range(len(groups)) if i not in first]


def pairs_of(found: Feed, last: int | None = None) -> list[TextPair]:
    """Return the pairs of texts that batches are made of, without those with a blank text.

    Args:
        found: The batches; of what is no pairs of texts, there are none.
        last: The number of samples at the end that both texts are among. None takes all.
    """
    if not found.paired:
        return []
    pairs: list[TextPair] = []
    samples = 0
    for i in range(len(found.rows) - 2, -1, -2):
        pair = found.rows[i]["text"], found.rows[i + 1]["text"]
        filled = sum(bool(text.strip()) for text in pair)  # a blank is no sample
        samples += filled
        if last is not None and samples > last:
            break
        if filled == len(pair):
            pairs.append(pair)
    return pairs[::-1]
