"""Running a model, and leaving it as it was found: forward passes, modes, processes, progress.

What long work on any model needs. Nothing here knows of pairs, plans or pruning.
"""
