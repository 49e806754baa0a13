"""A Ctrl-C at any line leaves the models and torch as they were found.

``pytest tests/attack --minutes 30`` runs longer.
"""

import sys

import pytest
from interrupts import interrupt, works

from conftest import SHORT


@pytest.fixture(scope="module")
def every():
    return works()


@pytest.mark.parametrize("name", works())
def test_nothing_is_left_behind(name, every, seconds):
    work, models = every[name]
    short = seconds == SHORT
    found = interrupt(
        work, models, seconds=60 if short else seconds, seed=0, limit=8 if short else sys.maxsize
    )
    print(f"{name}: {found.interrupts} interrupts at {found.lines} lines")
    assert found.interrupts
    assert not found.left, found.where
