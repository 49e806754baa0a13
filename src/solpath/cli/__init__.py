"""The command line: what a person types.

A command checks its options, calls one function of the package, and prints what came back. No
mathematics, no file format and nothing that Python users could need enters here, and nothing heavy
is imported before a command runs.
"""
