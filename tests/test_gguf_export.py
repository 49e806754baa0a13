"""What is exported to GGUF is the model, in llama.cpp where it is installed and by its graph."""

import json

import gguf
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from torch import nn

import solpath
from conftest import build
from plans import heads_plan, plan_of
from solpath.errors import BatchError, ConfigError, ExportError
from solpath.exporting import gguf as exporting
from solpath.exporting import gguf_reading
from solpath.exporting.export import RECORD, export
from solpath.exporting.gguf_vocabulary import read_vocabulary
from solpath.model.discovery import find_pairs

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 90}
SIZES |= {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 128}
WIDTHS = (96, 32, 64)  # of the MLPs


def rope(kind, **others):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **others}}


WAVES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 8}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("Llama", rope("llama3", original_max_position_embeddings=32, **WAVES)),
    "linear": ("Llama", rope("linear")),
    "yarn": ("Llama", rope("yarn", original_max_position_embeddings=32)),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
}


def dense(label, **changes):
    """A model whose layers and biases matter to its outputs."""
    family, settings = MODELS[label]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | settings | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(0, 0.5)
            else:
                value.mul_(3 if value.dim() == 2 else torch.rand_like(value) + 0.5)
    return model


def cut(model, **kept):
    """The model with MLPs of `WIDTHS`; `kept` names other widths by the end of a pair's name."""
    widths = []
    for pair in find_pairs(model):
        width = WIDTHS[int(pair.name.split(".")[2]) % 3] if "mlp" in pair.name else pair.width
        mine = [w for end, w in kept.items() if pair.name.endswith(end.replace("__", "."))]
        widths.append(mine[0] if mine else width)
    return solpath.extract(model, plan_of(model, widths))


@pytest.fixture(params=["llama.cpp", "numpy"])
def reader(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(gguf_reading, "find_spec", lambda name: None)
    else:
        pytest.importorskip("llama_cpp")
    return request.param


def fields(folder):
    file = gguf.GGUFReader(folder / gguf_reading.FILE)
    return {name: field.contents() for name, field in file.fields.items()}


def weights(folder):
    file = gguf.GGUFReader(folder / gguf_reading.FILE)
    return {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in file.tensors
    }


@pytest.mark.parametrize("label", MODELS)
def test_exported_equals_the_cut_model(label, tmp_path, reader):
    model = cut(dense(label))
    ids = torch.randint(90, (1, 40))
    done = export(model, tmp_path / "out", "gguf", quantization="f32", batch={"input_ids": ids})
    assert max(row.difference for row in done.parity) < 1e-5
    named = json.loads((done.folder / RECORD).read_text())["runtime"]
    assert ("was not run" in named) == (reader == "numpy")
    known = fields(done.folder)
    assert known["deci.feed_forward_length"] == [*WIDTHS]
    assert known["deci.attention.head_count_kv"] == [2, 2, 2]
    assert ("output.weight" in weights(done.folder)) == (label != "llama tied")


@pytest.mark.parametrize(
    ("label", "function", "fault"),
    [
        ("llama", "interleave", lambda rows, heads: rows),
        ("llama 3", "_factors", lambda model: None),
        ("yarn", "_factors", lambda model: None),
    ],
)
def test_a_file_of_another_model_is_not_kept(label, function, fault, tmp_path, monkeypatch, reader):
    """The comparison sees rows in the wrong order and positions that are not scaled."""
    monkeypatch.setattr(exporting, function, fault)
    ids = torch.randint(90, (1, 40))
    with pytest.raises(ExportError, match="differs by"):
        export(cut(dense(label)), tmp_path / "out", "gguf", batch={"input_ids": ids})
    assert not (tmp_path / "out").exists()


def test_all_tensors_are_read_back_exactly(tmp_path):
    model = cut(dense("llama biases"))
    export(model, tmp_path / "out", "gguf", quantization="f32")
    found, own = weights(tmp_path / "out"), model.state_dict()
    assert len(found) == len(own)
    names = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    for layer in range(3):
        for short, path in names.items():
            for end in ("weight", "bias"):
                expected = own[f"model.layers.{layer}.{path}.{end}"]
                assert torch.equal(found[f"blk.{layer}.{short}.{end}"], expected)
        for short, heads in (("q", 4), ("k", 2)):
            rows = own[f"model.layers.{layer}.self_attn.{short}_proj.weight"].view(heads, 16, 64)
            stored = found[f"blk.{layer}.attn_{short}.weight"].view(heads, 16, 64)
            assert torch.equal(stored[:, ::2], rows[:, :8])
            assert torch.equal(stored[:, 1::2], rows[:, 8:])


@pytest.mark.parametrize(
    ("quantization", "steps", "logits"),
    [("f16", 2048, 3e-3), ("q8_0", 220, 0.05), ("q4_0", 7.9, 0.5)],
)
def test_quantised_weights_are_within_a_step(quantization, steps, logits, tmp_path, reader):
    """A step is the largest value of a block over their number, rounded in the coarsest way."""
    model = cut(dense("qwen2"))
    done = export(model, tmp_path / "out", "gguf", quantization=quantization)
    assert 1e-5 < max(row.difference for row in done.parity) < logits
    found, own = weights(done.folder), model.state_dict()
    outer = 220 if quantization == "q4_0" else steps
    pairs = [(found["token_embd.weight"], own["model.embed_tokens.weight"], outer)]
    for layer in range(3):
        expected = own[f"model.layers.{layer}.mlp.down_proj.weight"]
        pairs.append((found[f"blk.{layer}.ffn_down.weight"], expected, steps))
    for value, expected, count in pairs:
        blocks = expected.view(-1, 32)
        error = (value.view(-1, 32) - blocks).abs().amax(1)
        assert (error <= blocks.abs().amax(1) / count * 1.001 + 1e-6).all()
        assert error.max() > 0
    assert torch.equal(found["output_norm.weight"], own["model.norm.weight"])
    assert torch.equal(found["blk.0.attn_v.bias"], own["model.layers.0.self_attn.v_proj.bias"])


def test_smaller_types_give_smaller_files(tmp_path):
    model = cut(dense("llama"))
    kinds = ("f32", "f16", "q8_0", "q4_0")
    sizes = [export(model, tmp_path / k, "gguf", quantization=k).bytes for k in kinds]
    assert sizes == sorted(sizes, reverse=True)


def test_a_layer_may_lose_its_attention(tmp_path, reader):
    model = cut(dense("llama"), layers__1__attention__qk=0, layers__1__attention__vo=0)
    done = export(model, tmp_path / "out", "gguf", quantization="f32")
    assert max(row.difference for row in done.parity) < 1e-5
    assert fields(done.folder)["deci.attention.head_count"] == [4, 0, 4]


@pytest.mark.parametrize("label", ["llama biases", "mistral", "qwen2"])
def test_layers_have_heads_of_their_own(label, tmp_path, reader):
    model = dense(label, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    small = solpath.extract(model, heads_plan(model, (3, 1, 4), (1.0, 0.5, 1.0)))
    ids = torch.randint(90, (1, 40))
    done = export(small, tmp_path / "out", "gguf", quantization="f32", batch={"input_ids": ids})
    assert max(row.difference for row in done.parity) < 1e-5
    known = fields(done.folder)
    assert known["deci.attention.head_count"] == [6, 2, 8]
    assert known["deci.attention.head_count_kv"] == [3, 1, 4]
    assert known["deci.attention.key_length"] == 16


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"layers__1__mlp": 0}, r"layers\.1\.mlp has no units left.*min_width"),
        ({"layers__1__attention__qk": 4}, r"layers\.1\..*keeps 8 of 16 channels of queries"),
        ({"layers__2__attention__vo": 8}, r"and 8 of values.*protect="),
        (
            {"layers__0__attention__qk": 0, "layers__0__attention__vo": 0},
            r"layers\.0\.self_attn is gone.*protect=",
        ),
    ],
)
def test_widths_that_deci_cannot_hold_are_refused(kept, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(cut(dense("llama"), **kept), tmp_path / "out", "gguf")


def test_half_the_heads_are_not_taken_for_half_the_channels(tmp_path):
    """Queries of 4 heads of 8 channels are as large as those of 2 heads of 16."""
    model = cut(dense("llama"), attention__qk=4, attention__vo=8)
    with pytest.raises(ExportError, match="keeps 8 of 16"):
        export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize("label", ["qwen3", "gemma", "gemma3_text", "gpt2"])
def test_other_families_are_refused_by_name(label, tmp_path):
    model = build(label)
    with pytest.raises(ExportError, match=f"not for {type(model).__name__}"):
        export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    ("label", "changes", "words"),
    [
        ("mistral", {"sliding_window": 16}, "16 tokens of 128.*sliding_window=None"),
        ("llama", {"hidden_act": "gelu"}, "silu.*'gelu'"),
        ("llama", rope("dynamic"), "'dynamic' change with the length"),
        (
            "llama",
            rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8),
            "'longrope' change",
        ),
    ],
)
def test_settings_that_deci_does_not_have_are_refused(label, changes, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        export(dense(label, **changes), tmp_path / "out", "gguf")


def test_a_window_that_no_text_reaches_is_no_window(tmp_path):
    export(dense("mistral", sliding_window=128), tmp_path / "out", "gguf")


def test_parameters_without_a_place_are_refused(tmp_path):
    model = dense("llama")
    model.model.layers[1].self_attn.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(ExportError, match=r"no place for model\.layers\.1\.self_attn\.gain"):
        export(model, tmp_path / "out", "gguf")


@pytest.mark.parametrize(
    ("quantization", "error", "words"),
    [
        ("q9", ConfigError, "one of f32, f16, q8_0, q4_0, got 'q9'"),
        ("q4_k_m", ExportError, "256 columns together, and token_embd.weight has 64"),
        ("q8_0", ExportError, r"blk\.0\.ffn_down.* has 24; plan with multiple_of=32"),
    ],
)
def test_quantizations_that_do_not_fit_are_refused(quantization, error, words, tmp_path):
    model = cut(dense("llama"), layers__0__mlp=24)
    with pytest.raises(error, match=words):
        export(model, tmp_path / "out", "gguf", quantization=quantization)


def test_k_quants_are_left_to_llama_quantize(tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    with pytest.raises(ConfigError, match=r"llama-quantize model\.gguf small\.gguf Q4_K_M"):
        export(dense("llama", **sizes), tmp_path / "out", "gguf", quantization="q4_k_m")


@pytest.mark.parametrize(("value", "words"), [(1e5, "float16 ends"), (float("nan"), "not finite")])
def test_weights_that_a_type_cannot_hold_are_refused(value, words, tmp_path):
    model = dense("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(ExportError, match=rf"blk\.1\.ffn_up\.weight.*{words}"):
        export(model, tmp_path / "out", "gguf")


def test_batches_that_it_cannot_run_are_refused(tmp_path):
    ids, mask = torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]])
    for more, words in (({"attention_mask": mask}, "without padding"), ({"x": ids}, "alone")):
        with pytest.raises(BatchError, match=words):
            gguf_reading._ids({"input_ids": ids} | more)


TEXTS = ["Hello world, how are you?", "I've said 12345 things; YOU'LL see", "a  b\n\nc\td e"]


def byte_level(kind):
    """A tokenizer that splits texts as those of a family do."""
    from solpath.exporting.gguf_vocabulary import _LLAMA3, _QWEN2

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    split = {"llama-bpe": _LLAMA3, "smaug-bpe": _LLAMA3, "qwen2": _QWEN2, "odd": r"\p{L}+"}
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in split)]
    if kind in split:
        steps.insert(0, pre_tokenizers.Split(Regex(split[kind]), "isolated"))
    if kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "<e>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    if kind == "llama-bpe":
        start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.post_processor = start
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<e>", chat_template="{{ messages }}"
    )


def sentencepiece(*, closed=True):
    """A LLaMA tokenizer. Unless `closed`, it cannot merge in all ways that make a token."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.train_from_iterator(
        TEXTS, BpeTrainer(vocab_size=100, max_token_length=5, show_progress=False)
    )
    pieces = sorted(words.get_vocab(), key=words.get_vocab().get)
    pieces += [piece for piece in ("th", "hi", "thi") if piece not in pieces]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [
        (piece[:place], piece[place:])
        for piece in pieces
        for place in range(1, len(piece))
        if piece[:place] in vocabulary and piece[place:] in vocabulary
    ]
    if not closed:
        merges = list({left + right: (left, right) for left, right in merges}.values())
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


KINDS = ["gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "smollm", "sentencepiece"]


def tokenizer_of(kind):
    return sentencepiece() if kind == "sentencepiece" else byte_level(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_written_whole(kind, tmp_path):
    tokenizer = tokenizer_of(kind)
    model = dense("llama", vocab_size=400, num_hidden_layers=1)
    export(model, tmp_path / "out", "gguf", tokenizer=tokenizer)
    found = fields(tmp_path / "out")
    tokens, pre = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.pre"]
    assert pre == ("default" if kind == "sentencepiece" else kind)
    assert len(tokens) == len(set(tokens)) == 400
    assert all(tokens[number] == token for token, number in tokenizer.get_vocab().items())
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.add_bos_token"] == (kind in ("llama-bpe", "sentencepiece"))
    assert found.get("tokenizer.chat_template") == tokenizer.chat_template
    types = found["tokenizer.ggml.token_type"]
    assert types[399] == gguf.TokenType.UNUSED
    assert types[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert types.count(gguf.TokenType.BYTE) == (256 if kind == "sentencepiece" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_tokens(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = tokenizer_of(kind)
    model = dense("llama", vocab_size=400, num_hidden_layers=1)
    export(model, tmp_path / "out", "gguf", tokenizer=tokenizer)
    path = str(tmp_path / "out" / gguf_reading.FILE)
    file = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    for text in (*TEXTS, "naïve Übergröße 東京 🙂", "x = [1, 22, 333]\n\n  y"):
        ids = tokenizer(text)["input_ids"]
        assert file.tokenize(text.encode()) == ids
        assert file.detokenize(ids).decode().strip() == text
    file.close()


def test_greedy_text_is_the_same_in_llama_cpp(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = cut(dense("qwen2", vocab_size=400)), byte_level("qwen2")
    export(model, tmp_path / "out", "gguf", tokenizer=tokenizer, quantization="f32")
    ids = tokenizer("Hello world", return_tensors="pt").input_ids
    mine = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    path = str(tmp_path / "out" / gguf_reading.FILE)
    file = llama_cpp.Llama(path, n_ctx=128, verbose=False)
    steps = file.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0)
    theirs = [next(steps) for _ in range(24)]
    assert theirs == mine[0, ids.shape[1] :].tolist()
    file.close()


def test_llama_cpp_is_asked_about_tokens(tmp_path, monkeypatch):
    """A wrong pre-tokenizer is seen before the folder appears."""
    pytest.importorskip("llama_cpp")
    from solpath.exporting import gguf_vocabulary

    monkeypatch.setattr(gguf_vocabulary, "_pre", lambda parts: "gpt-2")
    model = dense("llama", vocab_size=400, num_hidden_layers=1)
    with pytest.raises(ExportError, match=r"llama\.cpp splits"):
        export(model, tmp_path / "out", "gguf", tokenizer=byte_level("llama-bpe"))


def unigram():
    model = models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", eos_token="a"
    )


def without_end():
    tokenizer = byte_level("gpt-2")
    tokenizer.eos_token = None
    return tokenizer


def stripping():
    tokenizer = byte_level("gpt-2")
    tokenizer.add_tokens([transformers.AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "size", "words"),
    [
        (unigram, 400, "model: Unigram"),
        (lambda: byte_level("odd"), 400, r"pre_tokenizer: \\p"),
        (lambda: sentencepiece(closed=False), 400, "merges: .* do not merge"),
        (without_end, 400, "no eos_token"),
        (stripping, 400, "'<mask>': strips spaces"),
        (lambda: byte_level("gpt-2"), 90, "and the model 90 rows"),
        (object, 400, "object is none"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tokenizer, size, words):
    with pytest.raises(ExportError, match=words):
        read_vocabulary(tokenizer(), size)
