"""Save extracted models by transformers' own calls.

`save_pretrained` stands in for the method of that name of extracted models (see
`solpath.storing.handover`), so ``push_to_hub`` and the checkpoints of a ``Trainer`` write the
folder that `solpath.save` writes.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from solpath.errors import ConfigError, FileError
from solpath.files import sync, temporary_folder
from solpath.running.modes import contained
from solpath.storing.manifest import GENERATION, HEADER, INDEX, SHARD
from solpath.storing.quantized import described, is_quantized
from solpath.storing.writing import contents_of, reader_of, write

_REFUSED = {
    "push_to_hub": "call model.push_to_hub(repo_id) or solpath.push_to_hub",
    "variant": "save every variant to a folder of its own",
    "distributed_checkpoint": "gather the weights and pass them as state_dict",
}
_IGNORED = ("token", "save_peft_format", "save_original_format")


@contained
def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    **options: Any,
) -> None:
    """Write an extracted model into a folder, beside what else is there.

    The files are those of `solpath.save`. They replace older ones, `solpath.json` last.

    Args:
        model: A model from `extract`.
        save_directory: The folder, which is made if there is none.
        is_main_process: False writes nothing.
        state_dict: Tensors to write in place of the model's own, of the same names, shapes and
            dtypes. None writes those of the model.
        push_to_hub: Refused; it is a call of its own.
        max_shard_size: See `solpath.save`.
        options: Other arguments of transformers. Those that change nothing in this format are
            accepted: ``token``, ``save_peft_format``, ``save_original_format``,
            ``safe_serialization=True``.

    Raises:
        ConfigError: An argument asks for what the format does not have, or `state_dict` does not
            fit the model.
        SolpathError: See `solpath.save`.
        FileError: The folder cannot be written.
    """
    _check_options({**options, "push_to_hub": push_to_hub})
    if not is_main_process:
        return
    contents = contents_of(model)
    contents.config["architectures"] = [type(model).__name__]  # as transformers writes it
    if os.path.isabs(str(contents.config.get("_name_or_path", ""))):
        contents.config["_name_or_path"] = ""
    if state_dict is not None:
        _check_state(model, state_dict)
        left_out = {name for name, _ in model.named_buffers()}.difference(state_dict)
        for key, tensor in contents.tensors.items():
            if key not in left_out:
                given = reader_of(key, state_dict, state_dict.__getitem__)
                contents.tensors[key] = replace(tensor, read=given)
    folder = Path(save_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder) as temporary:
            write(contents, temporary, None, max_shard_size)
            for new in temporary.iterdir():
                sync(new)
            for old in folder.iterdir():
                if SHARD.fullmatch(old.name) or old.name in (HEADER, INDEX, GENERATION):
                    old.unlink()
            for new in sorted(temporary.iterdir(), key=lambda file: file.name == HEADER):
                new.replace(folder / new.name)
            sync(folder)
    except OSError as error:
        raise FileError(f"cannot write to {save_directory}: {error}") from error


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _REFUSED:
            if value:
                way = _REFUSED[name]
                raise ConfigError(f"an extracted model is not saved with {name}; {way}.")
        elif name == "safe_serialization":
            if not value:
                raise ConfigError("an extracted model is saved as safetensors; nothing is pickled.")
        elif name not in _IGNORED:
            raise ConfigError(f"save_pretrained of an extracted model takes no {name}.")


def _check_state(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    if wrong := sorted(set(own) ^ set(state_dict)):
        where = "lacks" if wrong[0] in own else "has"
        raise ConfigError(f"state_dict {where} {wrong[0]}, unlike this {type(model).__name__}.")
    for name, tensor in state_dict.items():
        if (tensor.dtype, tensor.shape) != (own[name].dtype, own[name].shape):
            raise ConfigError(
                f"state_dict[{name!r}] is {tensor.dtype} {[*tensor.shape]}, not {own[name].dtype} "
                f"{[*own[name].shape]}."
            )
        kinds = [described(name, t) if is_quantized(t) else None for t in (tensor, own[name])]
        if kinds[0] != kinds[1]:
            raise ConfigError(f"state_dict[{name!r}] is not quantised as the model is.")
