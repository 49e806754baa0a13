"""Commands that make up for what a cut lost."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from solpath.cli.app import app
from solpath.cli.arguments import Dtype, Images, Json, ModelName, Precision, SmallName, Text
from solpath.cli.inputs import load_any, load_small, split_batches
from solpath.cli.terminal import print_json, print_table


@app.command()
def tune(
    context: typer.Context,
    small: SmallName,
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the tuned model, new or empty.")],
    text: Text = None,
    images: Images = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 500,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train adapters of this rank, merged; default: all weights.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak; default: by the distance to the dense model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of texts and of the adapters.")] = 0,
    dtype: Dtype = Precision.AUTO,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for the state, so that tuning can go on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an extracted model to give the outputs of the dense one."""
    from solpath.config import TuneConfig
    from solpath.refining.tuning import tune as train

    config = TuneConfig(steps=steps, seed=seed, learning_rate=learning_rate, lora_rank=lora_rank)

    def tuned(start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]) -> Any:
        context.obj.checkpoint = checkpoint
        return train(
            start,
            teacher,
            batches,
            config,
            heldout=heldout,
            checkpoint=checkpoint,
            progress=not as_json,
        )

    _improve(small, dense, out, text, images, seed, dtype, config.to_dict(), tuned, as_json)


@app.command()
def compensate(
    small: SmallName,
    dense: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the better model, new or empty.")],
    text: Text = None,
    images: Images = None,
    batch_count: Annotated[
        int, typer.Option(help="Batches to fit on; more is better.", min=4)
    ] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the order of texts.")] = 0,
    dtype: Dtype = Precision.AUTO,
    as_json: Json = False,
) -> None:
    """Refit an extracted model to the dense one, layer by layer, without training."""
    from solpath.refining.compensation import compensate as refit

    def refitted(start: Any, teacher: Any, batches: Sequence[Any], heldout: Sequence[Any]) -> Any:
        return refit(start, teacher, batches[:batch_count], progress=not as_json)

    config = {"batch_count": batch_count}
    _improve(small, dense, out, text, images, seed, dtype, config, refitted, as_json)


def _improve(
    small: str,
    dense: str,
    out: Path,
    text: Path | None,
    images: Path | None,
    seed: int,
    dtype: Precision,
    config: dict[str, Any],
    improved: Callable[[Any, Any, Sequence[Any], Sequence[Any]], Any],
    as_json: bool,
) -> None:
    """Save what ``improved(small, dense, batches, heldout)`` returns, and print how near it is."""
    from solpath.files import check_output
    from solpath.measuring.evaluation import evaluate
    from solpath.pretrained import load_processor
    from solpath.storing.writing import save

    check_output(out)
    start, teacher = load_small(small, dtype), load_any(dense, dtype)
    batches, heldout = split_batches(dense, teacher, text, images, seed)
    better = improved(start, teacher, batches, heldout)
    save(better, out, tokenizer=load_processor(dense))
    before, after = (dict(evaluate(m, teacher, heldout).metrics) for m in (start, better))
    if as_json:
        return print_json({"out": str(out), "config": config, "before": before, "after": after})
    rows = [(name, f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before]
    print_table(("held-out metric", "before", "after"), rows)
    print(f"written to {out}")
