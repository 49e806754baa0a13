"""A Ctrl-C at any line leaves the models and torch as they were found."""

import pytest
from interrupts import interrupt, works


@pytest.fixture(scope="module")
def every():
    return works()


@pytest.mark.parametrize("name", ["search", "compensate", "tune", "masked", "save and load"])
def test_nothing_is_left_behind(name, every):
    work, models = every[name]
    found = interrupt(work, models, seconds=60, seed=0, limit=8)
    assert found.interrupts == 8
    assert not found.left, found.where
