"""Extracted models to and from disk and the Hub.

Writing a folder that loads bit for bit, and reading one that a stranger may have written: every
check of what is read enters here, before anything is built or allocated.
"""
