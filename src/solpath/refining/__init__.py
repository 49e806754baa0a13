"""Make up for a cut: refit in closed form, or train against the dense model.

What changes the weights of a model that was cut enters here.
"""
