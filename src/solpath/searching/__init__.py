"""The searches, which put all units of a model in order.

`search.py` runs one of two methods, `equilibrium.py` or `inclusion.py`. A method asks a model for
gradients and statistics only through an engine (`engine.py`); `probe.py` is the engine for models
in memory. The search changes no weights, except that they are rotated to a basis while it runs.
"""
