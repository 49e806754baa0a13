"""``python -m solpath``: the command line."""

import sys

from solpath.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
