"""One-shot structured pruners with published closed forms, written anew, as rivals of the search.

Each gives a copy of the dense model in its original sizes, with the weights that are gone set to
zero and the others as the method leaves them, so that it can be judged as it is.
"""

from collections.abc import Callable, Mapping

from torch import nn

from rivals import corp, depgraph, flap, modegpt, osscar, uniql, wpac
from rivals.moments import Calibration

Prune = Callable[[nn.Module, Calibration, float], nn.Module]

METHODS: Mapping[str, Prune] = {
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
"""Name to ``prune(model, calibration, keep)``."""
