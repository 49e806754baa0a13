"""Do figures of an older version still stand? Its runs of quality.py beside today's.

    python benchmarks/quality.py --model opt --methods spp --out build/now.json
    cd OLD && PYTHONPATH=OLD/src python benchmarks/quality.py ... --out build/then.json
    python benchmarks/rounding.py build/then.json build/now.json

A version that rounds otherwise decides otherwise between units of almost the same use. That is
noise where the means over the seeds change by less than the seeds of one version lie apart. Both
files are of one dense model, `--checkpoint`.
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer

from quality_runs import fidelity_of, same_dense, stored_runs, values
from record import RESULTS, save, show


def main(
    then: Annotated[Path, typer.Argument(help="JSON of the older version.")],
    now: Annotated[Path, typer.Argument(help="JSON of today's.")],
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "rounding.json",
) -> None:
    """Compare the runs of one method on one model, and add them to the JSON."""
    both = stored_runs(then), stored_runs(now)
    first = both[1][0]
    model, dense = first["model"], first["dense"]
    for runs in both:
        if len({run["method"] for run in runs}) > 1 or len(runs) != len(both[1]):
            raise SystemExit("give the same seeds of one method.")
        if not all(same_dense(run, dense, fidelity_of(dense)) for run in runs):
            raise SystemExit("the two files are of different dense models.")
    rows = compare(*both)
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    commits = [runs[0]["provenance"]["commit"] for runs in both]
    results[model] = {"method": first["method"], "commits": commits, "sizes": rows}
    save(out, {}, results)
    columns = ["kept", "then", "now", "seeds lie apart"]
    show(model, columns, [shown_row(row) for row in rows])


def compare(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Task and fidelity at every size, of all seeds of both versions."""
    dense = now[0]["dense"]
    return [
        {
            "keep": size["keep"],
            "metric": metric,
            "then": values(then, metric, index),
            "now": values(now, metric, index),
        }
        for metric in dict.fromkeys(["task" if "task" in dense else "cosine", fidelity_of(dense)])
        for index, size in enumerate(now[0]["sizes"])
    ]


def shown_row(row: dict[str, Any]) -> tuple[str, ...]:
    """One size: both means, and the larger range of the seeds."""
    apart = max(max(row[when]) - min(row[when]) for when in ("then", "now"))
    means = (f"{statistics.fmean(row[when]):.4g}" for when in ("then", "now"))
    return f"{row['keep']:.0%}, {row['metric']}", *means, f"{apart:.2g}"


if __name__ == "__main__":
    typer.run(main)
