"""Prune a pretrained transformer once, hand it out at any size."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from solpath.errors import SolpathError

if TYPE_CHECKING:
    from solpath import baselines
    from solpath.batching import image_batches, image_text_batches, text_batches
    from solpath.compensation import compensate
    from solpath.config import InclusionConfig, SearchConfig, TuneConfig
    from solpath.discover import find_pairs
    from solpath.evaluation import evaluate
    from solpath.extraction import extract
    from solpath.latency import LatencyTable
    from solpath.masks import masked
    from solpath.measurement import measure
    from solpath.path import SolutionPath
    from solpath.plan import Plan
    from solpath.searching import search
    from solpath.store import load, push_to_hub, save
    from solpath.timing import measure_latency, plan_for_latency
    from solpath.tuning import tune

__version__ = "0.1.0"

# Where each name lives. Modules are imported on first use, so that `import solpath` stays fast.
_HOME = {
    "InclusionConfig": "config",
    "LatencyTable": "latency",
    "Plan": "plan",
    "SearchConfig": "config",
    "SolutionPath": "path",
    "TuneConfig": "config",
    "baselines": "",
    "compensate": "compensation",
    "evaluate": "evaluation",
    "extract": "extraction",
    "find_pairs": "discover",
    "image_batches": "batching",
    "image_text_batches": "batching",
    "load": "store",
    "masked": "masks",
    "measure": "measurement",
    "measure_latency": "timing",
    "plan_for_latency": "timing",
    "push_to_hub": "store",
    "save": "store",
    "search": "searching",
    "text_batches": "batching",
    "tune": "tuning",
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
    "compensate",
    "evaluate",
    "extract",
    "find_pairs",
    "image_batches",
    "image_text_batches",
    "load",
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
