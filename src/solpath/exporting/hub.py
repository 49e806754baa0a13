"""A folder that transformers and vLLM load without solpath: weights, sizes and its own classes.

The classes are subclasses of those of transformers, in one file that is the same for every model of
a family. The sizes are in `config.json`: `per_layer_config` has an entry for every layer.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.arch.building import without_weights
from solpath.arch.table import is_foreign
from solpath.errors import ConfigError, ExportError
from solpath.exporting.families import FAMILIES, Family, written_out
from solpath.exporting.formats import Format, Load, Runner
from solpath.exporting.parity import runner_of, transformers_runtime
from solpath.exporting.widths import read_widths
from solpath.files import json_bytes
from solpath.running.forward import Batch
from solpath.storing.manifest import CONFIG, INDEX
from solpath.storing.shards import Stored, write_shards

_SHARD = "5GB"


def check(model: nn.Module) -> None:
    """Raise `ExportError` unless the classes of the folder compute what `model` does."""
    kind, model_type = type(model), getattr(getattr(model, "config", None), "model_type", None)
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise ExportError(
            f"the format 'hub' knows {', '.join(FAMILIES)}, not {model_type}; solpath.save writes "
            "a folder that needs solpath."
        )
    if kind.__name__ not in family.classes or not kind.__module__.startswith("transformers."):
        raise ExportError(
            f"the format 'hub' knows {', '.join(family.classes)} of transformers, not "
            f"{kind.__module__}.{kind.__name__}."
        )
    if low := {p.dtype for p in model.parameters()} & {torch.bfloat16, torch.float16}:
        raise ExportError(
            f"the model is in {low.pop()}, whose rounding hides what differs; export "
            "model.float(), and load the folder with dtype=."
        )
    if is_foreign(model_type):
        raise ExportError(
            f"the table of {model_type} was registered, and the classes of the format 'hub' are "
            "for that of solpath."
        )
    if getattr(model.config, "is_heterogeneous", False):
        raise ExportError("the model has a per_layer_config of its own, which cutting knows not.")


def write(
    model: nn.Module,
    folder: Path,
    batch: Batch,
    *,
    multiple_of: int = 8,
    tokenizer: Any = None,
) -> None:
    """Write `config.json`, the file of the classes, and the weights.

    Args:
        model: A model that `check` lets pass.
        folder: An empty folder.
        batch: Nothing of it is used.
        multiple_of: What the size of a head that kernels see is a multiple of: queries, keys and
            values are padded with zeros up to it when the model runs. Flash-attention wants 8, and
            vLLM on a CPU 32.
        tokenizer: A tokenizer or processor whose files are added.

    Raises:
        ConfigError: `multiple_of` is not a whole number above 0.
        ExportError: The model has other tensors than the class of the folder.
    """
    if type(multiple_of) is not int or multiple_of < 1:
        raise ConfigError(f"multiple_of must be a whole number above 0, got {multiple_of!r}.")
    family = FAMILIES[model.config.model_type]  # type: ignore[union-attr, index]
    entries, tensors = read_widths(model, _tensors(model), multiple_of)
    tensors = {name: value for name, value in tensors.items() if value.numel()}
    config = _config(model, family, entries)
    _check_tensors(type(model).__name__, family, config, tensors)
    config.save_pretrained(folder)
    (folder / family.file).write_text(written_out(family.module), encoding="utf-8")
    _, index = write_shards({key: _stored(value) for key, value in tensors.items()}, folder, _SHARD)
    if index is not None:
        (folder / INDEX).write_bytes(json_bytes(index))
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a model by name; tied ones appear once."""
    parameters = dict(model.named_parameters())
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in model.state_dict().items() if name not in names}
    return {name: value.detach() for name, value in {**parameters, **buffers}.items()}


def _stored(tensor: Tensor) -> Stored:
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _config(model: Any, family: Family, entries: dict[str, Any]) -> Any:
    dropped = ("model_type", "quantization_config", "auto_map", "transformers_version")
    values = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    config = family.cut_class(family.config)(**values | entries)
    name = type(model).__name__
    file = family.file.removesuffix(".py")
    base = next(stock for stock, auto in family.classes.items() if auto == "AutoModel")
    auto = {"AutoConfig": family.config, "AutoModel": base, family.classes[name]: name}
    config.auto_map = {key: f"{file}.Solpath{stock}" for key, stock in auto.items()}
    config.architectures = [f"Solpath{name}"]
    config.dtype = next(model.parameters()).dtype
    return config


def _check_tensors(name: str, family: Family, config: Any, tensors: dict[str, Tensor]) -> None:
    """Raise `ExportError` unless the class of the folder has tensors of these names and shapes."""
    with without_weights():
        skeleton = family.cut_class(name)(config)
    skeleton.tie_weights()
    built = _tensors(skeleton)
    if other := sorted(set(built) ^ set(tensors)):
        where = "the model" if other[0] in tensors else f"a {name} of transformers"
        raise ExportError(f"only {where} has the tensor {other[0]}; export a plain {name}.")
    for key, tensor in tensors.items():
        if tensor.shape != built[key].shape:
            raise ExportError(
                f"{key} has the shape {list(tensor.shape)}, and {list(built[key].shape)} by the "
                "widths of its layer; was the model changed after it was cut?"
            )


def _auto_class(model: nn.Module) -> str:
    """Return the name of the class of transformers that loads a model with its head."""
    return FAMILIES[model.config.model_type].classes[type(model).__name__]  # type: ignore[union-attr, index]


def _command(model: nn.Module, folder: Path) -> str:
    auto = _auto_class(model)
    return f"transformers.{auto}.from_pretrained({{folder!r}}, trust_remote_code=True)"


def loads(model: nn.Module, folder: Path) -> list[Load]:
    """Say how transformers and vLLM load a folder."""
    auto = _auto_class(model)
    code = (
        f"from transformers import {auto}\n\n"
        f"model = {auto}.from_pretrained(folder, trust_remote_code=True)"
    )
    found = [Load("transformers, with the classes in the folder", code)]
    if auto == "AutoModelForCausalLM":
        found.append(Load("vLLM", "vllm serve . --trust-remote-code", "bash"))
    return found


def open_folder(folder: Path) -> Runner:
    """Load a written folder with the classes that are in it, and return what runs it."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    [name] = config["architectures"]
    file = config["auto_map"]["AutoConfig"].partition(".")[0]
    kind = getattr(_module_from(folder / f"{file}.py"), name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    if wrong := [key for kind in ("missing_keys", "unexpected_keys") for key in report[kind]]:
        raise ExportError(f"transformers does not find {wrong[0]} where it was written.")
    model.eval()
    return runner_of(model)


def _module_from(file: Path) -> Any:
    """Import a file under a name that stands for its contents."""
    name = f"solpath_hub_{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where transformers looks for the source of a class
    spec.loader.exec_module(module)
    return module


FORMAT = Format(
    name="hub",
    title="transformers and vLLM, with classes of its own",
    library="transformers",
    loads=loads,
    check=check,
    write=write,
    open=open_folder,
    runtime=transformers_runtime,
    tolerance=1e-5,
    command=_command,
)
