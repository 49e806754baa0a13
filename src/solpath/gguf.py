"""Vet a GGUF file and what transformers makes of it, before its weights are read.

transformers knows the sizes of an architecture's GGUF files, but passes over settings that it has
no name for, such as the scaling of rotary positions. The model would load and be another one.
"""

import contextlib
import math
import os
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from solpath.errors import ConfigError, FileError, UnsupportedModelError
from solpath.reading import file_in, opened

_WAY_OUT = "load the checkpoint that it was made from, which has a config.json, instead"
_SAME = {  # setting of a file to its names in configurations
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}
_NEUTRAL = {  # setting of a file that transformers does not read to the values that change nothing
    "attention.scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.type": ("none", "linear"),
}
_LLAMA3, _PHI3 = "rope_freqs.weight", "rope_factors_long.weight"  # tensors that scale positions
_WAVES = {  # of all versions of Llama 3
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_CODES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9  # kinds of values beside the numbers above
_UNEQUAL_SCALES = {"gemma2": 46, "gemma3": 62}  # blocks of those whose scale no file states


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says about itself.

    Attributes:
        path: The file.
        architecture: What llama.cpp calls the architecture, such as ``"llama"``.
        settings: Settings of the architecture by name, without the architecture before it.
        shapes: Name to shape of every tensor.
        factors: What the wavelengths of rotary positions are multiplied by, in Llama 3; else empty.
        general: What the file says of itself, such as its licence, without ``general.`` before it.
    """

    path: Path
    architecture: str
    settings: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    factors: tuple[float, ...] = ()
    general: dict[str, Any] = field(default_factory=dict)


def is_gguf(name: object) -> bool:
    """Return whether a name is that of a GGUF file, not of a folder."""
    path = Path(str(name))
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and check that every tensor lies inside the file.

    Args:
        path: The file.

    Raises:
        FileError: There is no such file, it leads out of its folder, or it is damaged or truncated.
        ConfigError: The package gguf is missing, with which transformers reads weights.
    """
    if not path.exists():
        raise FileError(
            f"{path}: no such file; of a GGUF file on the Hub, download it first "
            "(hf download owner/name file.gguf)."
        )
    if find_spec("gguf") is None:
        raise ConfigError(f"{path} needs gguf; install it with: pip install 'solpath[gguf]'.")
    with opened(file_in(path.parent, path.name)) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        try:
            return _header(path, _Cursor(stream, size))
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            reason = f"unknown kind {error}" if isinstance(error, KeyError) else str(error)
            raise FileError(f"{path} is no GGUF file, or is damaged: {reason}.") from error


class _Cursor:
    """Reads one value of a GGUF header after the other, and none from beyond the file's end."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self.size = stream, size

    @property
    def place(self) -> int:
        return self._stream.tell()

    def bytes(self, count: int) -> bytes:
        self._check(count)
        return self._stream.read(count)

    def skip(self, count: int) -> None:
        self._check(count)
        self._stream.seek(count, os.SEEK_CUR)

    def _check(self, count: int) -> None:
        if count > self.size - self.place:
            raise ValueError(f"it ends after {self.size} bytes, within its header")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.bytes(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        """Return a number or a text. An array is passed over, and None returned."""
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            return self.number(_CODES[kind])
        inner, count = self.number("I"), self.number("Q")
        if inner == _TEXT:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            self.skip(count * struct.calcsize(_CODES[inner]))
        return None


def _header(path: Path, cursor: _Cursor) -> GgufFile:
    from gguf import GGML_QUANT_SIZES

    if cursor.bytes(4) != b"GGUF" or cursor.number("I") not in (2, 3):
        raise ValueError("it does not start with GGUF and version 2 or 3")
    tensors, settings = cursor.number("Q"), cursor.number("Q")
    found = {cursor.text(): cursor.value(cursor.number("I")) for _ in range(settings)}
    architecture = str(found["general.architecture"])
    shapes, starts, end = {}, {}, 0
    for _ in range(tensors):
        name, dims = cursor.text(), cursor.number("I")
        shapes[name] = tuple(cursor.number("Q") for _ in range(dims))
        in_block, block = GGML_QUANT_SIZES[cursor.number("I")]
        starts[name] = cursor.number("Q")
        end = max(end, starts[name] + math.prod(shapes[name]) // in_block * block)
    aligned = found.get("general.alignment", 32)
    first = math.ceil(cursor.place / aligned) * aligned
    if shapes and first + end > cursor.size:
        raise ValueError(
            f"it was cut off: it has {cursor.size} bytes, and its tensors end at {first + end}"
        )
    factors: tuple[float, ...] = ()
    if _LLAMA3 in shapes:
        cursor.skip(first + starts[_LLAMA3] - cursor.place)
        factors = tuple(cursor.number("f") for _ in range(math.prod(shapes[_LLAMA3])))
    own, general = (
        {key.removeprefix(start): v for key, v in found.items() if key.startswith(start)}
        for start in (f"{architecture}.", "general.")
    )
    return GgufFile(path, architecture, own, shapes, factors, general)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[dict[str, Any]]:
    """Put a link to a GGUF file into a folder of its own while the block runs.

    transformers reads adapters, tokenizers and templates that lie beside the file, as if they
    belonged to it.

    Args:
        path: The file.

    Yields:
        The arguments that transformers' loaders find the file by.
    """
    with tempfile.TemporaryDirectory(prefix="solpath-gguf-") as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        yield {
            "pretrained_model_name_or_path": folder,
            "gguf_file": path.name,
            "local_files_only": True,
        }


def check_known(file: GgufFile) -> None:
    """Raise `UnsupportedModelError` if transformers cannot read files of this architecture."""
    old: Any = import_module("transformers.integrations")
    new: Any = import_module("transformers.integrations.gguf")
    known = {_plain(name) for name in (*old.GGUF_CONFIG_MAPPING, *new.GGUF_CONFIG_ARCHS)}
    if _plain(file.architecture) not in known | {"t5encoder"}:
        raise UnsupportedModelError(
            f"{file.path}: transformers cannot read GGUF files of architecture "
            f"{file.architecture!r}; {_WAY_OUT}."
        )


def scale_positions_(file: GgufFile, config: Any) -> None:
    """Write into a configuration how a file scales rotary positions, which transformers leaves out.

    Args:
        file: The file.
        config: The configuration that transformers made of it, which is changed.

    Raises:
        UnsupportedModelError: The factors of the file are not those of a Llama 3.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    part = rope.get("full_attention", rope)  # windows of Gemma 3 are not scaled
    if file.settings.get("rope.scaling.type") == "linear":
        part |= {"rope_type": "linear", "factor": file.settings["rope.scaling.factor"]}
    if file.factors:
        part |= {"rope_type": "llama3", "factor": max(file.factors)} | _WAVES
        usual = _llama3_factors(part["rope_theta"], len(file.factors), part["factor"])
        if not all(map(_near, file.factors, usual)):
            raise UnsupportedModelError(
                f"{file.path}: {_LLAMA3} scales rotary positions in another way than Llama 3 does; "
                f"{_WAY_OUT}."
            )


def _llama3_factors(theta: float, couples: int, factor: float) -> list[float]:
    """Return what a Llama 3 multiplies its wavelengths by: long ones, between, and short ones."""
    found = []
    for i in range(couples):
        turns = _WAVES["original_max_position_embeddings"] / (2 * math.pi * theta ** (i / couples))
        low, high = _WAVES["low_freq_factor"], _WAVES["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def check_read_whole(file: GgufFile, config: Any, model: nn.Module) -> None:
    """Refuse a file with settings or tensors that did not find their place in a model.

    Args:
        file: The file.
        config: The configuration that transformers made of it.
        model: The model of that configuration. Its weights are not looked at.

    Raises:
        UnsupportedModelError: The message names the setting and its value, or the numbers.
    """

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{file.path}: transformers does not read {what}, so another model would be loaded; "
            f"{_WAY_OUT}."
        )

    for name, value in file.settings.items():
        if not _agrees(name, value, config):
            raise refuse(f"{file.architecture}.{name} = {value!r}")
    if _PHI3 in file.shapes:
        raise refuse(f"{_PHI3}, which scales rotary positions")
    scale = getattr(config, "query_pre_attn_scalar", None)
    unequal = file.settings.get("block_count") == _UNEQUAL_SCALES.get(file.architecture, -1)
    if scale is not None and (unequal or scale != config.head_dim):
        raise refuse("the scale of the attention, which the file does not state")
    sizes = {name: math.prod(shape) for name, shape in file.shapes.items()}
    sizes.pop(_LLAMA3, None)
    if config.tie_word_embeddings:  # files of Falcon and BLOOM hold it twice
        sizes.pop("output.weight", None)
    stored = sum(sizes.values())
    expected = sum(parameter.numel() for parameter in model.parameters())
    if stored != expected:
        raise refuse(
            f"all tensors: the file holds {stored} numbers, and the {type(model).__name__} of its "
            f"settings {expected}"
        )


def _agrees(name: str, value: Any, config: Any) -> bool:
    """Return whether a setting of a file is what a configuration says, or changes nothing."""
    if name in _NEUTRAL:
        return value in _NEUTRAL[name]
    if name in _SAME:
        found = [getattr(config, key) for key in _SAME[name] if getattr(config, key, None)]
        return any(_near(value, one) for one in found) or not value
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    if name == "rope.freq_base":
        return any(_near(value, part.get("rope_theta")) for part in parts)
    if name == "rope.dimension_count":
        heads = getattr(config, "num_attention_heads", 1)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return any(_near(value, width * part.get("partial_rotary_factor", 1.0)) for part in parts)
    return True


def _near(value: Any, other: Any) -> bool:
    numbers = isinstance(value, int | float) and isinstance(other, int | float)
    return numbers and math.isclose(value, other, rel_tol=1e-5)


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "")
