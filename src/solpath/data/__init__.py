"""Batches: what a model is run on.

Everything that turns files, folders, data sets and loaders into batches, cuts a batch into samples,
or says what a batch holds. Nothing here runs a model.
"""
