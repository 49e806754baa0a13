"""What a model costs, and how near it stays to the dense model.

Every figure is taken from a model as it is. Nothing here changes a model.
"""
