"""From the order of all units to the units that a budget keeps: costs, budgets, plans and paths.

Everything here is plain values and arithmetic on them; nothing sees a model or runs one.
"""
