"""Train small stock models of transformers from scratch, offline, in minutes on one CPU core.

    python examples/zoo/train.py deit      # into models/deit/
    python examples/zoo/train.py all

A folder gets `config.json`, `model.safetensors` and `train.json`: test metrics, settings, versions.
A model that is there with the same settings is not trained again. The same seed, versions and kind
of machine give the same bits.
"""

import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import sklearn
import torch
import transformers
import typer
from transformers import PreTrainedModel

from captions import CLIP
from denoising import T5
from digits import DEIT, SWIN, VIT
from recipe import Recipe, digest, fit
from solpath.files import json_bytes, new_folder
from solpath.reading import read_json
from stdlib_bytes import LLAMA, OPT

MODELS = Path(__file__).resolve().parents[2] / "models"
ZOO: dict[str, Recipe] = {
    "vit": VIT,
    "deit": DEIT,
    "swin": SWIN,
    "clip": CLIP,
    "llama": LLAMA,
    "opt": OPT,
    "t5": T5,
}


def train(name: str, root: Path = MODELS, seed: int = 0) -> Path:
    """Train a model, and its teacher before it, unless both are there. Returns its folder."""
    recipe, folder = ZOO[name], root / name
    wanted = digest(recipe.settings(seed))
    teacher = None
    if recipe.teacher is not None:
        teacher = load(recipe.teacher, train(recipe.teacher, root, seed))
    if _report(folder).get("digest") == wanted:
        return folder
    wall, cpu = time.perf_counter(), time.process_time()
    model = fit(recipe, seed, teacher)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    with new_folder(folder, overwrite=True, marks={"train.json"}) as temporary:
        model.save_pretrained(temporary)
        weights = (temporary / "model.safetensors").read_bytes()
        report = {
            **recipe.scores(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "wall_seconds": round(wall, 1),
            "cpu_seconds": round(cpu, 1),
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
            "digest": wanted,
            **recipe.settings(seed),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit_learn": sklearn.__version__,
        }
        (temporary / "train.json").write_bytes(json_bytes(report))
    return folder


def load(name: str, folder: Path) -> PreTrainedModel:
    """A trained zoo model, in eval mode."""
    if not (folder / "train.json").is_file():
        raise SystemExit(f"{folder} has no trained model: python examples/zoo/train.py {name}")
    return ZOO[name].model.from_pretrained(folder).eval()


def _report(folder: Path) -> dict[str, Any]:
    file = folder / "train.json"
    return read_json(file) if file.is_file() else {}


def main(
    name: Annotated[str, typer.Argument(help=f"{', '.join(ZOO)} or all.")],
    root: Annotated[Path, typer.Option(help="Folder of the trained models.")] = MODELS,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the batches.")] = 0,
) -> None:
    """Train a zoo model, or all, and print its test metrics."""
    if name not in (*ZOO, "all"):
        raise SystemExit(f"unknown model {name!r}; choose from {', '.join(ZOO)} or all.")
    for each in ZOO if name == "all" else [name]:
        report = _report(train(each, root, seed))
        scores = {key: value for key, value in report.items() if key.startswith("test_")}
        print(f"{each}: {json.dumps(scores)}, {root / each}")


if __name__ == "__main__":
    typer.run(main)
