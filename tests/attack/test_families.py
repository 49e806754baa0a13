"""Masked and cut agree, for random plans of random families.

``pytest tests/attack --minutes 30`` runs longer.
"""

from families import run


def test_random_plans_of_random_families(seconds):
    found = run(max(seconds, 4), seed=1)
    print(
        f"{found.plans} plans of {len(found.families)} families, {found.zeros} pairs cut to nothing"
    )
    assert not found.faults
    assert found.plans > 20
    assert found.zeros
