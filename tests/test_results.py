"""The figures in the docs are those in the result files."""

import subprocess
import sys
from pathlib import Path


def test_docs_show_the_result_files():
    script = Path(__file__).parents[1] / "benchmarks" / "render.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
