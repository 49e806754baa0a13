"""What commands work on: models, paths, tables and losses by name."""

import importlib
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solpath.cli.arguments import Data, Placement, Precision
from solpath.errors import ConfigError, FileError
from solpath.holding import EXTRACTED_FILE, holds

if TYPE_CHECKING:
    import torch

    from solpath.cli.losses import NamedLoss
    from solpath.measuring.evaluation import Result
    from solpath.planning.latency_table import LatencyTable
    from solpath.planning.path import SolutionPath


def loss_of(text: str | None) -> "NamedLoss | None":
    """Import a loss of the user, ``module:function``, from the folder that the command runs in.

    Raises:
        ConfigError: There is no such module or function, or its import fails.
    """
    if text is None:
        return None
    module, mark, name = text.partition(":")
    if not mark or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ConfigError(f"--loss is module:function, such as losses:margin; got {text!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise ConfigError(
            f"--loss: cannot import {module} from {Path.cwd()}: {type(error).__name__}: {error}."
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ConfigError(f"--loss: {module} has no function {name}.")
    from solpath.cli.losses import NamedLoss

    return NamedLoss(text, found)


def device_for(place: Placement) -> "torch.device":
    """Return the device that models and batches go to.

    Raises:
        ConfigError: It is no device of torch, or is not there.
    """
    import torch

    if place.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.empty(0, device=torch.device(place.device)).device  # with its number
    except Exception as error:  # every backend has its own
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--device {place.device}: {reason}.") from error
    if found.type == "meta":
        raise ConfigError("--device meta: nothing can be computed there; give cpu or cuda.")
    return found


def load_any(name: str, place: Placement) -> Any:
    """Load the model of a folder, Hub id or GGUF file, dense or extracted.

    Args:
        name: The name of the model.
        place: Where and how it runs.
    """
    from solpath.pretrained import from_pretrained, quiet_transformers

    quiet_transformers()
    if (Path(name) / EXTRACTED_FILE).is_file():
        return load_small(name, place)
    device = device_for(place)
    return _attending(from_pretrained(name, device=device, dtype=place.dtype.dtype), place)


def load_dense(name: str, place: Placement) -> Any:
    """Load a dense model, or leave its weights on disk if they do not fit into memory.

    Args:
        name: The name of the model.
        place: Where and how it runs.
    """
    from solpath.loading import load_within
    from solpath.pretrained import quiet_transformers

    quiet_transformers()
    device = device_for(place)
    return _attending(load_within(name, device=device, dtype=place.dtype.dtype), place)


def load_small(name: str, place: Placement) -> Any:
    """Load an extracted model of a folder or Hub id.

    Args:
        name: The name of the model.
        place: Where and how it runs.
    """
    from solpath.storing.quantized import is_quantized
    from solpath.storing.reading import load

    model: Any = load(name)
    if place.dtype is not Precision.AUTO:
        for weight_name, weight in model.named_parameters():
            if is_quantized(weight):
                raise ConfigError(
                    f"--dtype {place.dtype}: torchao has quantised {weight_name} of {name}, which "
                    "keeps its dtype; leave --dtype out, or cast before quantising."
                )
        _cast(model, model.parameters(), place.dtype.dtype)
    return _attending(model.to(device_for(place)), place)


def load_float32(name: str) -> tuple[Any, list[str]]:
    """Load an extracted model on the CPU, its weights in float32 but for those that are quantised.

    Args:
        name: The name of the model.

    Returns:
        The model, and the names of the other dtypes that its weights are stored in.
    """
    import torch

    from solpath.storing.quantized import is_quantized

    model = load_small(name, Placement())
    weights = [weight for weight in model.parameters() if not is_quantized(weight)]
    stored = {str(weight.dtype).removeprefix("torch.") for weight in weights} - {"float32"}
    _cast(model, weights, torch.float32)
    return model, sorted(stored)


def _cast(model: Any, weights: "Iterable[torch.Tensor]", dtype: "torch.dtype | None") -> None:
    """Cast weights of a model, and say so in its configuration; buffers stay as they are."""
    for weight in weights:
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype


def _attending(model: Any, place: Placement) -> Any:
    """Return the model with the attention that was asked for."""
    if place.attention is not None:
        try:
            model.set_attn_implementation(place.attention.value)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(f"--attention {place.attention}: {reason}") from error
    return model


def check_not_swapped(first: str | Path, second: str | Path, first_is: str, second_is: str) -> None:
    """Raise `ConfigError` if each of two folders holds what the other one should.

    Args:
        first: The folder that was given first.
        second: The folder that was given second.
        first_is: What the first should hold; see `solpath.holding.holds`.
        second_is: What the second should hold.
    """
    if (holds(first), holds(second)) == (second_is, first_is):
        raise ConfigError(f"{first} holds {second_is}, and {second} {first_is}; swap them.")


def path_of(folder: Path) -> "SolutionPath":
    """Load the path in a folder."""
    from solpath.planning.path import SolutionPath

    return SolutionPath.load(folder)


def searched_on(folder: Path, data: Data) -> bool:
    """Return whether a path was searched on the same data, as far as its settings say.

    Args:
        folder: The folder of the path.
        data: The data of another command.
    """
    try:
        found = tomllib.loads((folder / "settings.toml").read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False  # it was not made by the command line
    own = {str(found[name]) for name in ("text", "images") if name in found}
    own |= {str(name) for name in found.get("data", ())}
    given = {str(name) for name in (data.text, data.images, *(data.data or ())) if name}
    return bool(own & given) and found.get("split", []) == list(data.split or [])


def table_of(file: Path) -> "LatencyTable":
    """Load the latency table in a file."""
    from solpath.planning.latency_table import LatencyTable

    return LatencyTable.load(file)


def result_of(file: Path) -> "Result":
    """Load what ``solpath eval --json`` printed; scores at a task become metrics of their own.

    Raises:
        FileError: The file cannot be read, or holds something else.
    """
    from solpath.measuring.evaluation import Result
    from solpath.reading import read_json

    value = read_json(file)
    try:
        found = Result.from_dict(value)
        return found if value.get("task") is None else Result.from_dict(_with_scores(value))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else "task is not a name and scores"
        raise FileError(f"{file} is no result of solpath eval --json: {reason}.") from error


def _with_scores(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result as JSON in which the scores at a task are among the metrics."""
    task, metrics, intervals = value["task"], dict(value["metrics"]), dict(value["intervals"])
    for of, words in {"model": "", "dense": ", dense model"}.items():
        metrics |= {f"{task['name']} {n}{words}": v for n, v in task[of].items()}
        intervals |= {f"{task['name']} {n}{words}": v for n, v in task["intervals"][of].items()}
    return {**value, "metrics": metrics, "intervals": intervals}


def numbers(text: str) -> list[float]:
    """Read the numbers of ``--sizes``.

    Raises:
        ConfigError: They are no numbers.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes are numbers, as in 0.1,0.2,0.3; got {text!r}.") from error
