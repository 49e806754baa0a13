"""Run the command line as ``python -m solpath``."""

import sys

from solpath.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
