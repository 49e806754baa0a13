"""A model and its inner dimensions: find them, count them, mask them, turn them, cut them.

What has to know where weights lie enters here. Nothing here decides which units leave.
"""
