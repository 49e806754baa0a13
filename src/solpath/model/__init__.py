"""A model and its inner dimensions: find them, count them, mask them, rotate them, cut them.

Every module that needs to know where weights lie is here. Nothing here decides which units leave.
"""
