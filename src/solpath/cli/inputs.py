"""What commands work on: models, paths and tables by name, and batches of the user's data."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solpath.cli.arguments import Precision
from solpath.errors import ConfigError

if TYPE_CHECKING:
    from solpath.planning.latency_table import LatencyTable
    from solpath.planning.path import SolutionPath


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
    import torch

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
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def batches_for(name: str, model: Any, text: Path | None, images: Path | None, seed: int) -> Any:
    """Return batches of the images, of the text, or of the docstrings of installed packages.

    Args:
        name: The folder or Hub id of the model, from where its processor is read.
        model: The model.
        text: A file with one text per line. None takes docstrings, if the model takes text.
        images: A folder of images.
        seed: Seeds the order of the samples.

    Raises:
        ConfigError: The model takes something else than what was given.
    """
    from solpath.data.docstrings import read_corpus, texts_of
    from solpath.data.images import image_batches
    from solpath.pretrained import load_processor

    kinds = takes(model)
    if kinds == {"image"}:
        if images is None or text is not None:
            raise ConfigError(f"{name} takes images; give a folder of them with --images.")
        return image_batches(images, load_processor(name), seed=seed)
    if kinds != {"text"}:
        raise ConfigError(
            f"{name} takes {' and '.join(sorted(kinds))}; use it from Python, with your own "
            "batches."
        )
    if images is not None:
        raise ConfigError(f"{name} takes text, not images; give a file with --text.")
    if text is None:
        known = texts_of(read_corpus(calibration=0, test=0).search, seed=seed)
        return rows_of(model, load_processor(name), known)
    return rows_of(model, load_processor(name), text, length=128, seed=seed)


def takes(model: Any) -> set[str]:
    """Return what a model takes, such as ``{"text"}`` or ``{"image"}``.

    A decoder that follows an encoder adds ``"decoder input"``. The text half of a family that also
    sees says that it takes images, but has no argument for them.
    """
    kinds = model.input_modalities
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    if not any(name.startswith("pixel") for name in inspect.signature(model.forward).parameters):
        found.discard("image")
    return found | {"decoder input"} if model.config.is_encoder_decoder else found


def rows_of(
    model: Any, tokenizer: Any, source: Any, *, length: int = 32, seed: int | None = None
) -> Any:
    """Return batches of text that suit the model: full blocks for decoders, else one text per row.

    Args:
        model: The model. It may allow fewer tokens than `length`, which then shortens the rows.
        tokenizer: Its tokenizer.
        source: A file with one text per line, or texts.
        length: The largest number of tokens per row.
        seed: Seeds the order of the texts. None keeps their order.
    """
    from solpath.data.text import text_batches

    config = model.config
    longest = getattr(config, "max_position_embeddings", None) or length
    pack = model.can_generate()
    return text_batches(source, tokenizer, length=min(length, longest), seed=seed, pack=pack)


def split_batches(
    name: str, model: Any, text: Path | None, images: Path | None, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return batches to train on, and held-out batches to judge by.

    Docstrings are split by file. Of the user's own data, the last tenth of the batches is held out.
    The arguments are those of `batches_for`.

    Raises:
        ConfigError: There is only one batch, or the model takes something else than what was given.
    """
    from solpath.data.docstrings import read_corpus, texts_of
    from solpath.pretrained import load_processor

    if text is None and images is None and takes(model) == {"text"}:
        corpus, tokenizer = read_corpus(search=2048, test=0), load_processor(name)
        held = list(rows_of(model, tokenizer, texts_of(corpus.calibration)))
        return rows_of(model, tokenizer, texts_of(corpus.search, seed=seed)), held
    batches = batches_for(name, model, text, images, seed)
    count = max(1, len(batches) // 10)
    if len(batches) == count:
        raise ConfigError("there is one batch of data; give more: a tenth of it is held out.")
    return batches[:-count], list(batches[-count:])  # these are read again and again


def load_any(name: str, dtype: Precision = Precision.AUTO) -> Any:
    """Load the model of a folder, Hub id or GGUF file, dense or extracted.

    Args:
        name: The name of the model.
        dtype: The dtype of its weights.
    """
    from solpath.pretrained import from_pretrained, quiet_transformers

    quiet_transformers()
    if (Path(name) / "solpath.json").is_file():
        return load_small(name, dtype)
    return from_pretrained(name, dtype=dtype.dtype)


def load_dense(name: str, dtype: Precision = Precision.AUTO) -> Any:
    """Load a dense model, or leave its weights on disk if they do not fit into memory.

    Args:
        name: The name of the model.
        dtype: The dtype of its weights.
    """
    from solpath.loading import load_within
    from solpath.pretrained import quiet_transformers

    quiet_transformers()
    return load_within(name, dtype=dtype.dtype)


def load_small(name: str, dtype: Precision = Precision.AUTO) -> Any:
    """Load an extracted model of a folder or Hub id.

    Args:
        name: The name of the model.
        dtype: The dtype of its weights.
    """
    from solpath.storing.reading import load

    model: Any = load(name)
    if dtype is not Precision.AUTO:
        for parameter in model.parameters():  # buffers stay as they are
            parameter.data = parameter.data.to(dtype.dtype)
        model.config.dtype = dtype.dtype
    return model


def path_of(folder: Path) -> "SolutionPath":
    """Load the path in a folder."""
    from solpath.planning.path import SolutionPath

    return SolutionPath.load(folder)


def table_of(file: Path) -> "LatencyTable":
    """Load the latency table in a file."""
    from solpath.planning.latency_table import LatencyTable

    return LatencyTable.load(file)
