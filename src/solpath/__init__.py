"""Prune a pretrained transformer once, hand it out at any size."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from solpath.errors import SolpathError

if TYPE_CHECKING:
    from solpath import baselines
    from solpath.choosing.choose import choose
    from solpath.config import InclusionConfig, SearchConfig, TuneConfig
    from solpath.data.images import image_batches, image_text_batches
    from solpath.data.text import text_batches
    from solpath.exporting.export import export
    from solpath.measuring.evaluation import evaluate
    from solpath.measuring.latency import measure_latency, plan_for_latency
    from solpath.measuring.measurement import measure
    from solpath.model.checking import check_table
    from solpath.model.discovery import find_pairs
    from solpath.model.masks import masked
    from solpath.planning.latency_table import LatencyTable
    from solpath.planning.path import SolutionPath
    from solpath.planning.plan import Plan
    from solpath.refining.compensation import compensate
    from solpath.refining.tuning import tune
    from solpath.reporting.making import make_family
    from solpath.searching.search import search
    from solpath.storing.reading import load
    from solpath.storing.streaming import extract
    from solpath.storing.writing import push_to_hub, save

__version__ = "0.1.0"

# Where each name lives. Modules are imported on first use, so that `import solpath` stays fast.
_HOME = {
    "InclusionConfig": "config",
    "LatencyTable": "planning.latency_table",
    "Plan": "planning.plan",
    "SearchConfig": "config",
    "SolutionPath": "planning.path",
    "TuneConfig": "config",
    "baselines": "",
    "check_table": "model.checking",
    "choose": "choosing.choose",
    "compensate": "refining.compensation",
    "export": "exporting.export",
    "evaluate": "measuring.evaluation",
    "extract": "storing.streaming",
    "find_pairs": "model.discovery",
    "image_batches": "data.images",
    "image_text_batches": "data.images",
    "load": "storing.reading",
    "make_family": "reporting.making",
    "masked": "model.masks",
    "measure": "measuring.measurement",
    "measure_latency": "measuring.latency",
    "plan_for_latency": "measuring.latency",
    "push_to_hub": "storing.writing",
    "save": "storing.writing",
    "search": "searching.search",
    "text_batches": "data.text",
    "tune": "refining.tuning",
}

__all__ = [
    "InclusionConfig",
    "LatencyTable",
    "Plan",
    "SearchConfig",
    "SolpathError",
    "SolutionPath",
    "TuneConfig",
    "baselines",
    "check_table",
    "choose",
    "compensate",
    "evaluate",
    "export",
    "extract",
    "find_pairs",
    "image_batches",
    "image_text_batches",
    "load",
    "make_family",
    "masked",
    "measure",
    "measure_latency",
    "plan_for_latency",
    "push_to_hub",
    "save",
    "search",
    "text_batches",
    "tune",
]


_MODELS, _HANDOVER = "transformers.modeling_utils", "solpath.storing.handover"


class _Finder(MetaPathFinder):
    """Lets transformers save and load extracted models, once its models are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                import_module(_HANDOVER)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _MODELS in sys.modules:
    import_module(_HANDOVER)
else:
    sys.meta_path.insert(0, _Finder())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'solpath' has no attribute {name!r}")
    home = _HOME[name]
    if not home:
        return import_module(f"solpath.{name}")
    value = getattr(import_module(f"solpath.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
