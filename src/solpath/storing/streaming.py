"""Cut a model to a plan: one in memory, or one on disk shard by shard, without loading it.

From disk to disk every weight is read, compared with the plan, turned, cut and written before the
next but one is read. What is written is what `extract` and `save` write, to the byte.
"""

import os
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar, overload

from torch import Tensor, nn

from solpath.arch import is_foreign, type_of
from solpath.errors import ConfigError, UnsupportedModelError
from solpath.files import check_output, new_folder, temporary_folder
from solpath.gguf import is_gguf
from solpath.loading import off_loaded
from solpath.model import extraction
from solpath.model.discovery import survey
from solpath.model.extraction import cut_reader, in_dtype_of
from solpath.model.fingerprint import (
    check_pairs,
    check_same,
    combined,
    fingerprint,
    parameters_of,
    values_digest,
)
from solpath.model.weights import weight_reader
from solpath.planning.plan import EXTRACTED, Plan, check_plan
from solpath.pretrained import Name
from solpath.running.modes import contained
from solpath.storing.writing import Tokenizer, contents_of, save, write

Model = TypeVar("Model", bound=nn.Module)


@overload
def extract(model: Model, plan: Plan, *, check: bool = True) -> Model: ...


@overload
def extract(model: Name, plan: Plan, *, check: bool = True) -> nn.Module: ...


@overload
def extract(
    model: Name,
    plan: Plan,
    *,
    check: bool = True,
    out: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path: ...


@contained
def extract(
    model: nn.Module | Name,
    plan: Plan,
    *,
    check: bool = True,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
) -> nn.Module | Path:
    """Return a copy of `model` that keeps only the units of `plan`, or write it to a folder.

    The copy is used like the original: it has the same forward signature, kinds of outputs,
    `config` and names in its `state_dict`. Layers that keep every unit are copied bit for bit. Its
    attribute ``solpath_plan`` is the plan, and its ``save_pretrained`` does what `save` does.
    `model` is left untouched.

    With `out` neither model is ever loaded: weights are read, cut and written one after the other,
    and a few of the largest are the most that memory holds (a GGUF file is loaded, as its weights
    must be unpacked). The folder is the one that `save` would
    write, and it appears whole or not at all; `load` reads it.

    Args:
        model: The dense model that the plan was made for, or its folder or hub id, which is loaded
            on the CPU.
        plan: From `SolutionPath.plan`.
        check: Whether to compare the model's weights with the plan's fingerprint, and, once for
            every kind of block of a model whose table was registered, the masked block with the one
            that is cut; see `check_table`.
        out: A folder to write, from a folder or hub id. None returns the model.
        tokenizer: With `out`: see `save`.
        overwrite: With `out`: see `save`.
        max_shard_size: With `out`: see `save`.

    Returns:
        A member of the family: a model of its own, on the device of `model`. With `out`, that
        folder.

    Raises:
        FingerprintError: The plan belongs to another model (the message says what differs), or it
            was read from a saved model and lacks the basis of a pair that it cuts.
        BudgetError: The plan keeps a number of bytes, and the model is in another dtype than that
            of the search.
        UnsupportedModelError: The model cannot be cut or was cut already; see `find_pairs`. Or its
            table was registered, and is wrong or could not be checked; see `check_table`.
        FileError: A folder or id was given and cannot be read; see `from_pretrained`. Or `out`
            cannot be written; see `save`.
        ConfigError: The model needs timm, which is not installed, or asks timm for more than a
            model; see `from_pretrained`. `plan` is no plan. Or `out` is given with a model in
            memory, or what belongs to `out` is given without it.
        SolpathError: `out` is given, and `load` could not rebuild the model.
        ModelInUseError: The model is masked or searched, or another thread works on it.

    Example:
        >>> small = solpath.extract(model, path.plan(sparsity=0.5))
        >>> round(small.solpath_plan.achieved.sparsity, 1)
        0.5
        >>> small(**batch).logits.shape == model(**batch).logits.shape
        True
        >>> model.save_pretrained("dense")
        >>> folder = solpath.extract("dense", path.plan(sparsity=0.5), out="half")
        >>> torch.equal(solpath.load(folder)(**batch).logits, small(**batch).logits)
        True
    """
    if out is None:
        if tokenizer is not None or overwrite or max_shard_size != "5GB":
            raise ConfigError(
                "tokenizer, overwrite and max_shard_size are for out=; pass a folder."
            )
        return extraction.extract(model, plan, check=check)
    check_plan(plan)
    if isinstance(model, nn.Module):
        raise ConfigError(
            "out= cuts a folder or hub id without loading it, and this model is in memory; call "
            "save(extract(model, plan), folder)."
        )
    check_output(out, overwrite=overwrite)
    if is_gguf(model):
        small = extraction.extract(model, plan, check=check)
        save(small, out, tokenizer=tokenizer, overwrite=overwrite, max_shard_size=max_shard_size)
        return Path(out)
    with new_folder(out, overwrite=overwrite) as temporary, temporary_folder(temporary) as scratch:
        _stream(model, plan, check, temporary, scratch, tokenizer, max_shard_size)
    return Path(out)


def _stream(
    name: Name,
    plan: Plan,
    check: bool,
    folder: Path,
    scratch: Path,
    tokenizer: Tokenizer | None,
    max_shard_size: int | str,
) -> None:
    """Write the files of the smaller model into an empty folder."""
    from accelerate.hooks import remove_hook_from_submodules

    dense: nn.Module = off_loaded(name, scratch)
    read = weight_reader(dense)
    remove_hook_from_submodules(dense)
    pairs, _ = survey(dense)
    check_pairs(plan.pairs, pairs)
    if not check:
        return _write(dense, plan, read, folder, tokenizer, max_shard_size)
    _check_table(dense, name)
    if plan.fingerprint.version == 1:
        check_same(plan.fingerprint, fingerprint(dense, pairs, version=1, read=read))
    digests: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(1) as pool:
        noting = _noting(read, digests, {*chain(*parameters_of(dense, pairs).values())}, pool)
        sized = in_dtype_of(dense, plan)
        _write(dense, sized, noting, folder, tokenizer, max_shard_size)
    if plan.fingerprint.version > 1:
        found = combined(dense, pairs, {name: digest.result() for name, digest in digests.items()})
        check_same(plan.fingerprint, found)


def _write(
    dense: nn.Module,
    plan: Plan,
    read: Callable[[str], Tensor],
    folder: Path,
    tokenizer: Tokenizer | None,
    max_shard_size: int | str,
) -> None:
    read = cut_reader(dense, plan, read)
    shapes = replace(plan, basis={}, dropped_rotations=())  # which a rotation leaves as they are
    small = extraction.extract(dense, shapes, check=False)
    setattr(small, EXTRACTED, plan)
    write(contents_of(small, read), folder, tokenizer, max_shard_size)


def _noting(
    read: Callable[[str], Tensor],
    digests: dict[str, Future[str]],
    names: Collection[str],
    pool: ThreadPoolExecutor,
) -> Callable[[str], Tensor]:
    """Return a reader that has some weights digested as they pass, one at a time."""

    def noting(name: str) -> Tensor:
        value = read(name)
        if name in names:
            for last in [*digests.values()][-1:]:
                last.result()
            digests[name] = pool.submit(values_digest, value)
        return value

    return noting


def _check_table(model: nn.Module, name: Name) -> None:
    """Refuse a model whose table was registered, which only a model with weights can check."""
    if is_foreign(type_of(model)):
        raise UnsupportedModelError(
            f"the table of model_type {type_of(model)!r} was registered, and must be checked on a "
            f"model in memory; call save(extract({os.fspath(name)!r}, plan), folder), or check it "
            "with check_table and pass check=False."
        )
