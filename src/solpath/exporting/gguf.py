"""GGUF: one file for llama.cpp, whose architecture ``deci`` takes another width in every layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solpath.errors import ConfigError, ExportError
from solpath.exporting.formats import Format, Load
from solpath.exporting.gguf_origin import write_origin
from solpath.exporting.gguf_reading import (
    FILE,
    check_tokens,
    has_vocabulary,
    open_gguf,
    runtime,
)
from solpath.exporting.gguf_vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from solpath.exporting.widths import dense_width
from solpath.nn.attention import heads_left
from solpath.running.forward import Batch

_CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # what deci can compute
_STATIC = ("default", "linear", "llama3", "yarn")  # scalings of positions that know no length
_TYPES = {"f32": "F32", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}  # option to type of gguf
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_BLOCK, _K_BLOCK = 32, 256  # columns that are quantised together
_LARGEST = 65504.0  # in float16
_MATRICES = {  # of a layer, by their names in GGUF
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer.

    Attributes:
        heads: Number of query heads; 0 if the layer has no attention.
        kv_heads: Number of key-value heads.
        width: Inner width of the MLP.
    """

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its name, its values, its type, and heads whose rows are reordered."""

    name: str
    value: Tensor
    type: str
    heads: int = 0


def check(model: nn.Module) -> None:
    """Raise `ExportError` if ``deci`` cannot compute what a model computes."""
    kind, config = type(model).__name__, _config(model)
    if kind not in _CLASSES or not type(model).__module__.startswith("transformers."):
        raise ExportError(
            f"GGUF is written for {', '.join(_CLASSES)}, not for {kind}: llama.cpp has no graph "
            "for it that takes another width in every layer and that was run. Take another format."
        )
    if config.hidden_act != "silu":
        raise ExportError(f"llama.cpp's deci runs silu in its MLPs, not {config.hidden_act!r}.")
    window = _window(model)
    if window is not None:
        raise ExportError(
            f"llama.cpp's deci has no sliding window, and the model looks back {window} tokens of "
            f"{config.max_position_embeddings}. If your texts stay within {window} tokens, load "
            f"the dense model with sliding_window=None and max_position_embeddings={window}."
        )
    rope = config.rope_parameters["rope_type"]
    if rope not in _STATIC:
        raise ExportError(
            f"positions of type {rope!r} change with the length of the text; GGUF is written for "
            f"{', '.join(_STATIC)}."
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("llama.cpp's deci rotates whole heads, and the model a part of each.")
    known = {id(entry.value) for entry in _entries(model, "f32")} | _dropped(model)
    others = [name for name, value in model.named_parameters() if id(value) not in known]
    if others:
        raise ExportError(f"llama.cpp's deci has no place for {others[0]} ({len(others)} in all).")


def layers_of(model: nn.Module) -> list[Layer]:
    """Return the sizes of all layers.

    Args:
        model: A model of a known class.

    Raises:
        ExportError: ``deci`` cannot hold a width. The message names the layer, the numbers and the
            option of the plan that keeps it from happening.
    """
    layers = [_layer(model, index, block) for index, block in enumerate(_inner(model).layers)]
    if layers and not layers[0].heads:
        raise ExportError(
            "model.layers.0.self_attn is gone, and llama.cpp reads the size of heads from the "
            "first layer; plan with protect=('*layers.0.attention*',)."
        )
    return layers


def _layer(model: nn.Module, index: int, block: Any) -> Layer:
    attention, mlp, head = block.self_attn, block.mlp, dense_width(_config(model))
    name = f"model.layers.{index}"
    groups = attention.num_key_value_groups
    kv_heads = heads_left(attention, _config(model).num_attention_heads // groups)
    qk, vo = attention.k_proj.out_features / kv_heads, attention.v_proj.out_features / kv_heads
    if mlp.down_proj.in_features == 0:
        raise ExportError(
            f"{name}.mlp has no units left, and llama.cpp's deci drops the output of the attention "
            "of such a layer; plan with min_width=1 or more (multiple_of, if that is larger)."
        )
    if vo == 0 and attention.o_proj.bias is None:
        return Layer(0, 0, mlp.down_proj.in_features)
    if qk != head or vo != head:
        raise ExportError(
            f"{name}.self_attn keeps {qk:g} of {head} channels of queries and keys and {vo:g} of "
            "values in each head. llama.cpp's deci wants all channels of a head, since it rotates "
            "whole heads and has one size for queries, keys and values; plan with "
            "protect=('*.attention.*',), or let whole heads leave with whole_groups=True."
        )
    return Layer(kv_heads * groups, kv_heads, mlp.down_proj.in_features)


def write(
    model: nn.Module,
    folder: Path,
    batch: Batch,
    *,
    quantization: str = "f16",
    tokenizer: Any = None,
) -> None:
    """Write ``model.gguf``.

    Args:
        model: The model. It is left untouched.
        folder: The folder.
        batch: Not used.
        quantization: ``"f32"``, ``"f16"``, ``"q8_0"`` or ``"q4_0"``: the type of all matrices.
            Embeddings and output stay at 8 bits with ``"q4_0"``, norms and biases in float32.
        tokenizer: The fast tokenizer of the model. Without it the file takes and gives token
            numbers only.

    Raises:
        ConfigError: The package gguf is missing, or `quantization` is not known.
        ExportError: The weights or the tokenizer cannot be written so. The message says why.
    """
    if find_spec("gguf") is None:
        raise ConfigError("GGUF needs gguf; install it with: pip install 'solpath[gguf]'.")
    import gguf

    _check_quantization(model, quantization)
    vocabulary = None if tokenizer is None else read_vocabulary(tokenizer, _rows(model))
    writer = gguf.GGUFWriter(folder / FILE, "deci")
    try:
        _write_settings(writer, model, quantization, vocabulary)
        entries = list(_entries(model, quantization))
        for entry in entries:
            writer.add_tensor_info(entry.name, *_stored(entry))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(_packed(entry))
    finally:
        writer.close()
    if tokenizer is not None:
        check_tokens(folder, tokenizer)


def _check_quantization(model: nn.Module, quantization: str) -> None:
    """Raise an error if matrices of a model cannot be quantised so."""
    entries = [entry for entry in _entries(model, "f32") if entry.value.dim() == 2]
    columns = {entry.name: entry.value.shape[1] for entry in entries}
    if quantization.lower().startswith(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq")):
        _check_columns(columns, quantization, _K_BLOCK)
        raise ConfigError(
            f"gguf-py does not write {quantization}; export with quantization='f16', then run: "
            f"llama-quantize {FILE} small.gguf {quantization.upper()}"
        )
    if quantization not in _TYPES:
        raise ConfigError(f"quantization must be one of {', '.join(_TYPES)}, got {quantization!r}.")
    if quantization.startswith("q"):
        _check_columns(columns, quantization, _BLOCK)


def _check_columns(columns: dict[str, int], quantization: str, block: int) -> None:
    """Raise `ExportError` unless all matrices have whole blocks of columns."""
    odd = [name for name, count in columns.items() if count % block]
    if odd:
        inner = [name for name in odd if "ffn_down" not in name]
        way = "" if inner else f"plan with multiple_of={block}, or "
        raise ExportError(
            f"{quantization} quantises {block} columns together, and {odd[0]} has "
            f"{columns[odd[0]]}; {way}take quantization='f16'."
        )


def _write_settings(
    writer: Any, model: nn.Module, quantization: str, vocabulary: Vocabulary | None
) -> None:
    """Add all metadata to a writer."""
    import gguf

    config, layers, head = _config(model), layers_of(model), dense_width(_config(model))
    write_origin(writer, model)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(_rows(model))
    writer.add_block_count(len(layers))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([layer.width for layer in layers])
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    scale = _inner(model).rotary_emb.attention_scaling
    if scale != 1.0:
        writer.add_rope_scaling_attn_factors(scale)
    write_vocabulary(writer, vocabulary)


def _entries(model: nn.Module, quantization: str) -> Iterator[_Entry]:
    """Yield all tensors of the file, without copying weights."""
    outer = "q8_0" if quantization == "q4_0" else quantization
    inner = _inner(model)
    head: Any = model.lm_head
    yield _Entry("token_embd.weight", inner.embed_tokens.weight, outer)
    yield _Entry("output_norm.weight", inner.norm.weight, "f32")
    if head.weight is not inner.embed_tokens.weight:
        yield _Entry("output.weight", head.weight, outer)
    factors = _factors(model)
    if factors is not None:
        yield _Entry("rope_freqs.weight", factors, "f32")
    for index, (block, layer) in enumerate(zip(inner.layers, layers_of(model), strict=True)):
        for short, path in (_NORMS | _MATRICES).items():
            if short.startswith("attn") and not layer.heads:
                continue
            module = block.get_submodule(path)
            heads = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(short, 0)
            kind = quantization if short in _MATRICES else "f32"
            yield _Entry(f"blk.{index}.{short}.weight", module.weight, kind, heads)
            if getattr(module, "bias", None) is not None:
                yield _Entry(f"blk.{index}.{short}.bias", module.bias, "f32", heads)


def _dropped(model: nn.Module) -> set[int]:
    """Return the ids of parameters that nothing depends on: those of attentions without values."""
    pairs = zip(_inner(model).layers, layers_of(model), strict=True)
    parts = [[block.self_attn, block.input_layernorm] for block, layer in pairs if not layer.heads]
    return {id(value) for part in parts for module in part for value in module.parameters()}


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Bring the two channels of every rotary couple side by side, where llama.cpp rotates them.

    Args:
        rows: ``[heads * width, ...]``: the rows of a head, first those that come first in their
            couples, then those that come second.
        heads: The number of heads.

    Returns:
        A tensor of the same shape.

    Example:
        >>> interleave(torch.arange(4), heads=1).tolist()
        [0, 2, 1, 3]
    """
    width = rows.shape[0] // heads
    halves = rows.reshape(heads, 2, width // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _factors(model: nn.Module) -> Tensor | None:
    """Return what the wavelength of every rotary couple is multiplied by, or None if by 1."""
    rope, head = _config(model).rope_parameters, dense_width(_config(model))
    if rope["rope_type"] == "default":
        return None
    plain: Tensor = rope["rope_theta"] ** -(torch.arange(0, head, 2).double() / head)
    turned: Tensor = _inner(model).rotary_emb.inv_freq
    return (plain / turned.double().cpu()).float()


def _stored(entry: _Entry) -> tuple[tuple[int, ...], Any, int, Any]:
    """Return the shape, dtype, bytes and type of an entry, as the writer wants them."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[_TYPES[entry.type]]
    columns, block = gguf.GGML_QUANT_SIZES[kind]
    size = entry.value.numel() // columns * block
    return tuple(entry.value.shape), np.dtype(np.float32), size, kind


def _packed(entry: _Entry) -> Any:
    """Return the array of an entry in its type, rows in order."""
    import gguf

    value = entry.value.detach().float().cpu()
    value = interleave(value, entry.heads) if entry.heads else value
    if not value.isfinite().all():
        raise ExportError(f"{entry.name} holds numbers that are not finite.")
    if entry.type != "f32" and value.abs().max() > _LARGEST:
        raise ExportError(
            f"{entry.name} holds {value.abs().max():.3g}, and float16 ends at {_LARGEST:.0f}; "
            "take quantization='f32'."
        )
    array = value.contiguous().numpy()
    return gguf.quantize(array, gguf.GGMLQuantizationType[_TYPES[entry.type]])


def _window(model: nn.Module) -> int | None:
    """Return how many tokens a layer looks back, if that is less than the longest text."""
    config = _config(model)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None)
    slides = window is not None and window < config.max_position_embeddings
    return window if slides and "sliding_attention" in kinds else None


def _config(model: nn.Module) -> Any:
    return model.config


def _inner(model: nn.Module) -> Any:
    return model.model


def _rows(model: nn.Module) -> int:
    return int(_inner(model).embed_tokens.weight.shape[0])


def _loads(model: nn.Module, folder: Path) -> list[Load]:
    code = f"""import llama_cpp

model = llama_cpp.Llama(f"{{folder}}/{FILE}")"""
    found = [Load("llama-cpp-python", code)]
    if has_vocabulary(folder):
        cli = f'llama-cli -m {FILE} -p "Once upon a time"'
        found.insert(0, Load("llama.cpp", cli, "bash"))
    return found


FORMAT = Format(
    name="gguf",
    title="llama.cpp, as GGUF",
    library="gguf",
    loads=_loads,
    check=check,
    write=write,
    open=open_gguf,
    runtime=runtime,
    tolerance=5e-3,
    tolerances={"f32": 1e-4, "q8_0": 1e-1, "q4_0": 5e-1},
    command=f"llama-cli -m {{folder}}/{FILE}",
)
