"""The experts of a mixture, expert by expert, so that their neurons can be masked and cut."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from solpath.nn.slim import slim_class

_ALIGNED = 16  # bytes: what grouped matrix products want a row of neurons to be a multiple of

OnNeurons = Callable[[Tensor, int, Tensor, int], Tensor]
"""A function ``neurons, expert, token, tokens -> neurons``: neurons ``[n, width]`` of one expert,
its number, the indices ``[n]`` of the tokens that it got, and how many tokens all experts got."""


def is_experts(module: nn.Module) -> bool:
    """Return whether a module holds gated experts the way transformers does, as two tensors."""
    held = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(p is not None and p.dim() == 3 for p in held) and hasattr(module, "_apply_gate")


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Do what the `forward` of experts of transformers does, one expert after the other.

    Args:
        hidden_states: ``[tokens, features]``.
        top_k_index: The experts of every token, int64 ``[tokens, k]``.
        top_k_weights: Their weights, ``[tokens, k]``.

    Returns:
        The states ``[tokens, features]``.
    """
    on_neurons: OnNeurons | None = vars(self).get("on_neurons")
    states = torch.zeros_like(hidden_states)
    chosen: Any = top_k_index
    for expert in chosen.unique().tolist():
        token, place = torch.where(top_k_index == expert)
        neurons = self._apply_gate(_project(self, "gate_up_proj", expert, hidden_states[token]))
        if on_neurons is not None:
            neurons = on_neurons(neurons, expert, token, len(hidden_states))
        output = _project(self, "down_proj", expert, neurons)
        output = output * top_k_weights[token, place, None]
        states.index_add_(0, token, output.to(states.dtype))
    return states


def cut_forward(self: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """Replace the `forward` of cut experts: the stock one, where its kernel takes their width."""
    width = self.down_proj.shape[1 if self.is_transposed else 2]
    row = width * self.down_proj.element_size()
    grouped = self.config._experts_implementation == "grouped_mm"
    if grouped and (row == 0 or row % _ALIGNED):
        return experts_forward(self, *args, **kwargs)
    states: Tensor = type(self).__mro__[1].forward(self, *args, **kwargs)  # type: ignore[attr-defined]
    return states


def counted_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Multiply as often as the `forward` of experts does, whatever the experts of the tokens are.

    Every token runs through the first expert alone, so that nothing depends on data, and through no
    kernel that torch cannot count. For the arguments see `experts_forward`.
    """
    count = top_k_index.shape[1]
    rows = hidden_states.repeat_interleave(count, 0)
    neurons = self._apply_gate(_project(self, "gate_up_proj", 0, rows))
    output = _project(self, "down_proj", 0, neurons) * top_k_weights.reshape(-1, 1)
    return output.view(-1, count, output.shape[1]).sum(1).to(hidden_states.dtype)


def _project(experts: Any, name: str, expert: int, states: Tensor) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return linear(states, weight.T if experts.is_transposed else weight, bias)


def cut_experts_(module: Any) -> None:
    """Let experts run with the width of their cut parameters, in place."""
    width = module.down_proj.shape[1 if module.is_transposed else 2]
    for name in ("intermediate_dim", "intermediate_size"):
        if name in vars(module):
            setattr(module, name, width)
    module.__class__ = _cut_class(type(module))


def remake(stock: type[nn.Module]) -> nn.Module:
    """Return cut experts without contents, which a pickle then fills."""
    kind = _cut_class(stock)
    return kind.__new__(kind)


def _cut_class(stock: type[nn.Module]) -> type[nn.Module]:
    return slim_class(stock, cut_forward, (remake, (stock,)))  # type: ignore[arg-type]
