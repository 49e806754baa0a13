"""Make batches: the data that a model runs on.

What turns files, folders, data sets and loaders into batches enters here, and so does what cuts a
batch into samples or says what a batch holds. Nothing here runs a model.
"""
