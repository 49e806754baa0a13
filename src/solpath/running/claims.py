"""Claim a model while a function works on it, so that no second one works on it too.

A search masks its model, `masked` turns its weights, an evaluation puts it into eval mode. Another
function that ran, copied or searched the model meanwhile, in another thread or inside the block,
would get wrong results and could leave the model changed, both without a word.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from solpath.errors import ModelInUseError
from solpath.running.modes import undoing

Admits = Literal["nothing", "runs", "anything"]
"""What the same thread may do with a model inside a claim: nothing, run it as it is, or anything.

Other threads may do nothing with it.
"""


@dataclass(frozen=True, eq=False)
class _Claim:
    model: str
    doing: str
    admits: Admits
    thread: threading.Thread


# The claims of every module that has any, all of one thread, which alone changes them. No lock is
# needed, nor could a Ctrl-C leave one locked: only one thread can set the first claim.
_claims: dict[nn.Module, list[_Claim]] = {}


@contextmanager
def claimed(
    *models: nn.Module, doing: str, admits: Admits = "nothing", runs: bool = False
) -> Iterator[None]:
    """Claim models, with all modules in them, until the block ends.

    Args:
        models: The models. One may be given twice, or be part of another.
        doing: What happens to them, for the message of an error: ``"searched"``.
        admits: What the same thread may do with the models inside the block.
        runs: Whether the block only runs the models, as they are.

    Raises:
        ModelInUseError: A module is claimed by another thread, or by a block around this one that
            does not admit it. Nothing is claimed then.

    Example:
        >>> with claimed(model, doing="searched"), claimed(model, doing="cut"):
        ...     pass
        Traceback (most recent call last):
            ...
        solpath.errors.ModelInUseError: this BertForSequenceClassification cannot be cut while ...
    """
    thread = threading.current_thread()
    owned: dict[nn.Module, _Claim] = {}
    for model in models:
        claim = _Claim(type(model).__name__, doing, admits, thread)
        for module in model.modules():
            owned.setdefault(module, claim)

    def release() -> None:
        for module, claim in owned.items():
            if claim in (claims := _claims.get(module, [])):
                if len(claims) == 1:
                    _claims.pop(module, None)
                else:
                    claims.remove(claim)

    with undoing(release):
        for module, claim in owned.items():
            claims = _claims.setdefault(module, [claim])
            if claims[0] is not claim:
                for other in claims:
                    _check(claim, other, runs)
                claims.append(claim)
        yield


def _check(claim: _Claim, other: _Claim, runs: bool) -> None:
    """Raise `ModelInUseError` unless `other`, which is there already, admits `claim`."""
    if other.thread is not claim.thread:
        raise ModelInUseError(
            f"this {claim.model} cannot be {claim.doing} while it is {other.doing} in thread "
            f"{other.thread.name!r}; wait for that, or give each thread a copy of its own first."
        )
    if other.admits == "anything" or (runs and other.admits == "runs"):
        return
    raise ModelInUseError(
        f"this {claim.model} cannot be {claim.doing} while it is {other.doing} further out in this "
        "thread; leave that block or call first."
    )
