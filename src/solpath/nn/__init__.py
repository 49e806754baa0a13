"""Replace stock modules that cannot run once they are cut.

What runs in the forward pass of a model in the place of a module of transformers, timm or torch
enters here: attention with different query-key and value-output widths, either of which may be 0,
and linear layers without inputs or outputs. Nothing here knows of pairs, plans or paths.
"""
