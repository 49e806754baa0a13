"""Run graphs in ONNX with onnxruntime on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solpath.errors import ConfigError
from solpath.exporting import graphs

FILE = "onnx/model.onnx"
HALVES = ("onnx/encoder.onnx", "onnx/decoder.onnx")
INT8 = "_int8"
"""What the names of files with weights in int8 end with."""


class Graph(graphs.Graph):
    """A graph that onnxruntime runs on the CPU."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Open a graph.

        Args:
            path: Its file.
            threads: Threads that it runs on; 0 lets onnxruntime choose.

        Raises:
            ConfigError: There is no such file.
        """
        import onnxruntime

        if not path.exists():
            raise ConfigError(f"{path.parent.parent} holds no {path.parent.name}/{path.name}.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]
        shapes = {one.name: one.shape for one in self._session.get_inputs()}
        super().__init__(
            {
                name: [int(axis) if str(axis).isdigit() else None for axis in shape]
                for name, shape in shapes.items()
            }
        )

    def _run(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        return dict(zip(self._names, self._session.run(self._names, arrays), strict=True))


RUNTIME = graphs.Runtime("onnx", "onnxruntime", "Onnx", Graph, FILE, HALVES)
