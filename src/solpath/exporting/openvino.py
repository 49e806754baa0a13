"""OpenVINO: one graph for any batch size and length, in ``openvino_model.xml`` and ``.bin``.

The graph of a decoder of text keeps its cache within, as OpenVINO's own tools for language models
expect: every call goes on where the last one ended, until ``reset_state``.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.exporting.formats import Format, Load, Outputs, Runner
from solpath.exporting.onnx_graphs import in_steps
from solpath.exporting.tracing import (
    check_traceable,
    checked_batches,
    completed,
    trace,
    write_settings,
)
from solpath.running.forward import Batch

FILE = "openvino_model.xml"

_TOLERANCE = 1e-4
_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # CPUs that can would round to bfloat16
_BEAMS = "beam_idx"


def check(model: nn.Module) -> None:
    """Check that a model can be written; see `check_traceable`."""
    check_traceable(model, "openvino", ("openvino",))


def write(model: nn.Module, folder: Path, batch: Batch, *, tokenizer: Any = None) -> None:
    """Write the graph of a model and its configuration.

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

    exported = trace(OpenVINOExporter, OpenVINOConfig, model, batch)
    OpenVINOExporter.save_program(exported.program, folder / FILE)
    write_settings(model, folder, tokenizer)


class Graph:
    """A graph that OpenVINO runs on the CPU in float32.

    Attributes:
        inputs: Names of its inputs.
        cached: Whether it keeps a cache of keys and values.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a graph.

        Args:
            path: Its file.
            threads: Threads that it runs on; 0 lets OpenVINO choose.
        """
        import openvino

        settings = _FLOAT32 | {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = compiled.create_infer_request()
        self.inputs = [one.get_any_name() for one in compiled.inputs]
        self.cached = _BEAMS in self.inputs

    def __call__(
        self,
        batch: Batch,
        past: Mapping[str, Tensor] | None = None,
        order: Tensor | None = None,
    ) -> tuple[Outputs, dict[str, Tensor] | None]:
        """Run the graph.

        Args:
            batch: Its inputs; those that it does not take are left out.
            past: None starts anew; anything else goes on where the last call ended.
            order: Which sample of the last call each one goes on from, ``[batch]``. None lets each
                go on from itself.

        Returns:
            The outputs by name, and what `past` is to go on.
        """
        if self.cached and past is None:
            self._request.reset_state()
        feed = {n: v.detach().numpy() for n, v in batch.items() if n in self.inputs}
        if self.cached:
            order = torch.arange(len(next(iter(feed.values())))) if order is None else order
            feed[_BEAMS] = order.int().numpy()
        found = self._request.infer(feed).to_dict()
        tensors = {port.get_any_name(): torch.from_numpy(v.copy()) for port, v in found.items()}
        return {name: value for name, value in tensors.items() if "." not in name}, {}


def _loads(model: nn.Module, folder: Path) -> list[Load]:
    takes = ", ".join(Graph(folder / FILE, threads=1).inputs)
    code = f"""import openvino

settings = {_FLOAT32}
model = openvino.Core().compile_model(f"{{folder}}/{FILE}", "CPU", settings)
outputs = model(inputs)  # arrays by name: {takes}"""
    return [Load("OpenVINO", code.replace("'", '"'))]


def _open(folder: Path) -> Runner:
    graph = Graph(folder / FILE)

    def run(batch: Batch) -> Outputs:
        full = completed(graph.inputs, batch)
        return in_steps(graph, full) if graph.cached else graph(full)[0]

    return run


def _runtime() -> str:
    return f"OpenVINO {importlib.import_module('openvino').__version__} on a CPU, in float32"


FORMAT = Format(
    name="openvino",
    title="OpenVINO",
    library="openvino",
    loads=_loads,
    check=check,
    write=write,
    open=_open,
    runtime=_runtime,
    tolerance=_TOLERANCE,
    command=f'openvino.Core().compile_model("{{folder}}/{FILE}", "CPU", '
    '{{"INFERENCE_PRECISION_HINT": "f32"}})(inputs)',
    batches=checked_batches,
)
