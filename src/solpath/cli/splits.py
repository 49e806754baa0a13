"""The user's data in parts that have nothing in common: to fit on, and to judge by."""

from collections.abc import Hashable, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

from solpath.cli.arguments import Data
from solpath.cli.batches import batches_for, docstring_batches
from solpath.data.docstrings import TextPair, read_corpus, texts_of
from solpath.data.feeding import Feed, takes
from solpath.data.preparation import Preparation
from solpath.data.samples import batches_apart, sample_digests, unseen_samples
from solpath.data.source import batch_size
from solpath.errors import ConfigError
from solpath.pretrained import load_processor
from solpath.refining.fitting import CHECKED

FITTED = 128
"""The batches that members are refitted on, if no number is given."""


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
