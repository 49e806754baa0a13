"""On a GPU everything is what it is on a CPU; without one, these tests are skipped."""

import copy
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._triton import has_triton
from torch.utils.data import DataLoader
from transformers.utils import is_flash_attn_2_available

import solpath
from conftest import batches, build, inputs, size_of_output
from plans import both, random_plan
from solpath import InclusionConfig, SearchConfig, TuneConfig, baselines
from solpath.errors import BatchError
from solpath.measuring.evaluation import reference_outputs
from solpath.model.counting import count_costs
from solpath.model.discovery import find_pairs
from solpath.model.fingerprint import fingerprint
from solpath.pair import flatten
from solpath.running.forward import forward
from test_generation import GENERATORS, PLANS, assert_same, generate, prompts, pruned
from test_search import assert_equal, everything, same
from test_tune import Stops

# Without it torch's deterministic algorithms refuse cuBLAS; it counts before the first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DEVICE, OTHER = "cuda", "cpu"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FAMILIES = ["bert", "clip", "deberta-v2", "gemma2", "gpt2", "llama", "modernbert", "opt"]
FAMILIES += ["qwen3", "swin", "t5", "vit", "whisper"]
CONFIGS = {
    "default": SearchConfig(steps=6, scale_batches=2),
    # Past 20 steps what units make up for each other is looked at again.
    "compensated": SearchConfig(steps=24, scale_batches=2, basis="principal", compensated=True),
    "inclusion": InclusionConfig(steps=6, scale_batches=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
QUICK = TuneConfig(steps=6, evaluate_every=3, learning_rate=3e-3)
TUNED = {
    "full": QUICK,
    "autocast": replace(QUICK, mixed_precision="bf16"),
    "lora": replace(QUICK, learning_rate=1e-2, lora_rank=3),
}


@pytest.fixture(autouse=True)
def whole_precision():
    """Multiply float32 as float32, as on a CPU."""
    parts = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    yield
    for part, flag in zip(parts, flags, strict=True):
        part.allow_tf32 = flag


def moved(batch):
    if isinstance(batch, Mapping):
        return {name: value.to(DEVICE) for name, value in batch.items()}
    return batch.to(DEVICE)


def data(model, count=3, samples=4):
    return [moved(batch) for batch in batches(model, count, samples)]


def on_gpu(label, **changes):
    return build(label, **changes).to(DEVICE)


def run(model, config=CONFIGS["default"], given=None, **options):
    given = data(model) if given is None else given
    return solpath.search(model, given, config, progress=False, **options)


def plan_for(model, fractions=(0.5, 0.25, 0.75)):
    """A random plan; its costs are counted on the CPU, which is where the model is left."""
    return random_plan(model.cpu(), fractions)


def state(model):
    """All that must not change, also torch's random state on the GPU."""
    return everything(model) | {"gpu": dict(enumerate(torch.cuda.get_rng_state_all()))}


def equal_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return list(one) == list(two) and all(torch.equal(one[n].cpu(), two[n].cpu()) for n in one)


def ranks(path):
    return flatten(path.pairs, path.score).argsort(stable=True).argsort().double()


def error(small, dense, held):
    metrics = solpath.evaluate(small, dense, held).metrics
    return metrics.get("kl", metrics["relative_error"])


@pytest.mark.parametrize("fractions", [(0.25, 0.75), (0.0, 0.5, 1.0), (0.6, 1.0, 0.0)])
def test_masked_equals_extracted(model, fractions):
    plan = plan_for(model, fractions)
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            model = model.to(DEVICE, dtype)
            plan = replace(plan, fingerprint=fingerprint(model, plan.pairs))
            masked, small = both(model, plan, moved(inputs(model)))
            assert masked.device.type == DEVICE
            assert (masked - small).abs().max() <= bound * masked.abs().max()
        model = model.float()


def test_extraction_and_costs_are_those_of_the_cpu(model):
    plan, pairs, sample = plan_for(model), find_pairs(model), inputs(model, samples=1)
    there, here = solpath.extract(model, plan), count_costs(model, pairs, sample)
    model.to(DEVICE)
    small = solpath.extract(model, plan)
    assert {p.device.type for p in (*small.parameters(), *small.buffers())} == {DEVICE}
    assert equal_weights(small, there)
    assert count_costs(model, pairs, moved(sample)) == here


@pytest.mark.parametrize("label", FAMILIES)
@every_config
def test_a_search_is_repeatable_and_leaves_the_model_as_it_was(label, config):
    model = on_gpu(label)
    with torch.no_grad():  # transformers leaves hooks of its own at the first call of some models
        forward(model, moved(inputs(model)))
    before = state(model)
    torch.use_deterministic_algorithms(label == "deberta-v2")  # see docs/large-models.md
    try:
        path = run(model, config)
        assert_equal(state(model), before)
        torch.manual_seed(99)
        assert same(path, run(model, config))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(path.history).all()


@pytest.mark.parametrize("label", ["bert", "llama 1:6", "qwen3", "t5"])
@every_config
def test_interrupts_and_checkpoints_have_no_influence(label, config, tmp_path):
    model = on_gpu(label)
    given = data(model, 2 * config.steps)  # a new one for every step
    stopping = Stops(given, len(given) // 2)
    with pytest.raises(KeyboardInterrupt):
        run(model, config, stopping, checkpoint=tmp_path / "one", checkpoint_every=3)
    assert (tmp_path / "one" / "search.safetensors").exists()
    resumed = run(model, config, given, checkpoint=tmp_path / "one", checkpoint_every=100)
    assert same(resumed, run(model, config, given))
    other = run(model, config, given, checkpoint=tmp_path / "other", checkpoint_every=1)
    assert same(resumed, other)


@pytest.mark.parametrize("label", ["bert", "gpt2", "llama", "qwen3", "swin", "t5", "vit"])
@every_config
def test_the_order_is_that_of_the_cpu(label, config):
    for dtype, bound in ((torch.float32, 1e-2), (torch.float64, 1e-5)):
        model = build(label).to(dtype)
        here = solpath.search(model, batches(model), config, progress=False)
        there = run(model.to(DEVICE), config)
        assert torch.corrcoef(torch.stack([ranks(here), ranks(there)]))[0, 1] > 1 - bound
        torch.testing.assert_close(there.history, here.history, rtol=bound, atol=bound)
        assert there.costs == here.costs


@pytest.mark.parametrize("attention", ["eager", "sdpa, deterministic algorithms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("label", ["bert", "llama"])
def test_a_search_on_long_texts_is_repeatable(label, dtype, attention):
    """Fused kernels may add up the keys of long texts in any order; so may many query heads."""
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "max_position_embeddings": 600}
    sizes |= {"num_key_value_heads": 1} if label == "llama" else {}
    model = on_gpu(label, **sizes).to(dtype)
    model.set_attn_implementation(attention.partition(",")[0])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 57, (4, 512), generator=generator).to(DEVICE)
    given = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}]
    torch.use_deterministic_algorithms("deterministic" in attention)
    try:
        paths = [run(model, given=given) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(same(paths[0], path) for path in paths)


@pytest.mark.parametrize("label", FAMILIES)
@pytest.mark.parametrize("basis", ["coordinate", "principal"])
def test_a_path_from_the_gpu_cuts_on_the_cpu(label, basis, tmp_path):
    model = on_gpu(label)
    run(model, SearchConfig(steps=4, scale_batches=1, basis=basis)).save(tmp_path / "path")
    plan = solpath.SolutionPath.load(tmp_path / "path").plan(sparsity=0.5)
    there = solpath.extract(model, plan)
    with torch.no_grad():
        expected = forward(there, moved(inputs(model))).cpu()
    model.cpu()
    here = solpath.extract(model, plan)
    if basis == "coordinate":
        assert equal_weights(here, there)
    with torch.no_grad():
        found = forward(here, inputs(model))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("label", FAMILIES)
def test_saved_and_loaded_is_equal_to_the_bit(label, tmp_path):
    model = build(label)
    plan = plan_for(model)
    small = solpath.extract(model.to(DEVICE), plan)
    solpath.save(small, tmp_path / "small")
    loaded = solpath.load(tmp_path / "small", device=DEVICE)
    assert {p.device.type for p in (*loaded.parameters(), *loaded.buffers())} == {DEVICE}
    assert equal_weights(loaded, small)
    with torch.no_grad():
        batch = moved(inputs(model))
        assert torch.equal(forward(loaded, batch), forward(small, batch))


@pytest.mark.parametrize("label", GENERATORS)
def test_cached_generation_is_that_of_the_masked_model(label):
    for fractions in PLANS if label == "llama" else PLANS[:1]:
        model, plan, _ = pruned(label, fractions)
        small = solpath.extract(model.to(DEVICE), plan)
        batch = moved(prompts(model))
        cached = generate(small, batch, use_cache=True)
        with solpath.masked(model, plan):
            assert_same(cached, generate(model, batch))


@pytest.mark.parametrize("label", [name for name in FAMILIES if name not in ("swin", "whisper")])
def test_bfloat16(label):
    model = build(label).bfloat16().float()
    plan = plan_for(model)
    model = model.to(DEVICE)
    with torch.no_grad(), solpath.masked(model, plan):
        exact = forward(model, moved(inputs(model)))
    model = model.bfloat16()
    plan = replace(plan, fingerprint=fingerprint(model, plan.pairs))
    masked, small = (out.float() for out in both(model, plan, moved(inputs(model))))
    rounding = (masked - exact).norm()
    assert (small - exact).norm() <= 3 * rounding + 1e-3 * exact.norm()
    path = run(model)
    assert torch.isfinite(path.history).all()
    assert same(path, run(model))
    assert solpath.extract(model, path.plan(sparsity=0.5)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("label", ["bert", "llama"])
def test_baselines(label, method):
    model = on_gpu(label)
    before = state(model)
    options = {"loss": size_of_output} if method == "released" else {}
    paths = [baselines.METHODS[method](model, data(model), **options) for _ in range(2)]
    assert_equal(state(model), before)
    assert torch.equal(ranks(paths[0]), ranks(paths[1]))


@pytest.mark.parametrize("label", ["bert", "gpt2", "llama", "qwen3", "swin", "t5", "vit"])
def test_compensation_never_harms_and_is_repeatable(label):
    dense = build(label)
    plan = plan_for(dense)
    small = solpath.extract(dense.to(DEVICE), plan)
    before, given = (state(small), state(dense)), data(dense, 8)
    one, two = (solpath.compensate(small, dense, given, progress=False) for _ in range(2))
    assert_equal(state(small), before[0])
    assert_equal(state(dense), before[1])
    assert equal_weights(one, two)
    held = given[3::4]
    after = error(one, dense, held)
    assert after <= error(small, dense, held)
    gain = error(small, dense, held) - after
    here = solpath.compensate(small.cpu(), dense.cpu(), batches(dense, 8), progress=False)
    there = error(here, dense, batches(dense, 8)[3::4])
    assert after == pytest.approx(there, rel=0.05, abs=1e-3 * gain)


@pytest.mark.parametrize("label", ["bert", "llama", "vit"])
@pytest.mark.parametrize("config", TUNED.values(), ids=TUNED)
def test_tuning_helps_and_is_repeatable_and_resumed(label, config, tmp_path):
    if config.lora_rank is not None:
        pytest.importorskip("peft")
    dense = build(label)
    plan = plan_for(dense)
    small = solpath.extract(dense.to(DEVICE), plan)
    before, given = (state(small), state(dense)), data(dense, 6)
    held = [moved(inputs(dense, seed=100 + i)) for i in range(2)]
    options = {"heldout": held, "progress": False}
    tuned = solpath.tune(small, dense, given, config, **options)
    assert_equal(state(small), before[0])
    assert_equal(state(dense), before[1])
    assert error(tuned, dense, held) <= error(small, dense, held)
    options |= {"checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        solpath.tune(small, dense, Stops(given, 4), config, **options, checkpoint_every=1)
    resumed = solpath.tune(small, dense, given, config, **options)
    assert equal_weights(resumed, tuned)


def test_tuning_on_the_cpu_of_a_machine_with_a_gpu():
    dense = build("bert")
    small = solpath.extract(dense, random_plan(dense, (0.5,)))
    before = state(small)
    options = {"heldout": batches(dense, 1), "progress": False}
    tuned = solpath.tune(small, dense, batches(dense), QUICK, **options)
    assert_equal(state(small), before)
    assert {p.device.type for p in tuned.parameters()} == {"cpu"}


def test_a_shuffling_loader():
    model = on_gpu("bert")
    tokens = torch.cat([batch["input_ids"] for batch in data(model)])
    loader = DataLoader(list(tokens), batch_size=4, shuffle=True)
    before = state(model)
    path = run(model, given=loader)
    assert_equal(state(model), before)
    torch.manual_seed(6)
    assert same(path, run(model, given=loader))


def test_a_model_by_name_goes_to_the_batches(tmp_path):
    model = on_gpu("bert")
    model.save_pretrained(tmp_path)
    assert same(run(model), run(tmp_path, given=data(model)))


@pytest.mark.parametrize("label", FAMILIES)
def test_evaluation_is_that_of_the_cpu(label):
    dense = build(label)
    plan = plan_for(dense)
    small = solpath.extract(dense, plan)
    here = solpath.evaluate(small, dense, batches(dense))
    dense.to(DEVICE)
    there = solpath.evaluate(small.to(DEVICE), dense, data(dense))
    targets = reference_outputs(dense, data(dense))
    with solpath.masked(dense, plan):
        masked = solpath.evaluate(dense, targets, data(dense))
    for name, value in here.metrics.items():
        bound = 0.06 if name == "agreement" else 1e-3  # two classes may be equally likely
        assert there.metrics[name] == pytest.approx(value, abs=bound, rel=1e-3)
        assert masked.metrics[name] == pytest.approx(value, abs=bound, rel=1e-3)
    assert there.provenance["device"] != here.provenance["device"]


@pytest.mark.parametrize("label", FAMILIES)
def test_measurements(label):
    dense = build(label)
    plan = plan_for(dense)
    here = solpath.measure({"dense": dense}, inputs(dense), repeats=1)["dense"]
    small = solpath.extract(dense.to(DEVICE), plan)
    found = solpath.measure({"dense": dense, "small": small}, moved(inputs(dense)), repeats=3)
    for one in found.values():
        assert one.peak_memory_source == "torch.cuda.max_memory_allocated"
        assert one.peak_memory > one.params
        assert one.latency_ms > 0
    same_anywhere = ("params", "macs", "bytes_on_disk", "samples")
    assert [getattr(found["dense"], n) for n in same_anywhere] == [
        getattr(here, n) for n in same_anywhere
    ]
    assert found["small"].macs < found["dense"].macs


def test_latency_tables(tmp_path):
    model = on_gpu("bert")
    batch = moved(inputs(model))
    before = state(model)
    table = solpath.measure_latency(model, batch, repeats=1)
    assert_equal(state(model), before)
    assert table.dense_ms > 0
    assert table.conditions["device"] == torch.cuda.get_device_name()
    table.save(tmp_path / "table.json")
    table = solpath.LatencyTable.load(tmp_path / "table.json")
    path = run(model)
    plan = path.plan(latency_ms=table.dense_ms, latency=table)
    assert plan.latency_ms["predicted"] <= table.dense_ms
    # Of a tiny model the launches take all the time, whatever its widths are.
    plan = solpath.plan_for_latency(
        model, path, batch, table.dense_ms, latency=table, tolerance=0.9
    )
    assert plan.latency_ms["measured"] > 0


def test_batches_that_stayed_on_the_cpu():
    model = on_gpu("bert")
    path = run(model)
    small = solpath.extract(model, path.plan(sparsity=0.5))
    stayed = [{n: v.to(OTHER) for n, v in batch.items()} for batch in batches(model, 8)]
    calls = {
        "search": lambda: run(model, given=stayed),
        "taylor": lambda: baselines.taylor(model, stayed),
        "compensate": lambda: solpath.compensate(small, model, stayed, progress=False),
        "tune": lambda: solpath.tune(
            small, model, stayed, QUICK, heldout=stayed[:1], progress=False
        ),
        "evaluate": lambda: solpath.evaluate(small, model, stayed),
        "measure": lambda: solpath.measure({"dense": model}, stayed[0], repeats=1),
        "measure_latency": lambda: solpath.measure_latency(model, stayed[0], repeats=1),
        "plan_for_latency": lambda: solpath.plan_for_latency(model, path, stayed[0], 1.0),
    }
    for call in calls.values():
        with pytest.raises(BatchError, match=f"is on {OTHER}, the model on {DEVICE}"):
            call()


@pytest.mark.parametrize("label", ["bert", "ernie4_5", "gpt2", "llama", "qwen3", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kernel",
    [
        SDPBackend.MATH,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
    ],
    ids=lambda kernel: kernel.name,
)
def test_every_kernel_of_sdpa(label, dtype, kernel):
    _close_to_exact(label, dtype, "sdpa", lambda: sdpa_kernel(kernel))


@pytest.mark.parametrize(
    ("label", "attention"),
    [
        ("bert", "flash_attention_2"),
        ("llama", "flash_attention_2"),
        ("llama", "flex_attention"),
    ],
)
def test_other_implementations_of_attention(label, attention):
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    if attention == "flex_attention" and not compiles():
        pytest.skip("there is no compiler")
    # Flex attention takes no head of fewer than 16 channels; here a cut one has 16.
    sizes = {"hidden_size": 128, "num_attention_heads": 4}
    _close_to_exact(label, torch.bfloat16, attention, nullcontext, (0.5,), **sizes)


def _close_to_exact(label, dtype, attention, kernel, fractions=(0.5, 0.25, 0.75), **changes):
    """Masked and cut, both by a kernel in some precision, against the masked model in float32."""
    model = build(label, **changes).to(dtype).float()
    plan = plan_for(model, fractions)
    model = model.to(DEVICE)

    def output(one):
        batch = moved(inputs(one))
        batch.pop("attention_mask", None)  # the fastest kernels take none
        with torch.no_grad():
            return forward(one, batch).float()

    with solpath.masked(model, plan):
        exact = output(model)
    model = model.to(dtype)
    model.set_attn_implementation(attention)
    plan = replace(plan, fingerprint=fingerprint(model, plan.pairs))
    small = solpath.extract(model, plan)
    with kernel():
        try:
            with solpath.masked(model, plan):
                masked = output(model)
        except (RuntimeError, ValueError) as reason:
            pytest.skip(f"the dense model does not run: {str(reason)[:80]}")
        found = output(small)
    bound = 1e-5 if dtype == torch.float32 else 1e-3
    assert (found - exact).norm() <= 3 * (masked - exact).norm() + bound * exact.norm()


def compiles():
    return has_triton() and any(shutil.which(name) for name in ("cc", "gcc", "clang"))


def test_a_cut_model_compiles():
    if not compiles():
        pytest.skip("there is no compiler")
    model = build("llama")
    plan = plan_for(model)
    small = solpath.extract(model.to(DEVICE), plan)
    batch = moved(inputs(model))
    with torch.no_grad():
        expected = forward(small, batch)
        found = torch.compile(copy.deepcopy(small))(**batch, use_cache=False).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
