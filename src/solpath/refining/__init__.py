"""Make up for a cut: refit in closed form, or train against the dense model.

Every module that changes the weights of a model that was cut is here.
"""
