"""What real checkpoints give in every format: parity on real inputs, sizes, and what is refused.

    python examples/zoo/train.py vit       # and llama, t5; what is not there is random, and says so
    python benchmarks/real_exports.py --gemma models/gemma-3-270m-q4_k_m.gguf
    python benchmarks/real_exports.py --only "Whisper tiny"   # adds to the file

Members keep 60 % of what can be pruned, in the order of magnitudes: parity does not depend on the
order. Inputs are held-out texts (padded, where the model takes padding), images of digits, captions
of them, and mixtures of tones. Sizes are those of all files, beside the float32 weights of the
dense model. Without ``--gemma`` that model is left out.
"""

import gc
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import gemma as gemma3
import passages
import solpath
from record import RESULTS, save, show
from solpath import baselines
from solpath.errors import SolpathError
from solpath.exporting.export import FORMATS, export
from solpath.running.provenance import peak_resident_bytes
from workloads import Batch, installed_minilm, quiet, workload

KEEP = 0.6
TARGETS = {name: "vllm" if name == "hub" else name for name in FORMATS}
SAMPLES = 4


@dataclass(frozen=True)
class Case:
    """A model, real inputs, and where its weights are from."""

    model: nn.Module
    batch: Batch
    weights: str


def minilm(_: Path | None) -> Case:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(installed_minilm()).eval()  # with its pooler, as it is saved
    return Case(model, workload("minilm", heldout=SAMPLES).heldout[0], "pretrained")


def gemma(file: Path | None) -> Case:
    assert file is not None
    decoder = gemma3.load(file)
    text = passages.split("code").heldout[:SAMPLES]
    windows = passages.windows(text, decoder.encode, decoder.start, 32)[:2]
    return Case(decoder.model, {"input_ids": windows}, "pretrained, 4 bits a weight")


def zoo(name: str) -> Callable[[Path | None], Case]:
    """A model of examples/zoo: trained if it is there, else of its seed and untrained."""

    def case(_: Path | None) -> Case:
        from train import MODELS, ZOO, load

        trained = (MODELS / name / "train.json").is_file()
        recipe = ZOO[name]
        torch.manual_seed(0)
        model = load(name, MODELS / name) if trained else recipe.model(recipe.config).eval()
        return Case(model, INPUTS[name](), "trained" if trained else "random")

    return case


def digits_batch() -> Batch:
    import digits

    return {"pixel_values": digits.load_split()[2][:SAMPLES]}


def captions_batch() -> Batch:
    import captions
    import digits

    _, _, pixels, labels = digits.load_split()
    texts = captions.describe(labels[:SAMPLES], torch.Generator().manual_seed(0))
    return {**texts, "pixel_values": pixels[:SAMPLES]}


def bytes_batch() -> Batch:
    import stdlib_bytes

    return {"input_ids": stdlib_bytes.sequences("test", SAMPLES, 64)}


def denoising_batch() -> Batch:
    import denoising

    batch, _ = denoising.examples("test", SAMPLES)
    return batch


INPUTS: dict[str, Callable[[], Batch]] = {
    "vit": digits_batch,
    "clip": captions_batch,
    "llama": bytes_batch,
    "t5": denoising_batch,
}


def whisper(_: Path | None) -> Case:
    """The sizes of openai/whisper-tiny, with random weights: they are not to be had offline."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(encoder_layers=4, decoder_layers=4, d_model=384, vocab_size=51865)
    config.encoder_attention_heads = config.decoder_attention_heads = 6
    config.encoder_ffn_dim = config.decoder_ffn_dim = 1536
    time = torch.arange(3 * 16000) / 16000
    tones = [
        sum(torch.sin(2 * math.pi * pitch * (i + 1) * time) / (i + 1) for i in range(3))
        for pitch in (220.0, 330.0)
    ]
    extract = WhisperFeatureExtractor()
    sounds = extract([tone.numpy() for tone in tones], sampling_rate=16000, return_tensors="pt")
    start = torch.tensor([[50258, 50259, 50359, 50363]]).expand(2, -1).contiguous()
    batch = {"input_features": sounds.input_features, "decoder_input_ids": start}
    return Case(WhisperForConditionalGeneration(config).eval(), batch, "random")


CASES: dict[str, Callable[[Path | None], Case]] = {
    "all-MiniLM-L6-v2": minilm,
    "Gemma 3 270M": gemma,
    "LLaMA on bytes": zoo("llama"),
    "T5 on bytes": zoo("t5"),
    "ViT on digits": zoo("vit"),
    "CLIP on digits": zoo("clip"),
    "Whisper tiny": whisper,
}


def main(
    only: Annotated[str, typer.Option(help="Models, comma-separated.")] = ",".join(CASES),
    formats: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(FORMATS),
    gemma: Annotated[Path | None, typer.Option(help="GGUF file of Gemma 3 270M.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Annotated[Path, typer.Option(help="JSON to add to.")] = RESULTS / "real_exports.json",
) -> None:
    """Export every model in every format, and add what came out to the results."""
    quiet()
    torch.set_num_threads(threads)
    results: dict[str, Any] = json.loads(out.read_text())["results"] if out.exists() else {}
    for name in only.split(","):
        if CASES[name] is CASES["Gemma 3 270M"] and gemma is None:
            continue
        case = CASES[name](gemma)
        path = baselines.magnitude(case.model, [case.batch])
        row = results.setdefault(name, {"formats": {}})
        row |= {"weights": case.weights, "class": type(case.model).__name__}
        row["dense_bytes"] = sum(p.numel() * p.element_size() for p in case.model.parameters())
        row["inputs"] = {key: list(value.shape) for key, value in case.batch.items()}
        for format in formats.split(","):
            row["formats"][format] = found = exported(case, path, format)
            print(name, format, found.get("refused") or f"{found['difference']:.1e}", flush=True)
            gc.collect()
        row["peak_bytes"] = peak_resident_bytes()
        settings = {"keep": KEEP, "order": path.method, "runtimes": {}}
        settings["runtimes"] = {name: made.runtime() for name, made in FORMATS.items()}
        save(out, settings, {name: results[name] for name in CASES if name in results})
        del case, path
        gc.collect()
    show("largest difference, and MB", ["", *FORMATS], [
        [name, *(cell(row["formats"].get(format)) for format in FORMATS)]
        for name, row in results.items()
    ])  # fmt: skip


def exported(case: Case, path: Any, format: str) -> dict[str, Any]:
    """What came out of one format: differences and sizes, or why it is refused."""
    batch = case.batch
    if format == "gguf":  # which takes texts of one length, without a mask
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    try:
        plan = path.plan(sparsity=1 - KEEP, for_=TARGETS[format])
    except SolpathError as error:
        if format != "hub":
            return {"refused": str(error)}
        plan = path.plan(sparsity=1 - KEEP)  # transformers alone loads what vLLM does not
    try:
        with tempfile.TemporaryDirectory() as home:
            small = solpath.extract(case.model, plan)
            made = export(small, Path(home) / "out", format, batch=batch)
    except SolpathError as error:
        return {"refused": str(error)}
    return {
        "difference": max(row.difference for row in made.parity),
        "given": max(row.difference for row in made.parity if row.inputs == "given"),
        "tolerance": made.parity[0].tolerance,
        "runs": len({row.inputs for row in made.parity}),
        "bytes": made.bytes,
        "params_share": plan.achieved.params_share,
    }


def cell(found: dict[str, Any] | None) -> str:
    if found is None or "refused" in found:
        return "" if found is None else "refused"
    return f"{found['difference']:.0e}, {found['bytes'] / 1e6:.1f}"


if __name__ == "__main__":
    typer.run(main)
