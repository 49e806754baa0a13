"""A short attack on all families; the long one is a command."""

from families import run


def test_random_plans_of_random_families():
    found = run(4, seed=1)
    assert not found.faults
    assert found.plans > 20
    assert found.zeros
