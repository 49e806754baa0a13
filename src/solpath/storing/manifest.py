"""The manifest of a saved model: the names of its files, and the checks of `solpath.json`.

The fields of `solpath.json` are described in docs/file-formats.md.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solpath.arch.building import CONSTRUCTOR_OPTIONS
from solpath.errors import FileError
from solpath.holding import EXTRACTED_FILE
from solpath.planning.plan import Plan
from solpath.reading import (
    DTYPES,
    Header,
    check_format,
    check_seal,
    file_in,
    read_header,
    read_json,
)
from solpath.storing.quantized import check_description

FORMAT, FORMAT_VERSION = "solpath.model", 2
HEADER, CONFIG, GENERATION = EXTRACTED_FILE, "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
ATTENTION = ("sdpa", "eager")
"""The attention implementations that can be stored. Any other is stored as the first."""
EXPERTS = ("grouped_mm", "batched_mm", "eager")
"""The ways to run experts that can be stored. Any other is stored as the first."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FLOATS = {str(dtype).removeprefix("torch.") for dtype in DTYPES if dtype.is_floating_point}


def check_manifest(file: Path, head: Mapping[str, Any]) -> Plan:
    """Check every field of `solpath.json` and return the plan in it.

    Args:
        file: The file that `head` was read from, for the messages.
        head: The content of the file.

    Raises:
        FileError: A field is missing, has a wrong value, or does not fit the checksum.
    """
    check_format(file, head, FORMAT, FORMAT_VERSION)
    texts, maps = ("class", "model_type", "dtype", "attention"), ("options", "digests", "plan")
    for names, kind in ((texts, str), (maps, dict)):
        for name in names:
            if not isinstance(head.get(name), kind):
                raise FileError(f"{file}: {name} is missing or not a {kind.__name__}.")
    check_seal(file, head)
    named = (("dtype", _FLOATS), ("attention", ATTENTION), ("experts", EXPERTS))
    for name, allowed in named:
        if name in head and head[name] not in allowed:
            raise FileError(f"{file}: {name} is {head[name]!r}, not one of {sorted(allowed)}.")
    for name, value in head["options"].items():
        if name not in CONSTRUCTOR_OPTIONS or not isinstance(value, bool):
            raise FileError(f"{file}: options has {name!r}: {value!r}.")
    for name, digest in head["digests"].items():
        if name not in (CONFIG, GENERATION, INDEX) and not SHARD.fullmatch(name):
            raise FileError(f"{file}: digests names {name!r}, which is no file of this format.")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise FileError(f"{file}: digests[{name!r}] is not a SHA-256.")
    quantized = head.get("quantized", {})
    if not isinstance(quantized, dict):
        raise FileError(f"{file}: quantized is not a dict.")
    for name, description in quantized.items():
        try:
            check_description(description)
        except ValueError as error:
            raise FileError(f"{file}: quantized[{name!r}]: {error}.") from error
    if CONFIG not in head["digests"]:
        raise FileError(f"{file}: digests does not name {CONFIG}.")
    try:
        plan = Plan.from_dict(head["plan"])
        if plan.fingerprint.architecture != head["class"]:
            raise ValueError(f"fingerprint.architecture is not {head['class']}")
        dict(plan.fingerprint.digests)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise FileError(f"{file}: plan: {error}") from error
    return plan


def read_headers(folder: Path, digests: Mapping[str, str]) -> dict[str, Header]:
    """Return the headers of the weight files, by file name.

    Args:
        folder: The folder of the model.
        digests: The checked digests of `solpath.json`, by file name.

    Raises:
        FileError: A header cannot be read, or the digests, the index and the files name different
            files or tensors.
    """
    shards = sorted(name for name in digests if SHARD.fullmatch(name))
    if INDEX not in digests:
        if shards != [WEIGHTS]:
            raise FileError(f"{folder / HEADER}: digests names neither {WEIGHTS} nor {INDEX}.")
        return {WEIGHTS: read_header(file_in(folder, WEIGHTS))}
    index = file_in(folder, INDEX)
    places = read_json(index, sha256=digests[INDEX]).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise FileError(f"{index}: weight_map is missing or does not map names to files.")
    if wrong := sorted(set(places.values()) ^ set(shards)):
        raise FileError(
            f"{index}: weight_map and the digests in {HEADER} differ in the file {wrong[0]!r}."
        )
    headers = {shard: read_header(file_in(folder, shard)) for shard in shards}
    for shard, header in headers.items():
        if wrong := sorted(set(header) ^ {key for key, place in places.items() if place == shard}):
            raise FileError(f"{folder / shard}: tensor {wrong[0]!r} is not where weight_map says.")
    return headers
