"""UniQL: MoDeGPT's decompositions as one sorting, so that every size is a prefix.

Chiang et al., "UniQL: Unified Quantization and Low-rank Compression for Adaptive Edge LLMs", ICLR
2026, arXiv 2512.03383, repository enyac-group/UniQL. Neurons are sorted by ridge leverage and fc2
is not fitted again (no pseudo-inverse); queries and keys are sorted by the CR score, couples of
channels under rotary embeddings; values and outputs by an SVD. Block influence decides how much
each block loses. Left out: quantisation and the fine-tuning of low-rank adapters. `prune_uniform`
cuts every block alike.
"""

from torch import nn

from rivals.allocation import by_influence, uniform
from rivals.modegpt import decompose
from rivals.moments import Calibration

EPSILON = 0.2


def prune(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Blocks by their influence."""
    widths = by_influence(calibration.pairs, calibration.influence, keep, EPSILON)
    return decompose(model, calibration, widths, refit=False)


def prune_uniform(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Every block alike."""
    return decompose(model, calibration, uniform(calibration.pairs, keep), refit=False)
