"""OpenVINO: one graph for any batch size and length, in ``openvino_model.xml`` and ``.bin``.

The graph of a decoder of text keeps its cache within, as OpenVINO's own tools for language models
expect: every call goes on where the last one ended, until ``reset_state``. An encoder-decoder that
generates has two graphs in place of one, ``openvino_encoder.xml`` and ``openvino_decoder.xml``,
each with its own ``.bin``. The decoder takes and gives its cache.
"""

import importlib
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from solpath.exporting.encoder_decoder import checked_halves, trace_halves, translates
from solpath.exporting.formats import Format, Load
from solpath.exporting.openvino_graphs import FILE, FLOAT32, HALVES, RUNTIME, Graph
from solpath.exporting.tracing import check_traceable, trace, write_settings
from solpath.running.forward import Batch

_TOLERANCE = 1e-4


def check(model: nn.Module) -> None:
    """Check that a model can be written; see `check_traceable`."""
    check_traceable(model, "openvino", ("openvino",))


def write(model: nn.Module, folder: Path, batch: Batch, *, tokenizer: Any = None) -> None:
    """Write the graph of a model, or the two of an encoder-decoder, and its configuration.

    Args:
        model: The model, in eval mode, in float32 on the CPU. It is left untouched.
        folder: An empty folder.
        batch: Inputs to trace the model with.
        tokenizer: A tokenizer or processor of transformers, whose files are written too.

    Raises:
        ExportError: The model cannot be traced.
    """
    from transformers.exporters.configs import OpenVINOConfig
    from transformers.exporters.exporter_openvino import OpenVINOExporter

    if translates(model, batch):
        config = partial(OpenVINOConfig, stateful=False)
        parts = trace_halves(OpenVINOExporter, config, model, batch)
        graphs = dict(zip(HALVES, parts, strict=True))
    else:
        graphs = {FILE: trace(OpenVINOExporter, OpenVINOConfig, model, batch)}
    for file, graph in graphs.items():
        OpenVINOExporter.save_program(graph.program, folder / file)
    write_settings(model, folder, tokenizer)


def _loads(model: nn.Module, folder: Path) -> list[Load]:
    if RUNTIME.holds_halves(folder):
        return _loads_of_halves(model, folder)
    graph = Graph(folder / FILE, threads=1)
    code = f"""import openvino

settings = {FLOAT32}
model = openvino.Core().compile_model(f"{{folder}}/{FILE}", "CPU", settings)
outputs = model(inputs)  # arrays by name: {", ".join(graph.inputs)}"""
    found = [Load("OpenVINO", code.replace("'", '"'))]
    if graph.cached:
        found.append(RUNTIME.load("decoder", "OpenVinoDecoder", "input_ids"))
    return found


def _loads_of_halves(model: nn.Module, folder: Path) -> list[Load]:
    halves = RUNTIME.open_halves(folder, threads=1)
    takes = [", ".join(graph.inputs) for graph in (halves.encoder, halves.decoder)]
    code = f"""import openvino

core, settings = openvino.Core(), {FLOAT32}
encoder = core.compile_model(f"{{folder}}/{HALVES[0]}", "CPU", settings)
decoder = core.compile_model(f"{{folder}}/{HALVES[1]}", "CPU", settings)
encoded = encoder(inputs)  # arrays by name: {takes[0]}
outputs = decoder(step)  # {takes[1]}, what was encoded, and the cache"""
    main = halves.encoder.inputs[0]
    generate = RUNTIME.load("seq2seq", RUNTIME.class_of(model), main)
    return [Load("OpenVINO", code.replace("'", '"')), generate]


def _command(model: nn.Module, folder: Path) -> str:
    if RUNTIME.holds_halves(folder):
        return f'solpath.exporting.seq2seq.{RUNTIME.class_of(model)}("{{folder}}").generate(inputs)'
    return (
        f'openvino.Core().compile_model("{{folder}}/{FILE}", "CPU", '
        '{{"INFERENCE_PRECISION_HINT": "f32"}})(inputs)'
    )


def _runtime() -> str:
    return f"OpenVINO {importlib.import_module('openvino').__version__} on a CPU, in float32"


FORMAT = Format(
    name="openvino",
    title="OpenVINO",
    library="openvino",
    loads=_loads,
    check=check,
    write=write,
    open=RUNTIME.runner,
    runtime=_runtime,
    tolerance=_TOLERANCE,
    command=_command,
    batches=checked_halves,
)
