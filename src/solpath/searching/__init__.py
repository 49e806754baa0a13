"""The searches: put all units of a model in order.

`search.py` is the frame, `equilibrium.py` and `inclusion.py` are the two methods, and they ask a
model for gradients and statistics through `engine.py` only. A new method or a new engine enters
here; weights are changed elsewhere.
"""
