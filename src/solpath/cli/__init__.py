"""Run solpath from the command line.

A command checks its options, calls one function of the package, and prints what came back. No
mathematics, no file format and nothing that users of Python could need enters here, and nothing
heavy is imported before a command runs.
"""
