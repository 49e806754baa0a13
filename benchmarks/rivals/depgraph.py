"""Torch-Pruning, the package, on its path for transformers: whatever its own graph couples leaves.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv 2301.12900, repository
VainF/Torch-Pruning. As in its examples for ViT and BERT with the bottleneck option: `num_heads`,
pruned head dimensions, no pruned heads, and the layers that write to the residual stream keep their
outputs. Importance: Taylor, with the mean absolute gradient of a random projection of the output,
as there are no labels, or the magnitude. `prune_taylor_global` ranks all layers together. The ratio
is searched by bisection until the kept share of the parameters is the budget. It cuts for real.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rivals.moments import Calibration
from solpath.divergence import curvature_sketch
from solpath.objective import kind_of
from solpath.running.forward import output_mask, output_tensor, run

HEAD_SIZE = {"BertSelfAttention": "attention_head_size", "ViTAttention": "head_dim"}
"""Class to the attribute its forward pass views the heads with; the examples set it by hand too."""
BATCHES = 16
MISSING = (
    "torch-pruning is missing, which this benchmark alone needs: pip install torch-pruning==1.6.1"
)


def prune_taylor(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """First-order Taylor, the same share of every layer."""
    return _nearest(model, calibration, keep, taylor=True, everywhere=False)


def prune_taylor_global(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """First-order Taylor, one ranking of all layers."""
    return _nearest(model, calibration, keep, taylor=True, everywhere=True)


def prune_magnitude(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
    """Magnitude, the same share of every layer."""
    return _nearest(model, calibration, keep, taylor=False, everywhere=False)


def _nearest(
    model: nn.Module, calibration: Calibration, keep: float, *, taylor: bool, everywhere: bool
) -> nn.Module:
    """Bisect the ratio; the model whose size is nearest to the budget."""
    if keep >= 1:
        return copy.deepcopy(model)
    total = sum(pair.cost * pair.units for pair in calibration.pairs)
    dense = sum(parameter.numel() for parameter in model.parameters())
    found: list[tuple[float, nn.Module]] = []
    low, high, ratio = 0.0, 1.0, 1 - keep
    for _ in range(6):
        pruned = _cut(model, calibration, ratio, taylor, everywhere)
        size = sum(parameter.numel() for parameter in pruned.parameters())
        share = 1 - (dense - size) / total
        found.append((abs(share - keep), pruned))
        if abs(share - keep) < 1e-3:
            break
        low, high = (ratio, high) if share > keep else (low, ratio)
        ratio = (low + high) / 2
    return min(found, key=lambda entry: entry[0])[1]


def _cut(
    model: nn.Module, calibration: Calibration, ratio: float, taylor: bool, everywhere: bool
) -> nn.Module:
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise SystemExit(MISSING) from error
    pruned = copy.deepcopy(model).requires_grad_(True)
    num_heads: dict[nn.Module, int] = {}
    inner: set[nn.Module] = set()
    for pair in calibration.pairs:
        layers = [pruned.get_submodule(s.module) for s in pair.sides if s.axis == 0]
        inner.update(layers)
        if pair.kind != "mlp":
            num_heads |= dict.fromkeys(layers, pair.heads)
    ignored = [
        module
        for module in pruned.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in inner
    ]
    importance = torch_pruning.importance.MagnitudeImportance(p=2)
    if taylor:
        importance = torch_pruning.importance.TaylorImportance()
        gradients = calibration.once("depgraph", lambda: _gradients(model, calibration))
        for name, parameter in pruned.named_parameters():
            parameter.grad = gradients[name].clone()
    pruner = torch_pruning.pruner.BasePruner(
        pruned,
        calibration.batches[0],
        importance=importance,
        global_pruning=everywhere,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=num_heads,
        prune_head_dims=True,
        prune_num_heads=False,
        output_transform=lambda output: output_tensor(output).sum(),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in pruned.modules():
        if (name := HEAD_SIZE.get(type(module).__name__)) is not None:
            query = next(module.children())
            setattr(module, name, query.out_features // module.num_attention_heads)
    for parameter in pruned.parameters():
        parameter.grad = None
    return pruned


def _gradients(model: nn.Module, calibration: Calibration) -> dict[str, Tensor]:
    """Mean over batches of the absolute gradient of a random projection of the output."""
    model = copy.deepcopy(model).requires_grad_(True)
    totals = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for batch in calibration.batches[:BATCHES]:
        result: Any = run(model, batch, labels=False)
        output, kind = output_tensor(result), kind_of(model, result)
        noise = torch.randn(output.shape, generator=generator)
        mask = output_mask(batch, output)
        sketch = curvature_sketch(output.detach(), mask, noise, kind=kind)
        model.zero_grad(set_to_none=True)
        (sketch * output).sum().backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                totals[name] += value.grad.abs() / BATCHES
    return totals
