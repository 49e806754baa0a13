"""Run a model and leave it as it was found: forward passes, modes, processes, progress.

Long work on any model needs these modules. Nothing here knows of pairs, plans or pruning.
"""
