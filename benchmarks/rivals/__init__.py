"""One-shot structured pruners with published closed forms, written anew, as rivals of the search.

Each gives a copy of the dense model in its original sizes, with the weights that are gone set to
zero and the others as the method leaves them, so that it can be judged as it is.
"""

from collections.abc import Callable, Mapping
from functools import wraps

from torch import nn

from rivals import (
    corp,
    depgraph,
    flap,
    llm_pruner,
    modegpt,
    osscar,
    shortgpt,
    slicegpt,
    uniql,
    wpac,
)
from rivals.moments import Calibration
from rivals.weights import set_gains_

Prune = Callable[[nn.Module, Calibration, float], nn.Module]


def _with_gains(prune: Prune) -> Prune:
    """Let norms over the heads know what they no longer see, as every plan of solpath does."""

    @wraps(prune)
    def pruned(model: nn.Module, calibration: Calibration, keep: float) -> nn.Module:
        result = prune(model, calibration, keep)
        set_gains_(result, calibration.pairs, calibration.energy)
        return result

    return pruned


_ALL = {
    "flap": flap.prune,
    "flap_channels": flap.prune_channels,
    "corp": corp.prune,
    "corp_pooled": corp.prune_pooled,
    "modegpt": modegpt.prune,
    "modegpt_uniform": modegpt.prune_uniform,
    "uniql": uniql.prune,
    "uniql_uniform": uniql.prune_uniform,
    "wpac": wpac.prune,
    "wpac_pooled": wpac.prune_pooled,
    "osscar": osscar.prune,
    "osscar_pooled": osscar.prune_pooled,
    "torch_pruning_taylor": depgraph.prune_taylor,
    "torch_pruning_taylor_global": depgraph.prune_taylor_global,
    "torch_pruning_magnitude": depgraph.prune_magnitude,
}
_DECODERS = {
    "llm_pruner": llm_pruner.prune,
    "slicegpt": slicegpt.prune,
    "shortgpt": shortgpt.prune,
}
METHODS: Mapping[str, Prune] = {name: _with_gains(prune) for name, prune in _ALL.items()}
"""Name to ``prune(model, calibration, keep)``."""
DECODERS: Mapping[str, Prune] = {name: _with_gains(prune) for name, prune in _DECODERS.items()}
"""The same, for models that predict the next token."""
