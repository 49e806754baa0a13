"""Write a folder that plain transformers loads, without solpath.

A stock class has one width of MLPs, and one number and one width of heads, as `stock_fields` says.
What a plan keeps beside that is refused, or filled up with zeros if ``pad=True`` asks for it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from solpath.errors import ExportError
from solpath.exporting.formats import Counted, Format, Load, Runner
from solpath.exporting.parity import runner_of, transformers_runtime
from solpath.exporting.stock_model import stock_model
from solpath.planning.plan import plan_of
from solpath.running.forward import Batch

TOKENIZER = "tokenizer_config.json"
"""File of every tokenizer of transformers."""


def check(model: nn.Module) -> None:
    """Raise `ExportError` if no stock class can hold a model, whatever its widths are."""
    import transformers

    kind = type(model)
    if not isinstance(model, transformers.PreTrainedModel):
        raise ExportError(
            f"{kind.__name__} is not a model of transformers, which alone has stock classes."
        )
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ExportError(
            f"{kind.__module__}.{kind.__name__} is no class that transformers has by this name, so "
            "plain transformers could not load it; use a class of transformers."
        )
    if kind.__name__.startswith("TimmWrapper") and plan_of(model) is not None:
        raise ExportError(
            f"{kind.__name__} builds its model by the name that timm knows, and has no field for "
            "smaller widths; keep it with solpath.save."
        )
    if wrong := {parameter.dtype for parameter in model.parameters()} - {torch.float32}:
        raise ExportError(
            f"its parameters have the dtype {wrong.pop()}; export model.float(), and load the "
            "folder with from_pretrained(folder, dtype=...)."
        )


def write(
    model: nn.Module, folder: Path, batch: Batch, *, pad: bool = False, tokenizer: Any = None
) -> Counted | None:
    """Write the folder of a stock class.

    Args:
        model: An extracted or dense model. It is left untouched.
        folder: An empty folder.
        batch: Inputs, whose first sample multiply-accumulates are counted on.
        pad: Whether layers may be filled up with zeros to one width.
        tokenizer: A tokenizer or processor whose files are added.

    Returns:
        Sizes with what was filled up; None for a dense model.

    Raises:
        ExportError: A stock class cannot hold the model, or only with `pad`.
    """
    stock: Any = model
    plan, padding = plan_of(model), None
    if plan is not None:
        stock, padding = stock_model(model, plan, batch, pad=pad)
    stock.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    return None if padding is None else Counted(padding.sizes, padding.padded)


def loads(model: nn.Module, folder: Path) -> list[Load]:
    """Say how transformers, and what is built on it, loads a folder."""
    auto = auto_class(type(model))
    code = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(folder)"
    found = [Load("transformers", code)]
    if (folder / TOKENIZER).exists() and auto == "AutoModelForCausalLM":
        found.append(Load("transformers serve", "transformers serve .", "bash"))
    return found


def auto_class(kind: Any) -> str:
    """Return the name of the class that loads a folder: an ``AutoModel…``, or `kind` if none does.

    Args:
        kind: A class of transformers that has a configuration class.

    Example:
        >>> auto_class(type(model))
        'AutoModelForSequenceClassification'
    """
    import transformers

    for name in sorted(n for n in dir(transformers) if n.startswith("AutoModel")):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        found = mapping.get(kind.config_class, ()) if mapping else ()
        if kind in (found if isinstance(found, tuple) else (found,)):
            return name
    return str(kind.__name__)


def open_folder(folder: Path) -> Runner:
    """Load a folder as its card says, and check that it is whole.

    Raises:
        ExportError: A weight is missing, is not used, or has another shape than the class wants.
    """
    import transformers

    settings = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, settings.architectures[0])
    loader = getattr(transformers, auto_class(kind))
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    if type(model) is not kind:
        raise ExportError(f"plain transformers loads a {type(model).__name__}.")
    if wrong := {name: found for name, found in info.items() if found}:
        raise ExportError(
            f"plain transformers loads another model: {wrong}. A model that was built without one "
            "of its parts, such as its pooler, cannot be loaded without saying so; use a class "
            "that has no such part."
        )
    return runner_of(model)


FORMAT = Format(
    name="stock",
    title="plain transformers",
    library="transformers",
    loads=loads,
    check=check,
    write=write,
    open=open_folder,
    runtime=transformers_runtime,
    tolerance=1e-4,
    command=(
        "python -c \"import transformers as t; f = '{folder}'; "
        'getattr(t, t.AutoConfig.from_pretrained(f).architectures[0]).from_pretrained(f)"'
    ),
)
