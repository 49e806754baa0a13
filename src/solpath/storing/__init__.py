"""Save extracted models to disk or the Hub, and load them.

What writes a folder that loads bit for bit enters here, and so does what reads a folder that a
stranger may have written. Whatever is read is checked before anything is built or allocated.
"""
