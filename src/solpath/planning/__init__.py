"""The order of the units, and what of it a budget keeps: costs, budgets, plans, paths.

Plain values and arithmetic on them. Nothing here sees a model or runs one.
"""
