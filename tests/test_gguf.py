"""GGUF files by name: the floats that were written, no setting passed over, nothing else read."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers

import solpath
from solpath.cli.main import run
from solpath.errors import ConfigError, FileError, UnsupportedModelError
from solpath.pretrained import from_pretrained, load_processor

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
GEMMA = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
GEMMA |= {"sliding_window": 4, "query_pre_attn_scalar": 256}
CASES = {
    "llama": ("LlamaForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", GEMMA),
}
WORDS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "▁"]
WORDS += [f"w{i}" for i in range(64 - len(WORDS))]


def build(kind: str, **changes: object):
    name, sizes = CASES[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = cls(cls.config_class(**sizes | ids | changes)).eval()
    with torch.no_grad():  # norms start at 1
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Lay the rotary couples of a projection out as llama.cpp does, side by side."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(file, model, kind, *, settings=(), tensors=(), packed=(), leave_out=()):
    """Write a model as llama.cpp's converter does.

    Args:
        file: The file.
        model: The model.
        kind: What llama.cpp calls its architecture.
        settings: More settings, of the architecture, by name.
        tensors: More tensors by name.
        packed: GGUF names of the tensors that are written in blocks of 8-bit numbers.
        leave_out: GGUF names of tensors that are not written.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    else:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    for name, value in dict(settings).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{kind}.{name}", value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(WORDS)
    writer.add_token_scores([0.0] * len(WORDS))
    writer.add_token_types([2, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        known = f"{names.get_name(stem)}.{suffix}"
        if known in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads
            value = interleaved(value, heads)
        if kind == "gemma3" and stem.endswith("norm"):
            value = value + 1
        data = value.numpy()
        if known in packed:
            eight = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(known, gguf.quantize(data, eight), raw_dtype=eight)
        else:
            writer.add_tensor(known, data)
    for name, data in dict(tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def llama(tmp_path):
    return write(tmp_path / "llama.gguf", build("llama"), "llama")


def rows(count: int = 6):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 64, (4, 8), generator=generator)} for _ in range(count)]


@pytest.mark.parametrize("kind", CASES)
def test_the_floats_are_those_that_were_written(kind, tmp_path):
    model = build(kind)
    file = write(tmp_path / "model.gguf", model, kind)
    loaded, batch = from_pretrained(file), rows()[0]
    assert type(loaded) is type(model)
    assert (loaded.dtype, loaded.training) == (torch.float32, False)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    off = 1e-6 if kind == "gemma3" else 0  # its norms are written with 1 added
    for name, value in loaded.state_dict().items():
        assert (value - expected[name]).abs().max() <= off, name
    with torch.no_grad():
        difference = loaded(**batch).logits - model(**batch).logits
    assert difference.abs().max() <= 1e-4
    empty = from_pretrained(file, device="meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert solpath.find_pairs(empty) == solpath.find_pairs(file) == solpath.find_pairs(model)
    assert from_pretrained(file, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_packed_weights_become_floats_and_nothing_says_that_they_are_packed(tmp_path):
    model = build("llama")
    file = write(tmp_path / "packed.gguf", model, "llama", packed=["blk.0.ffn_gate.weight"])
    loaded = from_pretrained(file)
    written = model.model.layers[0].mlp.gate_proj.weight.detach()
    eight = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.dequantize(gguf.quantize(written.numpy(), eight), eight)
    found = loaded.model.layers[0].mlp.gate_proj.weight
    assert np.array_equal(found.detach().numpy(), expected)
    assert not np.array_equal(expected, written.numpy())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert "quantization_config" not in loaded.config.to_dict()
    assert not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization" not in (tmp_path / "dense" / "config.json").read_text()
    again = from_pretrained(tmp_path / "dense").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in loaded.state_dict().items())


def test_from_search_to_a_folder_that_loads(llama, tmp_path):
    config = solpath.SearchConfig(steps=4, scale_batches=2)
    path = solpath.search(llama, rows(), config, progress=False)
    small = solpath.extract(llama, path.plan(sparsity=0.4))
    solpath.save(small, tmp_path / "small", tokenizer=load_processor(llama))
    loaded, batch = solpath.load(tmp_path / "small"), rows()[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, small(**batch).logits)
    stored = json.loads((tmp_path / "small" / "config.json").read_text())
    assert stored["quantization_config"]["quant_method"] == "solpath"
    assert "quantization_config" not in loaded.config.to_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert tokenizer("a b").input_ids == load_processor(llama)("a b").input_ids


def test_what_transformers_left_in_a_model_of_its_own_is_not_saved(llama, tmp_path):
    loader = transformers.LlamaForCausalLM
    model = loader.from_pretrained(llama.parent, gguf_file=llama.name).eval()
    assert model.config.quantization_config.quant_method == "gguf"
    path = solpath.baselines.magnitude(model, rows())
    small = solpath.extract(model, path.plan(sparsity=0.4))
    small.save_pretrained(tmp_path / "small")
    for read in (solpath.load, loader.from_pretrained):
        loaded = read(tmp_path / "small")
        assert "quantization_config" not in loaded.config.to_dict()
        assert not getattr(loaded, "is_quantized", False)
        with torch.no_grad():
            assert torch.equal(loaded(**rows()[0]).logits, small(**rows()[0]).logits)


def test_the_command_line_takes_a_file(llama, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("\n".join(["a b c d e f g h " * 16] * 40))
    text, out = ["--text", str(tmp_path / "texts.txt")], tmp_path / "path"
    assert run(["inspect", str(llama), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 6
    arguments = ["search", str(llama), "--out", str(out), "--steps", "3", *text]
    assert run(arguments) == 0
    small = str(tmp_path / "small")
    assert run(["extract", str(llama), str(out), "--out", small, "--sparsity", "0.4"]) == 0
    assert (tmp_path / "small" / "tokenizer.json").exists()
    capsys.readouterr()
    assert run(["eval", small, "--reference", str(llama), "--json", *text]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]


def test_the_tokenizer_is_the_one_in_the_file(llama):
    other = transformers.ByT5Tokenizer()
    other.save_pretrained(llama.parent)
    (llama.parent / "tokenizer.json").write_text("{}")
    tokenizer = load_processor(llama)
    assert tokenizer("ab").input_ids == [1, WORDS.index("▁"), WORDS.index("a"), WORDS.index("b")]
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<s>", "</s>", 64)


def test_nothing_beside_the_file_is_read(llama):
    beside = {"adapter_config.json": {"base_model_name_or_path": "nobody/nothing"}}
    beside |= {"config.json": {"model_type": "bert", "auto_map": {"AutoModel": "evil.Evil"}}}
    for name, value in beside.items():
        (llama.parent / name).write_text(json.dumps(value))
    assert type(from_pretrained(llama)) is transformers.LlamaForCausalLM


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_positions_that_llama_3_scales(tmp_path):
    model = build("llama", head_dim=32, rope_parameters=LLAMA3)
    rotary = model.model.rotary_emb
    plain = 1 / 500_000 ** (torch.arange(0, 32, 2) / 32)
    factors = (plain / rotary.inv_freq).numpy()
    assert factors[0] == 1 < factors[8] < factors[-1] == 32
    file = write(tmp_path / "l.gguf", model, "llama", tensors={"rope_freqs.weight": factors})
    loaded, batch = from_pretrained(file), rows()[0]
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, rotary.inv_freq)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    loaded.save_pretrained(tmp_path / "dense")
    again = from_pretrained(tmp_path / "dense")
    assert torch.equal(again.model.rotary_emb.inv_freq, loaded.model.rotary_emb.inv_freq)


def test_positions_that_gemma_3_scales(tmp_path):
    types = ["sliding_attention"] * 5 + ["full_attention"]
    model = build("gemma3", rope_parameters=LINEAR, layer_types=types, num_hidden_layers=6)
    settings = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    loaded = from_pretrained(write(tmp_path / "g.gguf", model, "gemma3", settings=settings))
    assert loaded.config.layer_types == types
    batch = rows()[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, {}, r"scaling\.type = 'yarn'"),
        ({"attention.scale": 0.3}, {}, r"llama\.attention\.scale = 0\.3"),
        ({"attention.sliding_window": 16.0}, {}, r"sliding_window = 16"),
        ({}, {"rope_freqs.weight": np.float32([1, 1, 2, 8])}, r"another way than Llama 3"),
        ({}, {"rope_factors_long.weight": np.ones(4, np.float32)}, r"rope_factors_long.*rotary"),
        ({}, {"blk.0.attn_q.bias": np.ones(32, np.float32)}, r"holds \d+ numbers"),
    ],
)
def test_what_transformers_passes_over_is_refused(settings, tensors, words, tmp_path):
    file = tmp_path / "model.gguf"
    write(file, build("llama"), "llama", settings=settings, tensors=tensors)
    with pytest.raises(UnsupportedModelError, match=rf"{words}.*checkpoint that it was made from"):
        from_pretrained(file)


def test_a_scale_of_attention_that_no_file_states_is_refused(tmp_path):
    narrow = transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**(GEMMA | {"head_dim": 8, "query_pre_attn_scalar": 16}))
    )
    with pytest.raises(UnsupportedModelError, match="scale of the attention"):
        from_pretrained(write(tmp_path / "model.gguf", narrow, "gemma3"))


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path):
    file = tmp_path / "model.gguf"
    write(file, build("llama"), "llama", leave_out=["blk.1.ffn_up.weight"])
    with pytest.raises(UnsupportedModelError, match=r"holds \d+ numbers"):
        from_pretrained(file)


@pytest.mark.parametrize("kind", ["mamba", "made-up"])
def test_an_architecture_without_a_table_is_refused_before_weights_are_read(kind, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
    writer.add_token_list(WORDS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=kind):
        from_pretrained(tmp_path / "model.gguf")


def test_damaged_files_are_named(llama, tmp_path):
    data = llama.read_bytes()
    file = tmp_path / "damaged.gguf"
    huge = struct.pack("<Q", 2**63 - 1)
    for damaged, words in (
        (data[:-1], r"cut off: it has \d+ bytes, and its tensors end at \d+"),
        (data[:1000], "ends after 1000 bytes, within its header"),
        (data[:7], "ends after 7 bytes"),
        (b"", "ends after 0 bytes"),
        (b"PK\x03\x04" + data[4:], "does not start with GGUF"),
        (data[:8] + huge + data[16:], "within its header|unknown kind|codec"),
        (data[:16] + huge + data[24:], "within its header|unknown kind|codec"),
        (data[:24] + huge + data[32:], "within its header"),
    ):
        file.write_bytes(damaged)
        for read in (from_pretrained, load_processor, solpath.find_pairs):
            with pytest.raises(FileError, match=rf"damaged\.gguf.*({words})"):
                read(file)


def test_files_that_lead_elsewhere_or_nowhere(llama, tmp_path):
    (tmp_path / "inside").mkdir()
    link = tmp_path / "inside" / "link.gguf"
    link.symlink_to(llama)
    for read in (from_pretrained, load_processor):
        with pytest.raises(FileError, match="leads out of the folder"):
            read(link)
        with pytest.raises(FileError, match=r"no such file.*hf download"):
            read(tmp_path / "nothing.gguf")


def test_the_extra_is_named(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'solpath\[gguf\]'"):
        from_pretrained(llama)
