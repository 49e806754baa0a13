"""The search: what it promises about its input, its result, interruptions and bad data."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from transformers import BertForSequenceClassification

import solpath
from conftest import batches, build, inputs, randomise_, size_of_output
from solpath import InclusionConfig, SearchConfig, baselines
from solpath.data.samples import sample_digests
from solpath.data.source import BatchSource
from solpath.errors import (
    BatchError,
    ConfigError,
    FileError,
    FingerprintError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from solpath.model.discovery import find_pairs
from solpath.pair import flatten
from solpath.running.forward import forward

QUICK = SearchConfig(steps=8, scale_batches=2)


def run(model, data=None, config=QUICK, **options):
    return solpath.search(model, data or batches(model), config, progress=False, **options)


def same(a, b) -> bool:
    return (
        torch.equal(flatten(a.pairs, a.score), flatten(b.pairs, b.score))
        and torch.equal(a.history, b.history)
        and torch.equal(a.seen, b.seen)
    )


def everything(model: nn.Module):
    return {
        "state": copy.deepcopy(model.state_dict()),
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ],
        "rng": torch.get_rng_state(),
    }


def assert_equal(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("method", ["spp", "inclusion", *baselines.METHODS])
def test_the_model_is_left_as_it_was(common_model, method):
    model = common_model.train()
    list(model.parameters())[3].requires_grad_(False)
    with torch.no_grad():  # transformers leaves hooks of its own at the first call of some models
        forward(model, inputs(model))
    before = everything(model)
    if method == "spp":
        run(model)
    elif method == "inclusion":
        run(model, config=InclusionConfig(steps=4))
    else:
        options = {"loss": size_of_output} if method == "released" else {}
        baselines.METHODS[method](model, batches(model), **options)
    assert_equal(everything(model), before)


def test_the_model_is_left_as_it_was_after_an_error(bert):
    before = everything(bert)
    with pytest.raises(RuntimeError, match="mine"):
        run(bert, loss=lambda outputs, batch: (_ for _ in ()).throw(RuntimeError("mine")))
    assert_equal(everything(bert), before)


def test_same_seed_same_path_and_other_seed_another(bert):
    assert same(run(bert), run(bert))
    assert not same(run(bert), run(bert, config=SearchConfig(steps=8, scale_batches=2, seed=1)))


def test_global_random_state_has_no_influence(bert):
    first = run(bert)
    torch.manual_seed(99)
    assert same(first, run(bert))


def test_checkpoints_and_progress_have_no_influence(bert, tmp_path):
    plain = run(bert)
    for every in (1, 3, 100):
        assert same(plain, run(bert, checkpoint=tmp_path / str(every), checkpoint_every=every))
    assert same(plain, solpath.search(bert, batches(bert), QUICK, progress=True))


@pytest.mark.parametrize("outputs", [1, 3], ids=["regression", "classes"])
def test_progress_has_no_influence_along_principal_axes(bert, outputs):
    """The estimate runs before the axes are turned, and leaves nothing behind."""
    torch.manual_seed(0)
    config = copy.deepcopy(bert.config)
    config.num_labels = outputs
    model = randomise_(BertForSequenceClassification(config).eval())
    turned = SearchConfig(steps=9, scale_batches=2, basis="principal")
    plain = run(model, config=turned)
    assert same(plain, solpath.search(model, batches(model), turned, progress=True))


def test_a_path_knows_the_samples_of_the_batches_that_were_read(bert):
    """Each of them once, of however many steps, and none that was not needed."""
    data = batches(bert, 9)
    digests = [digest for batch in data for digest in sample_digests(batch)]
    path = run(bert, iter(data), SearchConfig(steps=5, scale_batches=2))
    assert path.seen.dtype == torch.int64
    assert path.seen.tolist() == sorted(digests[:20])
    for progress in (False, True):  # which looks at how long a step takes
        short = SearchConfig(steps=2, scale_batches=1)
        path = solpath.search(bert, data, short, progress=progress)
        assert path.seen.tolist() == sorted(digests[:8])
    rival = baselines.gauss_newton(bert, data, scale_batches=3)
    assert rival.seen.tolist() == sorted(digests[:12])


@pytest.mark.parametrize(
    ("config", "stop"),
    [
        *((QUICK, stop) for stop in (1, 5)),
        *((InclusionConfig(steps=8, scale_batches=2), stop) for stop in (1, 5)),
        # Past 20 steps what units make up for each other is looked at again.
        (SearchConfig(steps=44, scale_batches=2, basis="principal", compensated=True), 31),
    ],
)
def test_interrupt_and_resume(bert, tmp_path, config, stop):
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        if calls == config.scale_batches + stop + 1:
            raise KeyboardInterrupt
        return outputs.last_hidden_state.square().mean((1, 2)).mean()

    with pytest.raises(KeyboardInterrupt):
        run(bert, config=config, loss=loss, checkpoint=tmp_path, checkpoint_every=100)
    assert (tmp_path / "search.safetensors").exists()
    resumed = run(bert, config=config, loss=loss, checkpoint=tmp_path)
    assert calls == config.scale_batches + config.steps + 1  # no step was done twice
    assert same(resumed, run(bert, config=config, loss=loss))


def test_kill_at_any_moment_and_resume(tmp_path):
    """A search killed with SIGKILL again and again ends in the bit-identical path."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import batches, build
        import solpath
        model = build("bert")
        def loss(outputs, batch):
            time.sleep(0.02)
            return outputs.last_hidden_state.square().mean((1, 2)).mean()
        path = solpath.search(model, batches(model), solpath.SearchConfig(steps=40), loss=loss,
                              checkpoint=sys.argv[1], checkpoint_every=3, progress=False)
        path.save(sys.argv[2])
        """)
    )
    checkpoint = tmp_path / "checkpoint"
    file = checkpoint / "search.safetensors"
    kills = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, script, checkpoint, tmp_path / "killed"])
        stamp = file.stat().st_mtime_ns if file.exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if file.exists() and file.stat().st_mtime_ns != stamp:
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
                break
            time.sleep(0.005)
    assert kills >= 2
    subprocess.run([sys.executable, script, checkpoint, tmp_path / "killed"], check=True)
    subprocess.run([sys.executable, script, tmp_path / "fresh", tmp_path / "whole"], check=True)
    killed, whole = (solpath.SolutionPath.load(tmp_path / name) for name in ("killed", "whole"))
    assert same(killed, whole)
    assert not list(checkpoint.glob(".*"))


def test_two_processes_give_the_same_path(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import batches, build, inputs
        import solpath
        model = build("bert").double()
        path = solpath.search(model, batches(model, samples=5),
                              solpath.SearchConfig(steps=10, scale_batches=2), progress=False)
        from solpath.searching.probe import process
        print("process %d %d\\n" % process(), end="", flush=True)
        rank, _ = process()
        if rank == 0:
            path.save(sys.argv[1])
        own = [inputs(model, samples=3 + rank, seed=10 + rank)]
        solpath.baselines.random(model, own).save(f"{{sys.argv[1]}}-{{rank}}")
        """)
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, tmp_path / "two"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "process 1 2" in done.stdout
    subprocess.run([sys.executable, script, tmp_path / "one"], check=True, env=environment)
    two, one = (solpath.SolutionPath.load(tmp_path / name) for name in ("two", "one"))
    assert torch.equal(two.order(), one.order())
    torch.testing.assert_close(two.history, one.history, rtol=1e-9, atol=1e-12)
    assert len(one.seen) == 15
    assert torch.equal(two.seen, one.seen)
    of_each = [inputs(build("bert"), samples=3 + rank, seed=10 + rank) for rank in (0, 1)]
    known = sorted(digest for batch in of_each for digest in sample_digests(batch))
    for rank in (0, 1):  # what each of them ran on
        assert solpath.SolutionPath.load(tmp_path / f"two-{rank}").seen.tolist() == known


def test_a_checkpoint_of_another_search_is_refused(bert, tmp_path):
    run(bert, checkpoint=tmp_path)
    with pytest.raises(FingerprintError, match="differs in steps: 8, not 9"):
        run(bert, config=SearchConfig(steps=9, scale_batches=2), checkpoint=tmp_path)
    with pytest.raises(FingerprintError, match="digests"):
        run(build("bert", seed=1), checkpoint=tmp_path)
    with pytest.raises(FingerprintError, match="kind"):
        run(bert, config=InclusionConfig(steps=8, scale_batches=2), checkpoint=tmp_path)
    file = tmp_path / "search.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FileError, match=r"search\.safetensors"):
        run(bert, checkpoint=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_search(bert, tmp_path, value):
    calls = 0

    def loss(outputs, batch):
        nonlocal calls
        calls += 1
        return outputs.last_hidden_state.square().mean() * (value if calls > 7 else 1.0)

    with pytest.raises(NonFiniteLossError, match=r"at step 5 of 8; the checkpoint of step 4"):
        run(bert, loss=loss, checkpoint=tmp_path, checkpoint_every=2)
    assert (tmp_path / "search.safetensors").exists()


def test_the_loss_of_the_user_is_what_is_minimised():
    """Only units that reach the class token matter to a loss on the class token."""
    model = build("camembert").double()
    labels = torch.tensor([0, 1, 0, 1])
    data = [inputs(model, seed=i) | {"labels": labels} for i in range(3)]
    path = run(model, data, loss=lambda outputs, batch: outputs.loss)
    assert not same(path, run(model, data))


def test_batches_of_every_kind_give_the_same_path(bert):
    tokens = [batch["input_ids"] for batch in batches(bert)]
    expected = run(bert, tokens)
    loader = DataLoader(TensorDataset(torch.cat(tokens)), batch_size=4, collate_fn=_stack)
    assert same(expected, run(bert, loader))
    assert same(expected, run(bert, iter(tokens)))
    assert same(expected, run(bert, tuple(tokens)))
    assert same(expected, run(bert, [{"input_ids": t} for t in tokens]))


def _stack(rows):
    return torch.stack([row[0] for row in rows])


def test_a_shuffling_loader_is_reproducible_and_cycled(bert):
    tokens = torch.cat([batch["input_ids"] for batch in batches(bert)])
    loader = DataLoader(TensorDataset(tokens), batch_size=4, collate_fn=_stack, shuffle=True)
    torch.manual_seed(5)
    first = run(bert, loader)
    torch.manual_seed(6)
    assert same(first, run(bert, loader))
    with torch.random.fork_rng():
        source = BatchSource(loader, seed=0)
        forward = [source[k] for k in range(7)]
        assert torch.equal(source[4], forward[4])
        assert not torch.equal(torch.cat(forward[:3]), torch.cat(forward[3:6]))


@pytest.mark.parametrize("of", ["loader", "sampler", "batch sampler"])
def test_a_generator_of_a_loader_is_seeded_too(of):
    """It would go on from where the last epoch, or an earlier run, has left it."""
    rows, own = list(torch.arange(32)), torch.Generator().manual_seed(0)
    if of == "loader":
        loader = DataLoader(rows, batch_size=8, shuffle=True, generator=own)
    else:
        sampler = RandomSampler(rows, generator=own)
        packed = {"batch_sampler": BatchSampler(sampler, 8, False)}
        loader = DataLoader(rows, **packed if "batch" in of else {"sampler": sampler})
    with torch.random.fork_rng():
        first, again = (
            torch.stack([source[k].flatten()[0] for k in range(6)])
            for source in (BatchSource(loader, seed=0), BatchSource(loader, seed=0))
        )
    assert torch.equal(first, again)
    assert len(set(first.tolist())) > 3


def test_a_loader_gives_every_batch_once(bert):
    """What a step needs twice is read once; only the looks before the steps start again."""

    class Counted:
        reads = 0

        def __iter__(self):
            for batch in batches(bert, 60):
                self.reads += 1
                yield batch

    class Indexed(Sequence):
        reads = 0

        def __len__(self):
            return 60

        def __getitem__(self, place):
            self.reads += 1
            return batches(bert, 60)[place]

    loader, sequence = Counted(), Indexed()
    path = run(bert, loader, SearchConfig(steps=40, scale_batches=2))
    assert loader.reads <= 40 + 20
    assert same(path, run(bert, sequence, SearchConfig(steps=40, scale_batches=2)))
    assert sequence.reads <= 40 + 20
    assert same(path, run(bert, batches(bert, 60), SearchConfig(steps=40, scale_batches=2)))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (DataLoader([]), "empty"),
        ({"input_ids": torch.ones(1, 3)}, "wrap it in a list"),
        ([{"input_ids": torch.ones(0, 3, dtype=torch.long)}], "no samples"),
        (["text"], "dict of tensors"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")}],
            "input_ids is on meta",
        ),
    ],
)
def test_bad_batches(bert, data, words):
    with pytest.raises(BatchError, match=words):
        solpath.search(bert, data, QUICK, progress=False)


def test_models_that_cannot_be_pruned(bert):
    with pytest.raises(UnsupportedModelError, match="the model is in float16"):
        run(build("bert").half())
    with pytest.raises(UnsupportedModelError, match="already extracted"):
        run(solpath.extract(bert, run(bert).plan(sparsity=0.5)))
    other = build("bert")
    other.config.model_type = "martian"
    with pytest.raises(UnsupportedModelError, match=r"known: .*, bert, "):
        find_pairs(other)
    with pytest.raises(UnsupportedModelError, match="model_type None"):
        find_pairs(nn.Linear(2, 2))
    tied = build("bert")
    tied.encoder.layer[1].output.dense.weight = tied.encoder.layer[0].output.dense.weight
    with pytest.raises(UnsupportedModelError, match="shared with another module"):
        find_pairs(tied)
    same_layer = build("bert")
    same_layer.encoder.layer[1] = same_layer.encoder.layer[0]
    with pytest.raises(UnsupportedModelError, match="shared with another module"):
        find_pairs(same_layer)

    class Quantised(nn.Linear):
        pass

    quantised = build("bert")
    quantised.encoder.layer[0].intermediate.dense = Quantised(32, 48)
    with pytest.raises(UnsupportedModelError, match="not a plain"):
        find_pairs(quantised)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 1), ("steps", 2.5), ("seed", -1), ("momentum", 1.0), ("relaxation", 0.0),
     ("final_size", 0.0), ("sharpness", 0.0), ("shrinkage", -1.0), ("memory", 1.1),
     ("momentum", "0.5"), ("binary", "false"), ("compensated", 1)],
)  # fmt: skip
def test_bad_settings(field, value):
    with pytest.raises(ConfigError, match=field):
        SearchConfig(**{field: value})


@pytest.mark.parametrize("field", ["nu", "lam", "kappa", "step_size"])
def test_bad_inclusion_settings(field):
    with pytest.raises(ConfigError, match=field):
        InclusionConfig(**{field: -1.0})


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("taylor", {"scale_batches": 0}, "scale_batches must be"),
        ("gauss_newton", {"scale_batches": 1.5}, "scale_batches must be"),
        ("iterative", {"stages": 0}, "stages must be"),
        ("iterative_curvature", {"keep": 0}, "keep must be"),
        ("released", {"steps": 0}, "steps must be"),
        ("released", {}, "released needs loss="),
    ],
)
def test_bad_settings_of_baselines(bert, method, options, words):
    with pytest.raises(ConfigError, match=words):
        baselines.METHODS[method](bert, batches(bert), **options)


def test_the_released_rule_follows_the_loss(bert):
    """After one update V is an odd function of the gradient around where it started."""

    def scores(sign):
        def loss(outputs, batch):
            return sign * size_of_output(outputs, batch)

        path = baselines.released(bert, batches(bert), steps=1, loss=loss)
        return torch.cat([path.score[pair.name].flatten() for pair in path.pairs])

    up, down = scores(1), scores(-1)
    assert up.unique().numel() > 0.9 * up.numel()
    assert torch.allclose(up + down, torch.full_like(up, 2 * 1e-3 / (1 - 0.9)), atol=1e-12)


def test_bad_checkpoint_every(bert):
    with pytest.raises(ConfigError, match="checkpoint_every must be an integer of at least 1"):
        run(bert, checkpoint_every=0)


def test_units_that_do_nothing_leave_first():
    """Zero the weights after half of every inner dimension: that half is what is cut first."""
    model = build("bert").double()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter *= 0.3 if parameter.dim() > 1 else 1
        for layer in model.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
            layer.attention.output.dense.weight[:, ::2] = 0
            layer.attention.self.key.weight[::2] = 0
            layer.attention.self.key.bias[::2] = 0
    for make in (
        lambda: run(model, config=SearchConfig(steps=30, scale_batches=4)),
        lambda: baselines.gauss_newton(model, batches(model)),
        lambda: baselines.taylor(model, batches(model)),
        lambda: baselines.iterative_curvature(model, batches(model), stages=4),
    ):
        path = make()
        removed = [
            unit
            for name, kept in path.plan(sparsity=0.4).kept.items()
            for pair in path.pairs
            if pair.name == name
            for row in kept.tolist()
            for unit in set(range(pair.width)) - set(row)
        ]
        dead = sum(unit % 2 == 0 for unit in removed)
        assert dead >= 0.95 * len(removed), path.method


@pytest.mark.parametrize(
    "options", [{"binary": False}, {"growing_pull": False}, {"shrinkage": 0.0}]
)
def test_ablations_change_the_path(bert, options):
    changed = run(bert, config=SearchConfig(steps=8, scale_batches=2, **options))
    assert not same(changed, run(bert))
