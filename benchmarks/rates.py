"""How high a peak of the learning rate runs of few and of many steps want in tuning.

    python benchmarks/rates.py --model digits --threads 1

Members of the best search, compensated, are tuned with multiples of the default rate before it is
halved. Of every run the JSON has the KL to the dense model on test samples, over that before; the
default, halved where one update shows that it is too high, is run beside.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

import solpath
from record import RESULTS, save, show
from solpath.config import TuneConfig
from solpath.model.extraction import extract
from solpath.refining.compensation import compensate
from solpath.refining.learning_rate import default_rate
from solpath.refining.tuning import tune, typical_width
from solpath.searching.search import search
from workloads import Batch, best_search, workload


def main(
    model: Annotated[str, typer.Option(help="One that is judged by KL.")],
    keeps: Annotated[str, typer.Option(help="Comma-separated shares.")] = "0.4,0.25",
    steps: Annotated[str, typer.Option(help="Comma-separated.")] = "20,67,200,600",
    multiples: Annotated[str, typer.Option(help="Multiples.")] = "0.25,0.5,1",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "rates.json",
    smoke: Annotated[bool, typer.Option(help="Tiny settings: does it run?")] = False,
) -> None:
    """Tune the members of one model, and put them in the JSON in place of what it has of it."""
    torch.set_num_threads(threads)
    work = workload(model, None, heldout=32 if smoke else None)
    batches = work.batches(0, 24 if smoke else 256, work.batch_size)
    path = search(work.model, batches, best_search(0, smoke=smoke), progress=False)
    train, judges = work.tuning(0, 24 if smoke else 2048)
    judge, dense = work.judge()
    if "kl" not in dense:
        raise SystemExit(f"{model} is not judged by KL.")
    rows = []
    for keep in _numbers(keeps):
        small = extract(work.model, path.plan(sparsity=1 - keep))
        small = compensate(small, work.model, batches[: work.calibration], progress=False)
        before, rate = judge(small)["kl"], first_rate(small, work.model, judges)
        for count in map(int, _numbers(steps)):
            left = {}
            peaks = {f"{each:g}": each * rate for each in _numbers(multiples)}
            for name, peak in {"default": None, **peaks}.items():
                config = TuneConfig(steps=count, learning_rate=peak)
                tuned = tune(small, work.model, train, config, heldout=judges, progress=False)
                left[name] = judge(tuned)["kl"] / before
            rows.append({"keep": keep, "steps": count, "rate": rate, "kl": before, "left": left})
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    save(out, {"threads": threads, "smoke": smoke}, results | {model: rows})
    columns = ["kept", "steps", *left]
    show(model, columns, [(r["keep"], r["steps"], *r["left"].values()) for r in rows])


def first_rate(small: nn.Module, dense: nn.Module, judges: list[Batch]) -> float:
    """The default rate before it is halved anywhere."""
    loss = solpath.evaluate(small, dense, judges).metrics["kl"]
    return default_rate(loss, typical_width(small))


def _numbers(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


if __name__ == "__main__":
    typer.run(main)
