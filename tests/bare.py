"""Load folders as their cards say, where solpath cannot be imported, and run them.

    python -I tests/bare.py FOLDER ...

Beside every folder lies ``inputs.safetensors``; ``outputs.safetensors`` is written there. Run as a
script, so that nothing of this repository is on the path.
"""

import importlib.abc
import re
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Absent(importlib.abc.MetaPathFinder):
    """Finds nothing, and lets nobody else find solpath."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "solpath":
            raise ModuleNotFoundError(name)


def main(folders):
    sys.meta_path.insert(0, Absent())
    failed = 0
    for folder in map(Path, folders):
        try:
            run(folder)
        except Exception:
            print(folder, traceback.format_exc(), file=sys.stderr)
            failed += 1
    assert "solpath" not in sys.modules
    return failed


def run(folder):
    card = (folder / "README.md").read_text()
    code, *_ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"folder": folder}
    exec(code, names)
    with torch.no_grad():
        outputs = names["model"](**load_file(folder.parent / "inputs.safetensors"))
    found = {k: v.contiguous() for k, v in outputs.items() if isinstance(v, torch.Tensor)}
    save_file(found, folder.parent / "outputs.safetensors")


sys.exit(main(sys.argv[1:]))
