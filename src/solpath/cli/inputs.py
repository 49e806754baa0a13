"""What commands work on: models, paths and tables by name, and batches of a user's data."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solpath.errors import ConfigError

if TYPE_CHECKING:
    from solpath.planning.latency_table import LatencyTable
    from solpath.planning.path import SolutionPath


def random_tokens(model: Any, samples: int, tokens: int) -> dict[str, Any]:
    """A batch of random tokens without padding, for timings. ``[samples, tokens]`` each."""
    import torch

    if takes(model) != {"text"}:
        raise ConfigError(
            f"{type(model).__name__} takes {' and '.join(sorted(takes(model)))}; time it from "
            "Python, with solpath.measure or solpath.plan_for_latency and a batch of yours."
        )
    limit = getattr(model.config, "max_position_embeddings", tokens)
    if tokens > limit:
        raise ConfigError(f"tokens must be at most {limit} for this model, got {tokens}.")
    shape, generator = (samples, tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones(shape, dtype=torch.int64)}


def batches_for(name: str, model: Any, text: Path | None, images: Path | None, seed: int) -> Any:
    """Batches of the images, of the text, or of installed docstrings."""
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
    """What a model takes: ``"text"``, ``"image"``, or several, a decoder's own input too."""
    kinds = model.input_modalities
    found = {kinds} if isinstance(kinds, str) else set(kinds)
    return found | {"decoder input"} if model.config.is_encoder_decoder else found


def rows_of(
    model: Any, tokenizer: Any, source: Any, *, length: int = 32, seed: int | None = None
) -> Any:
    """Decoders get full blocks, other models one text a row; no longer than the model allows."""
    from solpath.data.text import text_batches

    config = model.config
    longest = getattr(config, "max_position_embeddings", None) or length
    pack = model.can_generate()
    return text_batches(source, tokenizer, length=min(length, longest), seed=seed, pack=pack)


def split_batches(
    name: str, model: Any, text: Path | None, images: Path | None, seed: int
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Batches to train on and to judge by: docstrings of other files, or the last tenth of both."""
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
    return batches[:-count], list(batches[-count:])  # these are looked at again and again


def load_any(name: str) -> Any:
    """The model of a folder or hub id, dense or extracted."""
    from solpath.pretrained import from_pretrained, quiet_transformers
    from solpath.storing.reading import load

    quiet_transformers()
    return load(name) if (Path(name) / "solpath.json").is_file() else from_pretrained(name)


def path_of(folder: Path) -> "SolutionPath":
    """The path in a folder."""
    from solpath.planning.path import SolutionPath

    return SolutionPath.load(folder)


def table_of(file: Path) -> "LatencyTable":
    """The latency table in a file."""
    from solpath.planning.latency_table import LatencyTable

    return LatencyTable.load(file)
