"""Run graphs of OpenVINO on the CPU, in float32."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solpath.errors import ConfigError
from solpath.exporting import graphs
from solpath.exporting.formats import Outputs
from solpath.running.forward import Batch

FILE = "openvino_model.xml"
HALVES = ("openvino_encoder.xml", "openvino_decoder.xml")

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Settings without which CPUs that can would round to bfloat16."""

_BEAMS = "beam_idx"


class Graph(graphs.Graph):
    """A graph that OpenVINO runs on the CPU in float32.

    Attributes:
        keeps: Whether it keeps its cache within, from one call to the next.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a graph.

        Args:
            path: Its file.
            threads: Threads that it runs on; 0 lets OpenVINO choose.

        Raises:
            ConfigError: There is no such file.
        """
        import openvino

        if not path.exists():
            raise ConfigError(f"{path.parent} holds no {path.name}.")
        settings = FLOAT32 | {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = compiled.create_infer_request()
        shapes = {one.get_any_name(): one.get_partial_shape() for one in compiled.inputs}
        super().__init__(
            {
                name: [axis.get_length() if axis.is_static else None for axis in shape]
                for name, shape in shapes.items()
            }
        )
        self.keeps = _BEAMS in shapes
        self.cached = self.cached or self.keeps

    def __call__(
        self,
        batch: Batch,
        past: Mapping[str, Tensor] | None = None,
        order: Tensor | None = None,
    ) -> tuple[Outputs, dict[str, Tensor]]:
        """Run the graph.

        Args:
            batch: Its inputs; those that it does not take are left out.
            past: The cache of all tokens before, as an earlier call gave it. For a graph that keeps
                its own, None starts anew and anything else goes on where the last call ended.
            order: Which sample of the last call each one goes on from, ``[batch]``, for a graph
                that keeps its cache. None lets each go on from itself.

        Returns:
            The outputs by name, and the cache with the tokens of this call, which is empty if the
            graph keeps it.
        """
        if not self.keeps:
            return super().__call__(batch, past)
        if past is None:
            self._request.reset_state()
        order = torch.arange(len(next(iter(batch.values())))) if order is None else order
        return super().__call__({**batch, _BEAMS: order.int()})

    def _run(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        found = self._request.infer(dict(arrays)).to_dict()
        return {port.get_any_name(): value.copy() for port, value in found.items()}


RUNTIME = graphs.Runtime("openvino", "OpenVINO", "OpenVino", Graph, FILE, HALVES)
