"""ONNX, for onnxruntime and all else that reads it: one graph for any batch size and length.

A folder holds ``onnx/model.onnx``, ``onnx/model_int8.onnx`` if asked for, ``config.json``, and what
sentence-transformers needs if asked for. The graph of a decoder of text takes and gives a cache. An
encoder-decoder that generates has two graphs in place of one, ``onnx/encoder.onnx`` and
``onnx/decoder.onnx``, whose weights lie in ``onnx/weights.data``.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from solpath.errors import ExportError
from solpath.exporting.encoder_decoder import checked_halves, trace_halves, translates
from solpath.exporting.formats import Format, Load, Runner
from solpath.exporting.graphs import named
from solpath.exporting.onnx_graphs import FILE, HALVES, INT8, RUNTIME, Graph
from solpath.exporting.sentences import MODULES, write_sentences
from solpath.exporting.tracing import check_traceable, quiet, trace, write_settings
from solpath.running.forward import Batch

WEIGHTS = "onnx/weights.data"

_TOLERANCE = 1e-4
_INT8_TOLERANCE = 0.25
_ONE_FILE = 1 << 30  # bytes of weights that lie in the file of the graph; protobuf ends at 2 GiB
_SMALL = 256  # bytes of a constant that stays in the file of the graph


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

    if translates(model, batch):
        parts = trace_halves(OnnxExporter, OnnxConfig, model, batch)
        graphs = {file: part.program for file, part in zip(HALVES, parts, strict=True)}
    else:
        graphs = {FILE: trace(OnnxExporter, OnnxConfig, model, batch).program}
    (folder / FILE).parent.mkdir()
    _save(graphs, folder)
    if int8:
        from transformers.exporters.quantizers.quantizer_onnxruntime import (
            OnnxRuntimeDynamicConfig,
            OnnxRuntimeQuantizer,
        )

        settings = OnnxRuntimeDynamicConfig(per_channel=True, reduce_range=True)
        with quiet():
            quantizer = OnnxRuntimeQuantizer(settings)
            small = {
                file: quantizer.quantize(program, {}, ExportFormat.ONNX)
                for file, program in graphs.items()
            }
        _save(small, folder, INT8)
    write_settings(model, folder, tokenizer)
    if pooling is not None:
        given = {output.name for program in graphs.values() for output in program.graph.outputs}
        if "last_hidden_state" not in given:
            raise ExportError(
                f"{type(model).__name__} gives no last_hidden_state, which pooling needs; export "
                "the model without its head."
            )
        write_sentences(folder, model, pooling, normalize)


def _save(graphs: Mapping[str, Any], folder: Path, ending: str = "") -> None:
    """Write graphs: one with its weights, or beside it if they are large; two with one file."""
    import onnx_ir

    values = [v for graph in graphs.values() for v in graph.graph.initializers.values()]
    values = [v for v in values if v.const_value is not None and v.const_value.nbytes >= _SMALL]
    if len(graphs) == 1:
        path = folder / named(FILE, ending)
        size = sum(value.const_value.nbytes for value in values)
        beside = f"{path.name}.data" if size > _ONE_FILE else None
        onnx_ir.save(graphs[FILE], str(path), external_data=beside)
        return
    held = [value.const_value for value in values]
    try:
        _share(values, folder / named(WEIGHTS, ending))
        for file, program in graphs.items():
            onnx_ir.save(program, str(folder / named(file, ending)))
    finally:
        for value, weight in zip(values, held, strict=True):
            value.const_value = weight


def _share(values: list[Any], path: Path) -> None:
    """Write weights into a file, equal ones once, and let graphs point there."""
    import onnx_ir

    keys: list[Any] = []
    once: dict[Any, Any] = {}
    for value in values:
        weight = value.const_value
        digest = hashlib.sha256(weight.tobytes()).digest()
        keys.append((weight.dtype, tuple(weight.shape.numpy()), digest))
        once.setdefault(keys[-1], weight)
    written = onnx_ir.external_data.convert_tensors_to_external(
        list(once.values()), path.parent, path.name
    )
    places = dict(zip(once, written, strict=True))
    for value, key in zip(values, keys, strict=True):
        place = places[key]
        value.const_value = onnx_ir.ExternalTensor(
            place.location,
            place.offset,
            place.length,
            place.dtype,
            shape=place.shape,
            name=value.name,
            base_dir=path.parent,
        )


def _loads(model: nn.Module, folder: Path) -> list[Load]:
    if RUNTIME.holds_halves(folder):
        return _loads_of_halves(model, folder)
    graph = Graph(folder / FILE, threads=1)
    takes = ", ".join(graph.inputs) + (", and the cache" if graph.cached else "")
    code = f"""import onnxruntime

session = onnxruntime.InferenceSession(f"{{folder}}/{FILE}")
outputs = session.run(None, inputs)  # arrays by name: {takes}"""
    found = [Load("onnxruntime", code)]
    if graph.cached:
        found.append(RUNTIME.load("decoder", "OnnxDecoder", "input_ids"))
    if (folder / MODULES).exists():
        code = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer(str(folder), backend="onnx")"""
        found.append(Load("sentence-transformers, with optimum-onnx and transformers < 4.58", code))
    return found


def _loads_of_halves(model: nn.Module, folder: Path) -> list[Load]:
    halves = RUNTIME.open_halves(folder, threads=1)
    takes = [", ".join(graph.inputs) for graph in (halves.encoder, halves.decoder)]
    code = f"""import onnxruntime

encoder = onnxruntime.InferenceSession(f"{{folder}}/{HALVES[0]}")
decoder = onnxruntime.InferenceSession(f"{{folder}}/{HALVES[1]}")
encoded = encoder.run(None, inputs)  # arrays by name: {takes[0]}
outputs = decoder.run(None, step)  # {takes[1]}, what was encoded, and the cache"""
    main = halves.encoder.inputs[0]
    return [Load("onnxruntime", code), RUNTIME.load("seq2seq", RUNTIME.class_of(model), main)]


def _command(model: nn.Module, folder: Path) -> str:
    if RUNTIME.holds_halves(folder):
        return f'solpath.exporting.seq2seq.{RUNTIME.class_of(model)}("{{folder}}").generate(inputs)'
    return f'onnxruntime.InferenceSession("{{folder}}/{FILE}").run(None, inputs)'


def _variants(folder: Path) -> dict[str, tuple[Runner, float]]:
    first = HALVES[0] if RUNTIME.holds_halves(folder) else FILE
    there = (folder / named(first, INT8)).exists()
    return {"int8": (RUNTIME.runner(folder, INT8), _INT8_TOLERANCE)} if there else {}


def _runtime() -> str:
    return f"onnxruntime {importlib.import_module('onnxruntime').__version__} on a CPU"


FORMAT = Format(
    name="onnx",
    title="onnxruntime and all else that reads ONNX",
    library="onnx",
    loads=_loads,
    check=check,
    write=write,
    open=RUNTIME.runner,
    runtime=_runtime,
    tolerance=_TOLERANCE,
    command=_command,
    batches=checked_halves,
    variants=_variants,
    quantised=True,
)
