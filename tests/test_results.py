"""The figures in the docs are those in the result files."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_docs_show_the_result_files():
    script = BENCHMARKS / "render.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_finds_what_it_imports():
    """They import names, so what was moved or renamed is missed here and not when it is run."""
    names = sorted(file.stem for file in BENCHMARKS.glob("*.py"))
    code = f"import importlib; [importlib.import_module(name) for name in {names!r}]"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
