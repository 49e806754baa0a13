"""Memory and time of a cut from disk to disk, against plainly copying the same bytes.

    python benchmarks/streaming.py  # shapes of a 1 B model
    python benchmarks/streaming.py --config benchmarks/configs/llama-2-7b.json  # 29 GB of disk
    python benchmarks/streaming.py --digests  # what a digest of numbers takes, over one of bytes

A checkpoint of random bfloat16 weights is written shard by shard, and cut to half of its prunable
parameters by a plan of random scores, in a fresh process that watches its own memory. Before and
after, as many bytes are read and written without looking at them. All of them flush what they
write, and none finds its source in the cache of the system. The checkpoint is deleted at the end.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import solpath
from checkpoints import sample
from record import RESULTS, save, show
from resident import Watch, resident
from solpath.loading import off_loaded
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint, values_digest
from solpath.model.weights import weight_reader
from solpath.planning.path import SolutionPath
from solpath.pretrained import from_pretrained
from solpath.reading import values_as_bytes
from solpath.storing.shards import Stored, write_shards
from workloads import quiet

ONE_BILLION = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
MB = 10**6


def make_checkpoint(config: dict[str, Any], folder: Path) -> int:
    """Write random weights shard by shard; return the bytes of the largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    generator = torch.Generator().manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        block = torch.empty(shape[-1] * 64, dtype=torch.bfloat16).normal_(
            0, 0.02, generator=generator
        )
        rows = block.repeat(-(-shape.numel() // block.numel()))[: shape.numel()]
        return rows.view(shape)

    named = from_pretrained(folder, device="meta").named_parameters()
    tensors = {
        name: Stored(torch.bfloat16, tuple(p.shape), lambda shape=p.shape: draw(shape))
        for name, p in named
    }
    _, index = write_shards(tensors, folder, "5GB")
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return max(tensor.nbytes for tensor in tensors.values())


def make_path(dense: Path, scratch: Path) -> SolutionPath:
    """A path of random scores for a checkpoint, from its names, shapes and digests."""
    model = from_pretrained(dense, device="meta")
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(0)
    score = {p.name: torch.rand(p.heads, p.width, generator=generator).double() for p in pairs}
    identity = fingerprint(model, pairs, read=weight_reader(off_loaded(dense, scratch)))
    costs = count_costs(model, pairs, sample(model))
    return SolutionPath(pairs, score, score, costs, "random", {}, identity)


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop the files of a folder from the cache of the system."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, target: Path, size: int) -> float:
    """Read all weights of a folder and write `size` of their bytes; return the seconds."""
    forget(source)
    start, left = time.perf_counter(), size
    with target.open("wb") as writer:
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb", buffering=0) as reader:
                while block := reader.read(2**22):
                    writer.write(block[:left])
                    left -= min(left, len(block))
        writer.flush()
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def cut(dense: Path, path: Path, sparsity: float, out: Path) -> dict[str, float]:
    """Cut from disk to disk, and watch the memory of this process."""
    quiet()
    plan = SolutionPath.load(path).plan(sparsity=sparsity)
    solpath.find_pairs(dense)  # imports all that the cut needs
    before = {"peak_before": resident("VmHWM"), "anonymous_before": resident("RssAnon")}
    start, processor = time.perf_counter(), time.process_time()
    with Watch() as watch:
        solpath.extract(dense, plan, out=out)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        **before,
        "peak": resident("VmHWM"),
        "anonymous": watch.anonymous,
    }


def digests() -> dict[str, float]:
    """Seconds of processor time of a digest of numbers over that of the plain bytes, by dtype."""
    drawn = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    narrow = {"bfloat16": drawn.bfloat16(), "float16": drawn.half()}
    cases = {"float32": drawn, **narrow}
    cases |= {f"float32 of {name}": values.float() for name, values in narrow.items()}

    def seconds(action: Callable[[], object]) -> float:
        start = time.process_time()
        action()
        return time.process_time() - start

    found = {}
    for name, values in cases.items():
        plain = min(seconds(lambda v=values: hashlib.sha256(values_as_bytes(v))) for _ in range(15))
        found[name] = min(seconds(lambda v=values: values_digest(v)) for _ in range(15)) / plain
    return found


def main(
    config: Annotated[Path | None, typer.Option(help="Configuration; default 1 B shapes.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where there is disk; default /tmp.")] = None,
    sparsity: Annotated[float, typer.Option(help="Of the prunable parameters.")] = 0.5,
    only_digests: Annotated[bool, typer.Option("--digests", help="Time digests only.")] = False,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "streaming.json",
) -> None:
    """Measure a cut from disk to disk."""
    quiet()
    known = json.loads(out.read_text())["results"] if out.exists() else {}
    if only_digests:
        return save(out, {"sparsity": sparsity}, {**known, "digests": digests()})
    name = "llama of 1 B" if config is None else config.stem
    shapes = ONE_BILLION if config is None else json.loads(config.read_text())
    with tempfile.TemporaryDirectory(dir=folder) as parent:
        root = Path(parent)
        dense, path, small = (root / part for part in ("dense", "path", "small"))
        largest = make_checkpoint(shapes, dense)
        (root / "scratch").mkdir()
        make_path(dense, root / "scratch").save(path)
        dense_bytes = bytes_of(dense)
        planned = SolutionPath.load(path).plan(sparsity=sparsity).achieved.bytes
        copies = [copy(dense, root / "copy", planned)]
        forget(dense)
        code = "import streaming, sys, json; from pathlib import Path; a = sys.argv[1:]; "
        code += "print(json.dumps(streaming.cut(Path(a[0]), Path(a[1]), float(a[2]), Path(a[3]))))"
        values = (str(dense), str(path), str(sparsity), str(small))
        here = Path(__file__).resolve().parent
        text = subprocess.run(
            [sys.executable, "-c", code, *values], cwd=here, check=True, capture_output=True
        ).stdout
        found: dict[str, float] = json.loads(text.splitlines()[-1])
        small_bytes = bytes_of(small)
        copies.append(copy(dense, root / "copy", small_bytes))
    found |= {
        "dense_bytes": dense_bytes,
        "small_bytes": small_bytes,
        "largest_tensor_bytes": largest,
        "copy_seconds": statistics.mean(copies),
        "copies": copies,
        "ratio": found["seconds"] / statistics.mean(copies),
    }
    keys = ("dense_bytes", "small_bytes", "largest_tensor_bytes", "peak", "anonymous")
    rows = [[key, found[key] / MB] for key in keys]
    rows += [[key, found[key]] for key in ("seconds", "copy_seconds", "ratio")]
    show(f"{name} (MB, s)", ["", ""], rows)
    return save(out, {"sparsity": sparsity}, {**known, name: found})


if __name__ == "__main__":
    typer.run(main)
