"""ONNX, for onnxruntime and all else that reads it: one graph for any batch size and length.

A folder holds ``onnx/model.onnx``, ``onnx/model_int8.onnx`` if asked for, ``config.json``, and what
sentence-transformers needs if asked for. The graph of a decoder of text takes and gives a cache.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import ExportError
from solpath.exporting.formats import Format, Load, Outputs, Runner
from solpath.exporting.sentences import MODULES, write_sentences
from solpath.exporting.tracing import check_traceable, checked_batches, completed, quiet, trace
from solpath.running.forward import Batch

FILE = "onnx/model.onnx"
INT8 = "onnx/model_int8.onnx"

_TOLERANCE = 1e-4
_INT8_TOLERANCE = 0.25
_ONE_FILE = 1 << 30  # bytes of weights that lie in the file of the graph; protobuf ends at 2 GiB
_CACHE = "cache."


def check(model: nn.Module) -> None:
    """Check that a model can be written; see `check_traceable`."""
    check_traceable(model, "onnx", ("onnx", "onnxscript", "onnxruntime"))


def write(
    model: nn.Module,
    folder: Path,
    batch: Batch,
    *,
    int8: bool = False,
    tokenizer: Any = None,
    pooling: str | None = None,
    normalize: bool = True,
) -> None:
    """Write the graph of a model and its configuration.

    Args:
        model: The model, in eval mode, in float32 on the CPU. It is left untouched.
        folder: An empty folder.
        batch: Inputs to trace the model with.
        int8: Whether to write a graph with weights in int8 too, whose activations are quantised
            while it runs. Weights take 7 bits of the 8, which no CPU overflows on.
        tokenizer: A tokenizer or processor of transformers, whose files are written too.
        pooling: ``"mean"`` or ``"cls"`` writes the files that sentence-transformers reads, for a
            model whose first output is ``last_hidden_state``.
        normalize: Whether these sentence embeddings have length 1.

    Raises:
        ExportError: The model cannot be traced, or has no ``last_hidden_state`` to pool.
    """
    from transformers.exporters.configs import ExportFormat, OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    exported = trace(OnnxExporter, OnnxConfig, model, batch)
    (folder / FILE).parent.mkdir()
    _save(exported.program, folder / FILE)
    if int8:
        from transformers.exporters.quantizers.quantizer_onnxruntime import (
            OnnxRuntimeDynamicConfig,
            OnnxRuntimeQuantizer,
        )

        settings = OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True)
        with quiet():
            quantizer = OnnxRuntimeQuantizer(settings)
            program = quantizer.quantize(exported.program, {}, ExportFormat.ONNX)
        _save(program, folder / INT8)
    exported.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if pooling is not None:
        if "last_hidden_state" not in {output.name for output in exported.program.graph.outputs}:
            raise ExportError(
                f"{type(model).__name__} gives no last_hidden_state, which pooling needs; export "
                "the model without its head."
            )
        write_sentences(folder, exported.config, pooling, normalize)


def _save(program: Any, path: Path) -> None:
    import onnx_ir

    weights = (value.const_value for value in program.graph.initializers.values())
    size = sum(weight.nbytes for weight in weights if weight is not None)
    onnx_ir.save(
        program, str(path), external_data=f"{path.name}.data" if size > _ONE_FILE else None
    )


class Graph:
    """A graph that onnxruntime runs on the CPU.

    Attributes:
        inputs: Names of its inputs, without those of the cache.
        cached: Whether it takes and gives a cache of keys and values.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a graph.

        Args:
            path: Its file.
            threads: Threads that it runs on; 0 lets onnxruntime choose.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        shapes = {one.name: one.shape for one in self._session.get_inputs()}
        self._past = {name: shape for name, shape in shapes.items() if _CACHE in name}
        self._names = [output.name for output in self._session.get_outputs()]
        self.inputs = [name for name in shapes if name not in self._past]
        self.cached = bool(self._past)

    def __call__(
        self, batch: Batch, past: Mapping[str, Tensor] | None = None
    ) -> tuple[Outputs, dict[str, Tensor]]:
        """Run the graph.

        Args:
            batch: Its inputs; those that it does not take are left out.
            past: The cache of all tokens before, as an earlier call gave it, or None.

        Returns:
            The outputs by name, and the cache with the tokens of this call.
        """
        feed = {name: value for name, value in batch.items() if name in self.inputs}
        size = len(next(iter(feed.values())))
        for name, shape in self._past.items():
            feed[name] = past[_leaf(name)] if past else torch.zeros(_empty(shape, size))
        arrays = {name: value.detach().numpy() for name, value in feed.items()}
        found = zip(self._names, self._session.run(self._names, arrays), strict=True)
        tensors = {name: torch.from_numpy(value) for name, value in found}
        cache = {_leaf(name): value for name, value in tensors.items() if _CACHE in name}
        return {name: value for name, value in tensors.items() if "." not in name}, cache


def _leaf(name: str) -> str:
    return name[name.index(_CACHE) :]


def _empty(shape: list[Any], size: int) -> list[int]:
    """Return the shape of a cache without tokens: what has no number is the batch or the tokens."""
    fixed = [int(axis) if str(axis).isdigit() else 0 for axis in shape]
    return [size, *fixed[1:]]


def runner(path: Path) -> Runner:
    """Return what runs a graph; a decoder runs in two steps, the second of which uses the cache."""
    graph = Graph(path)

    def run(batch: Batch) -> Outputs:
        full = completed(graph.inputs, batch)
        if not graph.cached:
            return graph(full)[0]
        return in_two_steps(graph, full)

    return run


def in_two_steps(graph: Any, full: Batch) -> Outputs:
    """Run a graph with a cache on the first half of a text, then on the rest.

    Args:
        graph: See `Graph`.
        full: Its inputs: ids, mask and positions, ``[batch, tokens]``.

    Returns:
        The outputs of all tokens.
    """
    half = full["input_ids"].shape[1] // 2
    first = {name: value[:, :half] for name, value in full.items()}
    rest = {name: v if name == "attention_mask" else v[:, half:] for name, v in full.items()}
    before, cache = graph(first)
    after, _ = graph(rest, cache)
    return {name: torch.cat([before[name], after[name]], 1) for name in before}


def _loads(model: nn.Module, folder: Path) -> list[Load]:
    graph = Graph(folder / FILE, threads=1)
    takes = ", ".join(graph.inputs) + (", and the cache" if graph.cached else "")
    code = f"""import onnxruntime

session = onnxruntime.InferenceSession(f"{{folder}}/{FILE}")
outputs = session.run(None, inputs)  # arrays by name: {takes}"""
    found = [Load("onnxruntime", code)]
    if graph.cached:
        code = """from solpath.exporting.decoder import OnnxDecoder

tokens = OnnxDecoder(folder).generate(input_ids, max_new_tokens=16)"""
        found.append(Load("onnxruntime, by transformers' generate", code))
    if (folder / MODULES).exists():
        code = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer(str(folder), backend="onnx")"""
        found.append(Load("sentence-transformers, with optimum-onnx and transformers < 4.58", code))
    return found


def _open(folder: Path) -> Runner:
    return runner(folder / FILE)


def _variants(folder: Path) -> dict[str, tuple[Runner, float]]:
    path = folder / INT8
    return {"int8": (runner(path), _INT8_TOLERANCE)} if path.exists() else {}


def _runtime() -> str:
    return f"onnxruntime {importlib.import_module('onnxruntime').__version__} on a CPU"


FORMAT = Format(
    name="onnx",
    title="onnxruntime and all else that reads ONNX",
    library="onnx",
    loads=_loads,
    check=check,
    write=write,
    open=_open,
    runtime=_runtime,
    tolerance=_TOLERANCE,
    command=f'onnxruntime.InferenceSession("{{folder}}/{FILE}").run(None, inputs)',
    batches=checked_batches,
    variants=_variants,
    quantised=True,
)
