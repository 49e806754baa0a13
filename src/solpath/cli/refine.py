"""Commands that make up for what a cut lost."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import (
    Data,
    Json,
    Loss,
    ModelName,
    Placement,
    SmallName,
    StateFolder,
    seed_option,
    takes_data,
    takes_placement,
)
from solpath.cli.inputs import check_not_swapped, device_for, load_any, load_small, loss_of
from solpath.cli.state import keeping_state
from solpath.cli.terminal import print_json, print_table, say_next
from solpath.errors import ConfigError
from solpath.holding import DENSE, EXTRACTED, TUNE_STATE

if TYPE_CHECKING:
    from solpath.cli.losses import NamedLoss


@app.command()
@takes_data
@takes_placement
def tune(
    context: typer.Context,
    small: SmallName,
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the tuned model, new or empty.")],
    data: Data,
    place: Placement,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank, merged; default: all weights.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; default: by the distance to the dense model.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of the order of texts and of the adapters.")] = 0,
    loss: Loss = None,
    checkpoint: StateFolder = None,
    as_json: Json = False,
) -> None:
    """Train an extracted model towards the dense one. Stopped, the same command goes on."""
    from solpath.config import TuneConfig
    from solpath.refining.tuning import tune as train
    from solpath.running.checkpoint import checkpoint_file

    config = TuneConfig(steps=steps, seed=seed, learning_rate=learning_rate, lora_rank=lora_rank)
    checkpoint_file(checkpoint, TUNE_STATE)
    own = loss_of(loss)

    @contextmanager
    def tuned(
        start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]
    ) -> Iterator[Any]:
        with keeping_state(context, out, checkpoint, batches, heldout) as state:
            yield train(
                start,
                teacher,
                batches,
                config,
                heldout=heldout,
                loss=own,
                checkpoint=state,
                progress=not as_json,
            )

    _improve(small, dense, out, data, place, seed, own, config.to_dict(), tuned, as_json)


@app.command()
@takes_data
@takes_placement
def compensate(
    small: SmallName,
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the better model, new or empty.")],
    data: Data,
    place: Placement,
    seed: Annotated[int, seed_option("Seed of the order of texts.")] = 0,
    loss: Loss = None,
    as_json: Json = False,
) -> None:
    """Refit an extracted model to the dense one, layer by layer, without training."""
    from solpath.cli.splits import FITTED
    from solpath.refining.compensation import compensate as refit
    from solpath.refining.fitting import CHECKED

    data = replace(data, batches=data.batches or FITTED)
    if (data.batches or 0) < CHECKED:
        raise ConfigError(f"batches must be at least {CHECKED} for compensate, got {data.batches}.")
    config, own = {"batches": data.batches}, loss_of(loss)

    @contextmanager
    def refitted(
        start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]
    ) -> Iterator[Any]:
        yield refit(start, teacher, batches, loss=own, progress=not as_json)

    _improve(small, dense, out, data, place, seed, own, config, refitted, as_json)


def _improve(
    small: str,
    dense: str,
    out: Path,
    data: Data,
    place: Placement,
    seed: int,
    loss: "NamedLoss | None",
    config: dict[str, Any],
    improved: Callable[[Any, Any, Sequence[Any], Sequence[Any]], AbstractContextManager[Any]],
    as_json: bool,
) -> None:
    """Save what ``improved(small, dense, batches, heldout)`` yields, and print how near it is."""
    from solpath.cli.splits import split_batches
    from solpath.files import check_output
    from solpath.measuring.evaluation import evaluate
    from solpath.measuring.metrics import figure
    from solpath.pretrained import load_processor
    from solpath.storing.writing import save

    check_output(out)
    check_not_swapped(small, dense, EXTRACTED, DENSE)
    start, teacher = load_small(small, place), load_any(dense, place)
    split = split_batches(
        dense,
        teacher,
        data,
        seed,
        labels=None if loss is not None else False,
        device=device_for(place),
    )
    with improved(start, teacher, split.batches, split.heldout) as better:
        save(better, out, tokenizer=load_processor(dense))
    before, after = (
        dict(evaluate(m, teacher, split.heldout, loss=loss).metrics) for m in (start, better)
    )
    if as_json:
        return print_json({"out": str(out), "config": config, "before": before, "after": after})
    rows = [(name, figure(before[name]), figure(after[name])) for name in before]
    print_table(("held-out metric", "before", "after"), rows)
    print(f"written to {out}")
    own = [] if loss is None else ["--loss", loss.name]
    say_next("eval", out, "--reference", dense, *data.words_for_others, *place.words, *own)
