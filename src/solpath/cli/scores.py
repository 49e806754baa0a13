"""The tasks that commands score models at, as functions of a model."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from solpath.cli.arguments import Task
from solpath.errors import ConfigError

if TYPE_CHECKING:
    from solpath.data.docstrings import TextPair
    from solpath.reporting.scores import Scores


def scorer(
    task: Task,
    dense: Any,
    batches: Iterable[Any],
    pairs: "Sequence[TextPair]",
    reference: str,
    length: int,
) -> "Callable[[Any], Scores]":
    """Return a function that scores a model at a task.

    Args:
        task: The task.
        dense: The dense model, which says what models take.
        batches: The batches to score on.
        pairs: The pairs of texts, for a retrieval of texts.
        reference: The folder or Hub id of the dense model, from where its tokenizer is read.
        length: The number of tokens per text, for a retrieval of texts.

    Raises:
        ConfigError: The model cannot do the task, or there are no pairs.
    """
    from solpath.data.feeding import is_classifier, longest_text, takes
    from solpath.pretrained import load_processor
    from solpath.reporting import tasks
    from solpath.reporting.retrieval import embedder

    if task == Task.CLASSIFICATION:
        if not is_classifier(dense):
            raise ConfigError(f"{type(dense).__name__} is no classifier.")
        return lambda model: tasks.classification(model, batches)
    if task == Task.LANGUAGE_MODELING:
        if not dense.can_generate():
            raise ConfigError(f"{type(dense).__name__} does not predict the next token.")
        return lambda model: tasks.language_modeling(model, batches)
    if takes(dense) == {"text", "image"}:
        return lambda model: tasks.image_retrieval(model, batches)
    if not pairs:
        raise ConfigError(
            "retrieval needs pairs of texts, or of images and texts; for texts give "
            "--column text=COLUMN --column pair=COLUMN."
        )
    tokenizer = load_processor(reference)
    shortened = min(length, longest_text(dense, tokenizer) or length)
    return lambda model: tasks.text_retrieval(embedder(model, tokenizer, length=shortened), pairs)
