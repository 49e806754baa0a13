"""What folders hold that solpath and transformers write, told by a file in each of them."""

import os

from solpath.errors import FileError

PATH, EXTRACTED, FAMILY, DENSE = "a path", "an extracted model", "a family", "a dense model"
PATH_FILE, EXTRACTED_FILE, FAMILY_FILE = "path.json", "solpath.json", "family.json"
SEARCH_STATE, TUNE_STATE = "search.safetensors", "tune.safetensors"
MARKS = frozenset({PATH_FILE, EXTRACTED_FILE, FAMILY_FILE, SEARCH_STATE, TUNE_STATE})
"""Files by which a folder that solpath wrote is recognised; only such a folder is replaced."""

_KINDS = {
    PATH_FILE: PATH,
    EXTRACTED_FILE: EXTRACTED,
    FAMILY_FILE: FAMILY,
    "config.json": DENSE,
}


def holds(folder: str | os.PathLike[str]) -> str | None:
    """Return what a folder holds, in words; None for anything else, and for no folder.

    Args:
        folder: The folder.

    Example:
        >>> path.save("found")
        >>> holds("found"), holds("nowhere")
        ('a path', None)
    """
    found = (kind for name, kind in _KINDS.items() if os.path.isfile(os.path.join(folder, name)))
    return next(found, None)


def check_holds(folder: str | os.PathLike[str], file: str, advice: str) -> None:
    """Raise `FileError` unless a folder is of the kind that a file stands for.

    Args:
        folder: The folder.
        file: The file by which the kind is known, such as ``"path.json"``.
        advice: What to give instead, as a clause.
    """
    if os.path.lexists(os.path.join(folder, file)):
        return
    if not os.path.isdir(folder):
        missing = "is a file" if os.path.exists(folder) else "does not exist"
        raise FileError(f"the folder {os.fspath(folder)} {missing}; {advice}.")
    found = holds(folder)
    held = f"holds {found}, not" if found else "does not hold"
    raise FileError(
        f"{os.fspath(folder)} {held} {_KINDS[file]} (there is no {file} in it); {advice}."
    )
