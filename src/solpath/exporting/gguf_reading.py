"""Run a GGUF file: in llama.cpp where it is installed, else by its graph written in NumPy."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solpath.errors import BatchError, ExportError
from solpath.exporting.formats import Runner
from solpath.running.forward import Batch

FILE = "model.gguf"
"""The only weights of an exported folder."""

_TEXTS = (  # what pre-tokenizers and byte fallbacks disagree about
    "Hello world, how are you?",
    "two  spaces  and\ttabs \n\n\n",
    "I've said 12345.67! YOU'LL see… (really?)",
    "naïve Übergröße, 東京 and 🙂",
    "def f(x):\n    return x[0] ** 2\n",
)


def runtime() -> str:
    """Return what `open_gguf` runs, for people."""
    if find_spec("llama_cpp"):
        return f"llama.cpp of llama-cpp-python {version('llama-cpp-python')} on a CPU"
    return f"llama.cpp's graph in NumPy, by gguf {version('gguf')}; llama.cpp itself was not run"


def open_gguf(folder: Path) -> Runner:
    """Open the file of a folder.

    Args:
        folder: A folder that holds ``model.gguf``.

    Returns:
        A function from a batch of token numbers without padding to logits.
    """
    path = folder / FILE
    if find_spec("llama_cpp"):
        return lambda batch: {"logits": _in_llama_cpp(path, _ids(batch))}
    rows = _in_numpy(path)
    return lambda batch: {"logits": torch.stack([rows(ids) for ids in _ids(batch)])}


def has_vocabulary(folder: Path) -> bool:
    """Return whether the file of a folder can read a prompt.

    Args:
        folder: A folder that holds ``model.gguf``.
    """
    import gguf

    kind = gguf.GGUFReader(folder / FILE).get_field("tokenizer.ggml.model")
    return kind is not None and kind.contents() != "no_vocab"


def check_tokens(folder: Path, tokenizer: Any) -> None:
    """Compare the tokens of llama.cpp, where it is installed, with those of the tokenizer.

    Args:
        folder: A folder that holds ``model.gguf``.
        tokenizer: The tokenizer that it was written with.

    Raises:
        ExportError: A text is split otherwise. The message shows it.
    """
    if not find_spec("llama_cpp"):
        return
    with _opened(folder / FILE, vocab_only=True) as file:
        for text, special in itertools.product(_TEXTS, (False, True)):
            found = file.tokenize(text.encode(), add_bos=special)
            expected = tokenizer(text, add_special_tokens=special)["input_ids"]
            if found != expected:
                raise ExportError(
                    f"llama.cpp splits {text!r} into the tokens {found}, and the tokenizer into "
                    f"{expected}; export without tokenizer=."
                )


def _ids(batch: Batch) -> list[list[int]]:
    """Return the token numbers of all samples."""
    mask = batch.get("attention_mask")
    others = set(batch) - {"input_ids", "attention_mask", "labels"}
    if others or "input_ids" not in batch:
        raise BatchError(f"GGUF takes input_ids alone, and the batch has {', '.join(batch)}.")
    if mask is not None and not mask.bool().all():
        raise BatchError("GGUF is run on texts of one length; give a batch without padding.")
    return batch["input_ids"].tolist()  # type: ignore[no-any-return]


@contextlib.contextmanager
def _opened(path: Path, **options: Any) -> Iterator[Any]:
    """Open a file in llama.cpp while the block runs."""
    import llama_cpp

    try:
        file = llama_cpp.Llama(str(path), verbose=False, **options)
    except ValueError as error:
        raise ExportError(f"llama.cpp does not load the file: {error}") from error
    with contextlib.closing(file):
        yield file


def _in_llama_cpp(path: Path, samples: list[list[int]]) -> Tensor:
    """Return logits ``[samples, tokens, vocabulary]``, with a cache in float32."""
    import llama_cpp

    length, wide = len(samples[0]), llama_cpp.GGML_TYPE_F32
    options = {"n_ctx": length, "n_batch": length, "type_k": wide, "type_v": wide}
    with _opened(path, logits_all=True, **options) as file:
        found = []
        for ids in samples:
            file.reset()
            file.eval(ids)
            found.append(torch.from_numpy(file.scores[:length].copy()))
        return torch.stack(found)


def _in_numpy(path: Path) -> Callable[[list[int]], Tensor]:
    """Return a function from token numbers to logits ``[tokens, vocabulary]``."""
    import gguf
    import numpy as np

    file = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def setting(name: str, default: Any = None) -> Any:
        field = file.get_field(f"deci.{name}")
        return default if field is None else field.contents()

    def weight(name: str, default: Any = 0.0) -> Any:
        tensor = tensors.get(name)
        if tensor is None:
            return default
        return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])

    def linear(states: Any, name: str) -> Any:
        return states @ weight(f"{name}.weight").T + weight(f"{name}.bias")

    def norm(states: Any, name: str) -> Any:
        epsilon = setting("attention.layer_norm_rms_epsilon")
        mean = (states**2).mean(-1, keepdims=True)
        return states / np.sqrt(mean + epsilon) * weight(f"{name}.weight")

    def rotate(states: Any) -> Any:
        """Turn neighbouring channels. ``[tokens, heads, width]`` both ways."""
        width = setting("rope.dimension_count")
        waves = setting("rope.freq_base") ** (np.arange(0, width, 2) / width)
        waves = waves * weight("rope_freqs.weight", 1.0)
        angles = np.arange(len(states))[:, None, None] / waves
        scale = setting("rope.scaling.attn_factor", 1.0)
        cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
        even, odd = states[..., ::2], states[..., 1::2]
        return np.stack((even * cos - odd * sin, even * sin + odd * cos), -1).reshape(states.shape)

    def attention(states: Any, name: str, heads: int, kv_heads: int) -> Any:
        count, width = len(states), setting("attention.key_length")
        query, key, value = (
            linear(states, f"{name}.attn_{part}").reshape(count, -1, width) for part in "qkv"
        )
        query, key = rotate(query), rotate(key)
        key, value = (np.repeat(part, heads // kv_heads, 1) for part in (key, value))
        logits = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(width)
        logits += np.triu(np.full((count, count), -np.inf), 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(count, -1)
        return linear(mixed, f"{name}.attn_output")

    def mlp(states: Any, name: str) -> Any:
        gate = linear(states, f"{name}.ffn_gate")
        inner = gate / (1 + np.exp(-gate)) * linear(states, f"{name}.ffn_up")
        return linear(inner, f"{name}.ffn_down")

    def rows(ids: list[int]) -> Tensor:
        states = weight("token_embd.weight")[ids].astype(np.float64)
        counts = zip(
            setting("attention.head_count"), setting("attention.head_count_kv"), strict=True
        )
        for index, (heads, kv_heads) in enumerate(counts):
            name = f"blk.{index}"
            if heads:
                states = states + attention(
                    norm(states, f"{name}.attn_norm"), name, heads, kv_heads
                )
            states = states + mlp(norm(states, f"{name}.ffn_norm"), name)
        states = norm(states, "output_norm")
        head = "output" if "output.weight" in tensors else "token_embd"
        return torch.from_numpy(linear(states, head).astype(np.float32))

    return rows
