"""Losses that a user names on the command line. Commands import this when they run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from solpath.errors import ConfigError, SolpathError


@dataclass(frozen=True)
class NamedLoss:
    """A loss of the user, whose own errors name the function.

    Attributes:
        name: What the user typed, ``module:function``.
        function: The function of that name.
    """

    name: str
    function: Callable[[Any, Any], Any]

    def __call__(self, outputs: Any, batch: Any) -> Any:
        """Return what the function returns.

        Args:
            outputs: See `solpath.objective.Loss`.
            batch: See `solpath.objective.Loss`.

        Raises:
            ConfigError: The function raised an error.
        """
        try:
            return self.function(outputs, batch)
        except (SolpathError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # code of the user can raise anything
            raise ConfigError(
                f"--loss {self.name} raised {error!r:.200}; solpath --debug shows where."
            ) from error
