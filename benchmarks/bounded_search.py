"""A search in bounded memory: what it takes, what it said that it would, and the floor of a step.

    python benchmarks/bounded_search.py                      # shapes of a 1.2 B model under 4 GB
    python benchmarks/bounded_search.py --case streamed      # of a 7 B model on disk; 14 GB of disk
    python benchmarks/bounded_search.py --case gemma --checkpoint FILE.gguf --before OLD/src

- "limited" searches a LLaMA of 1.2 B random bfloat16 weights, without and with compensation in
  view, in a process that is killed beyond 4 GB of resident memory (a control group, which takes the
  rights of root; else RLIMIT_DATA limits what it allocates). One matrix of moments takes .5 GB.
- "streamed" searches one of 7 B whose weights stay on disk, two steps of 1 x 128 tokens.
- "gemma" times the steps of the default search on Gemma 3 270M (see gemma.py), each just after its
  floor: a forward pass of the frozen model, and one backward to the output of its embeddings, with
  the same objective, head included. "known" repeats a few batches, whose dense targets are
  remembered; "new" brings another batch every step, and its floor computes the target too.
  ``--before`` runs the same steps with the code of another version, for time and memory. Weights
  are read from a folder; "loading" is the GGUF file itself, as transformers reads it.

Every case is a fresh process. Memory is its peak resident size, and the part of it that is not
backed by files; a second process that only imports tells what the program itself takes. Linux only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gemma import load
from record import RESULTS, save, show
from resident import Watch, limited, resident

LIMIT = 4 * 10**9
CASES = ("limited", "streamed", "gemma")
TOKENS = {"limited": (4, 128), "streamed": (1, 128), "gemma": (4, 128)}
KNOWN = 3  # batches that come again


def main(
    case: Annotated[str, typer.Option(help=f"{', '.join(CASES)}.")] = "limited",
    checkpoint: Annotated[Path | None, typer.Option(help="GGUF file of Gemma 3 270M.")] = None,
    before: Annotated[Path | None, typer.Option(help="Source of another version.")] = None,
    steps: Annotated[int, typer.Option(help="Search steps.")] = 2,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "bounded_search.json",
    worker: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Run one case and add it to the results."""
    torch.set_num_threads(threads)
    if worker:
        return print(json.dumps(_work(worker, checkpoint, steps)))
    if case not in CASES:
        raise SystemExit(f"unknown case {case!r}; choose from {', '.join(CASES)}.")
    run = _runner(threads, steps)
    found = {"imports": run("imports", None)}
    if case == "gemma":
        if checkpoint is None:
            raise SystemExit("give the GGUF file with --checkpoint; see benchmarks/gemma.py.")
        found["loading"] = run("loading", checkpoint)
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            load(checkpoint).model.save_pretrained(scratch)
            folder = Path(scratch)
            found |= {name: run(name, folder) for name in ("known", "new", "search")}
            if before is not None:
                found["search before"] = run("search", folder, before)
    else:
        from streaming import forget

        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            dense = _make(case, Path(scratch))
            kinds = ("search", "compensated") if case == "limited" else ("streamed",)
            for kind in kinds:
                found[f"{case} {kind}"] = run(f"{case} {kind}", dense)
                forget(dense)
    known = json.loads(out.read_text())["results"] if out.exists() else {}
    rows = [
        [
            name,
            *(f"{row.get(key, 0) / 1e6:,.0f} MB" for key in ("peak", "anonymous", "estimate")),
            f"{row.get('seconds', 0):.1f} s",
            row.get("ratio", ""),
        ]
        for name, row in found.items()
    ]
    show(case, ["", "peak", "not of files", "estimated", "time", "step / floor"], rows)
    found["settings"] = {"steps": steps, "threads": threads, "tokens": TOKENS[case]}
    save(out, {"limit": LIMIT}, known | {case: found})


def _runner(threads: int, steps: int) -> Callable[..., dict[str, Any]]:
    def run(worker: str, source: Path | None, code: Path | None = None) -> dict[str, Any]:
        command = [sys.executable, __file__, f"--worker={worker}", f"--threads={threads}"]
        command += [f"--steps={steps}"] + ([f"--checkpoint={source}"] if source else [])
        environment = os.environ | ({"PYTHONPATH": str(code)} if code else {})
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{worker}: the process ended with {done.returncode}.")
        return json.loads(done.stdout.splitlines()[-1])

    return run


def _make(case: str, scratch: Path) -> Path:
    """Write a checkpoint of random weights that is not in the cache of the system."""
    from streaming import ONE_BILLION, forget, make_checkpoint

    seven = Path(__file__).parent / "configs" / "llama-2-7b.json"
    config = ONE_BILLION if case == "limited" else json.loads(seven.read_text())
    make_checkpoint(config, scratch / "dense")
    forget(scratch / "dense")  # so that it counts as memory of whoever reads it
    return scratch / "dense"


def _work(worker: str, source: Path | None, steps: int) -> dict[str, Any]:
    """What a fresh process does."""
    import solpath  # noqa: F401
    from workloads import quiet

    quiet()
    with Watch() as watch:
        if worker == "imports":
            result: dict[str, Any] = {}
        elif worker == "loading":
            load(source)
            result = {}
        elif worker.startswith("limited"):
            with limited(LIMIT) as limit:
                found = _bounded(source, steps, "limited", compensated="compensated" in worker)
            result = found | {"limit": limit}
        elif worker.startswith("streamed"):
            result = _bounded(source, steps, "streamed", compensated=False)
        elif worker == "search":
            result = _whole_search(source, steps)
        else:
            result = _over_floor(source, steps, fresh=worker == "new")
    return result | {"peak": resident("VmHWM"), "anonymous": watch.anonymous}


def _batches(model: Any, size: tuple[int, int], count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return [
        {"input_ids": torch.randint(vocabulary, size, generator=generator)} for _ in range(count)
    ]


def _bounded(source: Any, steps: int, case: str, *, compensated: bool) -> dict[str, Any]:
    """A search of random weights, and what it said before."""
    from transformers import AutoModelForCausalLM

    import solpath
    from solpath.pretrained import from_pretrained
    from solpath.searching.engine import open_engine

    if case == "streamed":
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": "disk"}).eval()
    else:
        model = from_pretrained(source)
    batches = _batches(model, TOKENS[case], 2)
    looks = (1, 1) if compensated else (0, 0)
    with open_engine(model, batches, loss=None, seed=0) as engine:
        said = engine.estimate(steps + 1, steps, looks)
    config = solpath.SearchConfig(steps=steps, scale_batches=1, compensated=compensated)
    start = time.perf_counter()
    solpath.search(model, batches, config, progress=False)
    return {
        "seconds": time.perf_counter() - start,
        "estimated_seconds": said.seconds,
        "estimate": said.memory,
        "recompute": said.recompute,
    }


def _gemma(source: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def _whole_search(source: Any, steps: int) -> dict[str, Any]:
    import solpath

    model = _gemma(source)
    batches = _batches(model, TOKENS["gemma"], steps)
    config = solpath.SearchConfig(steps=steps, scale_batches=max(1, steps // 6))
    start, cpu = time.perf_counter(), time.process_time()
    solpath.search(model, batches, config, progress=False)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "weights": weights}


class _Watched(Sequence[Any]):
    """Batches that call `watch` whenever the search moves on to another one."""

    def __init__(self, batches: Sequence[Any], watch: Callable[[int], None]) -> None:
        self.batches, self.watch, self.last = batches, watch, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        if index != self.last:
            self.last = index
            self.watch(index)
        return self.batches[index]


def _over_floor(source: Any, steps: int, *, fresh: bool) -> dict[str, Any]:
    """Steps of the search over their floor, which runs before each."""
    import solpath
    from gpu import Floor
    from solpath.running.modes import differentiating

    model = _gemma(source)
    warm = 2 if fresh else KNOWN + 1
    batches = _batches(model, TOKENS["gemma"], steps + warm + 1 if fresh else KNOWN)
    floors = [Floor(model, batch) for batch in batches[: 1 if fresh else KNOWN]]
    steps_s: list[float] = []
    floors_s: list[float] = []
    begun = 0.0

    def watch(index: int) -> None:
        nonlocal begun
        now = time.perf_counter()
        if begun:
            steps_s.append(now - begun)
        start = time.perf_counter()
        with differentiating(model):
            if fresh:
                floors[0].batch = batches[index]
                floors[0].target = floors[0].objective.target(batches[index])
            floors[0 if fresh else index]()
        floors_s.append(time.perf_counter() - start)
        begun = time.perf_counter()

    config = solpath.SearchConfig(steps=steps + warm, scale_batches=1)
    solpath.search(model, _Watched(batches, watch), config, progress=False)
    couples = list(zip(steps_s, floors_s, strict=False))[warm:]
    return {
        "seconds": statistics.median(step for step, _ in couples),
        "floor_seconds": statistics.median(floor for _, floor in couples),
        "ratio": statistics.median(step / floor for step, floor in couples),
        "timed": len(couples),
    }


if __name__ == "__main__":
    typer.run(main)
