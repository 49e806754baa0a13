"""What `import solpath` and `solpath --help` take, in fresh processes.

    python benchmarks/import_time.py

Commands are interleaved; the first round warms the disk cache and is dropped.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from record import RESULTS, save, show
from solpath.measuring.timing import interquartile_range

HELP = "import sys; sys.argv = ['solpath', '--help']; from solpath.cli.main import run; run()"
COMMANDS = {
    "python": "pass",
    "import torch": "import torch",
    "import solpath": "import solpath",
    "import torch, solpath": "import torch, solpath",
    "every public name": "import torch, solpath; [getattr(solpath, n) for n in solpath.__all__]",
    "solpath --help": HELP,
}


def main(
    repeats: Annotated[int, typer.Option(help="Fresh processes per command, at least 5.")] = 9,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "import_time.json",
) -> None:
    """Medians over fresh processes."""
    if repeats < 5:
        raise SystemExit("repeats must be at least 5: a median of fewer says little.")
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_ in range(repeats + 1):
        for name, code in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            if round_:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    torch_time = medians["import torch"]
    show(
        f"Fresh processes, medians of {repeats}",
        ["command", "seconds", "IQR", "over import torch", "ratio"],
        [
            [name, value, interquartile_range(times[name]), value - torch_time, value / torch_time]
            for name, value in medians.items()
        ],
    )
    save(
        out,
        {"repeats": repeats},
        {
            "median_seconds": medians,
            "iqr_seconds": {name: interquartile_range(values) for name, values in times.items()},
            "import_over_torch": medians["import torch, solpath"] - torch_time,
            "help": medians["solpath --help"],
        },
    )


if __name__ == "__main__":
    typer.run(main)
