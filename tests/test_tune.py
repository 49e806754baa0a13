"""Tuning: what it promises about its inputs, its result, interruptions, processes and bad data."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState, is_initialized
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.pytorch_utils import Conv1D

import solpath
from conftest import batches, build, inputs
from plans import plan_of
from solpath import SearchConfig, TuneConfig, baselines
from solpath.errors import (
    BatchError,
    ConfigError,
    FileError,
    FingerprintError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from solpath.refining import learning_rate, training
from solpath.refining.adapters import adaptable, add_adapters_, merge_adapters_
from solpath.refining.distillation import Distillation
from solpath.refining.tuning import typical_width

QUICK = TuneConfig(steps=6, evaluate_every=3, learning_rate=3e-3)
LORA = TuneConfig(steps=6, evaluate_every=3, learning_rate=1e-2, lora_rank=3)
TRIED = TuneConfig(steps=6, evaluate_every=3)
HOT = {"_RATE": 1e3, "_MAX_RATE": 1.0}
CONFIGS = {"full": QUICK, "lora": LORA, "tried": TRIED}


def cut(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    path = baselines.magnitude(model, batches(model))
    return solpath.extract(model, path.plan(sparsity=sparsity))


def heldout(model: nn.Module):
    return [inputs(model, seed=100 + i) for i in range(2)]


def run(small, dense, config=QUICK, data=None, **options):
    data = batches(dense) if data is None else data
    options = {"heldout": heldout(dense), "progress": False} | options
    return solpath.tune(small, dense, data, config, **options)


def error(small: nn.Module, dense: nn.Module) -> float:
    metrics = solpath.evaluate(small, dense, heldout(dense)).metrics
    return metrics.get("kl", metrics["relative_error"])


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def everything(model: nn.Module):
    return (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [type(m) for m in model.modules()],
        sorted(vars(model)),
    )


def assert_equal(a, b):
    assert a[1:] == b[1:]
    assert a[0].keys() == b[0].keys()
    assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])


class Stops(list):
    """Batches that raise when a given number of them has been read."""

    def __init__(self, data, after, exception=KeyboardInterrupt):
        super().__init__(data)
        self.left, self.exception = after, exception

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise self.exception()
        return super().__getitem__(index)


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["full", "lora"])
def test_a_tuned_model_is_a_better_one_of_the_same_kind(common_model, config, tmp_path):
    model = common_model
    small = cut(model)
    small.train()
    list(small.parameters())[2].requires_grad_(False)
    before = everything(small), everything(model), torch.get_rng_state()
    tuned = run(small, model, config)
    assert_equal(everything(small), before[0])
    assert_equal(everything(model), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not any(kind._shared_state for kind in (AcceleratorState, GradientState, PartialState))

    assert error(tuned, model) < error(small, model)
    assert everything(tuned)[1:] == before[0][1:]
    assert tuned.solpath_plan is small.solpath_plan
    shared = {p.data_ptr() for p in tuned.parameters() if p.numel()}
    assert not shared & {p.data_ptr() for p in small.parameters()}
    for a, b in zip(tuned.parameters(), small.parameters(), strict=True):
        assert a.requires_grad or torch.equal(a, b)
    solpath.save(tuned, tmp_path / "tuned")
    assert same(solpath.load(tmp_path / "tuned"), tuned)


def test_the_updates_are_those_of_a_plain_training_loop():
    """KL of the logits, clipped, by AdamW; written out with functions of torch."""
    dense = build("camembert")
    small, data = cut(dense), batches(dense)
    config = TuneConfig(
        steps=4, warmup=0, schedule="constant", learning_rate=1e-3, weight_decay=0.1,
        max_grad_norm=0.01, evaluate_every=4,
    )  # fmt: skip
    plain = copy.deepcopy(small)
    weights = [p for p in plain.parameters() if p.dim() > 1]
    rest = [p for p in plain.parameters() if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(4):
        batch = data[step % len(data)]
        optimizer.zero_grad()
        log = plain(**batch).logits.log_softmax(-1)
        goal = dense(**batch).logits.log_softmax(-1).detach()
        nn.functional.kl_div(log, goal, log_target=True, reduction="batchmean").backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        optimizer.step()
    tuned = run(small, dense, config)
    for a, b, start in zip(tuned.parameters(), plain.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a - start, b - start, rtol=1e-3, atol=2e-5)
    assert not same(tuned, small)


@pytest.fixture
def rates(monkeypatch):
    """The learning rate of every update."""
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *args, **options):
        [rate] = {group["lr"] for group in self.param_groups}
        seen.append(rate)
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


def test_the_learning_rate_follows_its_schedule(bert, rates):
    small = cut(bert)
    for schedule in ("linear", "cosine", "constant"):
        rates.clear()
        run(small, bert, TuneConfig(steps=10, warmup=0.2, schedule=schedule, learning_rate=1e-4))
        assert len(rates) == 10
        assert all(0 < rate <= 1e-4 for rate in rates)
        assert rates[0] == pytest.approx(0.25e-4)
        if schedule == "constant":
            assert rates[2:] == [1e-4] * 8
        else:
            assert rates[2:] == sorted(rates[2:], reverse=True)
            assert rates[-1] < 0.1e-4


@pytest.mark.parametrize("rank", [None, 2])
def test_the_default_rate_goes_with_the_root_of_the_first_look(bert, monkeypatch, rates, rank):
    """A member that is near the dense model takes short steps, and so does a wide one."""
    small, times = cut(bert), 1 if rank is None else 10
    config = TuneConfig(steps=4, schedule="constant", warmup=0.0, lora_rank=rank)
    for look, rate in ((1e-6, 1e-4 / 32), (4e-6, 2e-4 / 32), (9.0, 1e-3)):
        rates.clear()
        monkeypatch.setattr(Distillation, "divergence", lambda self, model, look=look: look)
        run(small, bert, config)
        assert rates == [pytest.approx(times * rate)] * 4


def test_adapters_change_linear_layers_by_a_low_rank(bert):
    small = cut(bert)
    tuned = run(small, bert, LORA)
    layers = adaptable(small)
    assert len(layers) == 13  # two blocks of six, and the pooler
    for name, weight in small.named_parameters():
        difference = tuned.get_parameter(name) - weight
        if name.removesuffix(".weight") in layers and "pooler" not in name:
            assert 0 < torch.linalg.matrix_rank(difference, rtol=1e-4) <= 3
        else:
            assert not difference.any()


def test_adapters_of_a_mixture_leave_its_experts_alone():
    """peft knows older names of experts, which a dense block of the same model has today."""
    model = build("qwen3_moe", mlp_only_layers=[1])
    small = cut(model)
    tuned = run(small, model, LORA)
    changed = [
        name
        for name, weight in small.named_parameters()
        if not torch.equal(tuned.get_parameter(name), weight)
    ]
    assert "model.layers.1.mlp.gate_proj.weight" in changed
    assert not [name for name in changed if "experts" in name]


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["full", "lora"])
def test_never_worse_than_at_the_start(bert, config):
    """With a learning rate that destroys the model, the start itself comes back."""
    small = cut(bert)
    wild = TuneConfig(**config.to_dict() | {"learning_rate": 500.0, "warmup": 0.0})
    assert same(run(small, bert, wild), small)
    dense = run(bert, bert)
    assert same(dense, bert)


def test_the_best_look_wins_not_the_last(bert, monkeypatch):
    """With looks that say 5, 3, 4, 6 the result is that of a run of one step."""
    small = cut(bert)
    options = {"schedule": "constant", "warmup": 0.0, "evaluate_every": 1, "learning_rate": 1e-3}
    expected = run(small, bert, TuneConfig(steps=1, **options))
    looks = [5.0, 3.0, 4.0, 6.0]
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: looks.pop(0))
    assert same(run(small, bert, TuneConfig(steps=3, **options)), expected)
    assert not looks


@pytest.fixture
def hot(monkeypatch):
    """A default learning rate that is far too high at first."""
    for name, value in HOT.items():
        monkeypatch.setattr(learning_rate, name, value)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_default_rate_is_halved_while_one_update_makes_things_worse(bert, hot, rates, rank):
    """What comes of it is a run at the rate of the last try, from the best weights until then."""
    small, data = cut(bert), batches(bert)
    options = {"schedule": "constant", "warmup": 0.0, "lora_rank": rank, "evaluate_every": 1}
    tuned = run(small, bert, TuneConfig(steps=30, **options), data)
    assert error(tuned, bert) < error(small, bert)
    tries = len(set(rates))
    assert tries > 2
    assert rates == [rates[0] * 0.5 ** min(i, tries - 1) for i in range(30)]
    if rank is None:  # merged adapters would begin anew
        given = options | {"learning_rate": rates[-1]}
        best = run(small, bert, TuneConfig(steps=1, **given), [data[(tries - 1) % len(data)]])
        rest = [data[i % len(data)] for i in range(tries, 30)]
        assert same(run(best, bert, TuneConfig(steps=30 - tries, **given), rest), tuned)


@pytest.mark.parametrize(
    ("steps", "look", "own", "halved"),
    [
        (1000, 2.9, False, False), (1000, 3.1, False, True), (5000, 3.1, False, True),
        (100, 1.19, False, False), (100, 1.21, False, True), (1000, 1.11, True, True),
        (1000, 1.09, True, False), (100, 1.02, True, True),
    ],
)  # fmt: skip
def test_how_much_one_update_may_add(bert, monkeypatch, rates, steps, look, own, halved):
    """The more steps there are, the more of it later ones bring down."""
    looks = [1.0, look, 0.5, 0.6]  # patience stops it then
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: looks.pop(0))
    options = {"schedule": "constant", "warmup": 0.0, "evaluate_every": 1, "patience": 1}
    loss = (lambda outputs, batch: outputs[0].square().mean()) if own else None
    run(cut(bert), bert, TuneConfig(steps=steps, **options), loss=loss)
    first, *later = rates
    assert later == [pytest.approx(first / 2 if halved else first)] * 2


def test_tries_come_to_an_end(bert, monkeypatch, rates):
    """Held-out batches that no update makes better do not take all steps, nor the whole rate."""
    looks = [1.0, *[9.0] * 10, 9.0, 0.5]
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: looks.pop(0))
    small = cut(bert)
    options = {"schedule": "constant", "warmup": 0.0, "evaluate_every": 15}
    tuned = run(small, bert, TuneConfig(steps=30, **options))
    assert rates == [1e-3 * 0.5 ** min(i, 10) for i in range(30)]
    assert not looks
    assert not same(tuned, small)


def test_the_schedule_begins_after_the_tries(bert, monkeypatch, rates):
    """Two tries of full length, and in the steps that are left a warmup and a decay, both whole."""
    looks = [1.0, 9.0, 1.0, 0.9, 0.8]
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: looks.pop(0))
    config = TuneConfig(steps=12, warmup=0.3, schedule="linear", evaluate_every=10)
    run(cut(bert), bert, config)
    first, second, *later = rates
    assert first == 2 * second
    assert later[:4] == sorted(later[:4])
    assert later[3:] == sorted(later[3:], reverse=True)
    assert later[0] < 0.2 * second
    assert 0.9 * second < max(later) <= second
    assert 0 < later[-1] < 0.1 * second


@pytest.mark.parametrize(("rate", "updates"), [(None, 8), (1e-4, 2)], ids=["default", "given"])
def test_patience_does_not_count_what_the_peak_makes_worse(bert, monkeypatch, rates, rate, updates):
    """Two stale looks end a run; at the default rate those above the start are none."""
    looks = [1.0, 1.001, 1.9, 2.5, 1.2, 0.9, 0.8, 0.85, 0.95, 0.7]
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: looks.pop(0))
    config = TuneConfig(steps=9, evaluate_every=1, patience=2, warmup=0.0, learning_rate=rate)
    run(cut(bert), bert, config)
    assert len(rates) == updates


def test_a_default_rate_that_gives_nan_is_halved(bert, hot, rates, monkeypatch, tmp_path):
    """One update at 1 gives it, and so do some at a rate that one update can bear."""
    small, data = cut(bert), batches(bert)
    real, start = Distillation.errors, list(small.parameters())

    def finite_near_the_start(self, model, batch):
        far = max((p - q).abs().max() for p, q in zip(model.parameters(), start, strict=True))
        return real(self, model, batch) * (torch.nan if far > 0.2 else 1.0)

    monkeypatch.setattr(Distillation, "errors", finite_near_the_start)
    monkeypatch.setattr(learning_rate, "_GROWTH", 1000.0)
    config = TuneConfig(steps=30, warmup=0.0, evaluate_every=6, schedule="constant")
    tuned = run(small, bert, config, data)
    peaks = list(dict.fromkeys(rates))
    assert peaks == [0.5**i for i in range(len(peaks))]
    assert rates[:3] == [1.0, 0.5, 0.25]  # NaN in the held-out batches
    assert rates[3] == rates[4] == 0.125  # a try, and an update after which a loss is NaN
    assert len(peaks) > 4
    assert error(tuned, bert) < error(small, bert)
    stops = Stops(data, after=9)
    with pytest.raises(KeyboardInterrupt):
        run(small, bert, config, stops, checkpoint=tmp_path, checkpoint_every=1)
    again = run(small, bert, config, data, checkpoint=tmp_path, checkpoint_every=1)
    assert same(again, tuned)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_nan_right_after_a_worse_look_goes_back_too(bert, rates, monkeypatch, every):
    """A look does not make the weights the best ones."""
    small, data, looks = cut(bert), batches(bert), [1.0, 0.5]
    monkeypatch.setattr(
        Distillation, "divergence", lambda self, model: looks.pop(0) if looks else 0.6
    )
    real, seen = Distillation.errors, []

    def once_not_finite(self, model, batch):
        seen.append(1)
        return real(self, model, batch) * (torch.inf if len(seen) == 5 else 1.0)

    monkeypatch.setattr(Distillation, "errors", once_not_finite)
    config = TuneConfig(steps=8, warmup=0.0, evaluate_every=every, schedule="constant")
    expected = run(small, bert, TuneConfig(steps=1, warmup=0.0, schedule="constant"), data)
    looks += [1.0, 0.5]
    seen.clear()
    rates.clear()
    tuned = run(small, bert, config, data)
    assert len(seen) == 9
    assert rates == [rates[0]] * 4 + [rates[0] / 2] * 4
    assert same(tuned, expected)


@pytest.mark.parametrize("after", [1, 4, 9, 12, 20])
def test_a_search_for_the_rate_is_resumed(bert, hot, tmp_path, after):
    config = TuneConfig(steps=30, warmup=0.1)
    test_interrupt_and_resume(bert, tmp_path, config, KeyboardInterrupt, after)


def test_an_interrupt_on_the_way_back_to_the_start_loses_nothing(bert, hot, tmp_path, monkeypatch):
    small, data, config = cut(bert), batches(bert), TuneConfig(steps=60, warmup=0.1)
    real, returns = training.set_parts_, []

    def counted(*args):
        returns.append(1)
        if len(returns) == last:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(training, "set_parts_", counted)
    last = None
    whole = run(small, bert, config, data)
    last = len(returns)  # the rate of the try after it is the first that is low enough
    returns.clear()
    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(small, bert, config, data, **options)
    assert same(run(small, bert, config, data, **options), whole)


def test_a_rate_that_was_given_stays(bert, rates):
    options = {"schedule": "constant", "learning_rate": 500.0, "warmup": 0.0}
    run(cut(bert), bert, TuneConfig(steps=9, evaluate_every=2, **options))
    assert rates == [500.0] * 9


def test_no_default_rate_follows_from_a_negative_loss(bert):
    with pytest.raises(ConfigError, match=r"the loss is -1.* at the start.*learning_rate="):
        run(cut(bert), bert, TRIED, loss=lambda outputs, batch: outputs[0].square().mean() - 2)


def test_layers_that_kept_no_inputs_do_not_set_the_default_rate(bert):
    """Their weights are empty, and what is trained are the biases."""
    small = solpath.extract(bert, plan_of(bert, [0] * len(solpath.find_pairs(bert))))
    for name, parameter in small.named_parameters():
        parameter.requires_grad_("output.dense" in name)
    tuned = run(small, bert, TRIED)
    assert error(tuned, bert) <= error(small, bert)
    assert {p.shape[1] for n, p in tuned.named_parameters() if "output.dense.w" in n} == {0}


def test_patience_stops_early(bert):
    options = {"schedule": "constant", "learning_rate": 500.0, "warmup": 0.0, "patience": 2}
    data = Stops(batches(bert), after=6)
    run(cut(bert), bert, TuneConfig(steps=100, evaluate_every=3, **options), data)
    assert data.left == 0


@pytest.mark.parametrize(
    ("config", "exception", "after"),
    [(QUICK, KeyboardInterrupt, 0), (QUICK, KeyboardInterrupt, 3), (QUICK, KeyboardInterrupt, 5),
     (QUICK, RuntimeError, 1), (QUICK, RuntimeError, 5), (LORA, KeyboardInterrupt, 4)],
)  # fmt: skip
def test_interrupt_and_resume(bert, tmp_path, config, exception, after):
    small, data = cut(bert), batches(bert)
    whole = run(small, bert, config, data)
    stops = Stops(data, after, exception)
    with pytest.raises(exception):
        run(small, bert, config, stops, checkpoint=tmp_path, checkpoint_every=2)
    again = Stops(data, after=100)
    assert same(whole, run(small, bert, config, again, checkpoint=tmp_path, checkpoint_every=2))
    done = after if exception is KeyboardInterrupt else after - after % 2
    assert 100 - again.left == config.steps - done
    finished = Stops(data, after=0)
    assert same(whole, run(small, bert, config, finished, checkpoint=tmp_path))


def test_kill_and_resume(bert, tmp_path):
    """Another process is killed with SIGKILL before its fifth batch; this one goes on."""
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_tune as t
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)
        dense = t.build("bert")
        data = t.Stops(t.batches(dense), 4, kill)
        t.run(t.cut(dense), dense, t.QUICK, data, checkpoint=sys.argv[1], checkpoint_every=3)
        """)
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment)
    assert done.returncode == -signal.SIGKILL
    data = Stops(batches(bert), after=100)
    assert same(run(cut(bert), bert, data=data, checkpoint=tmp_path), run(cut(bert), bert))
    assert 100 - data.left == 3


@pytest.mark.parametrize(
    ("processes", "cases"),
    [(2, ["full", "lora", "shards-full", "shards-tried"]), (3, ["shards-full", "shards-lora"])],
)
def test_several_processes_give_the_same_model(processes, cases, hot, tmp_path):
    """Batches of five samples, so that the shares differ, with every parameter sharded or none.

    accelerate shards on GPUs only, so the script does what it would do there.
    """
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_tune as t
        from accelerate import Accelerator, PartialState
        from solpath.refining.training import Training
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import DTensor

        meshes = []

        def prepare(self, model, optimizer):
            mesh = init_device_mesh("cpu", (self.num_processes,))
            meshes.append(mesh)
            names = {{id(p): name for name, p in model.named_parameters()}}
            for module in (*model.encoder.layer, model):
                fully_shard(module, mesh=mesh)
            for group in optimizer.param_groups:
                group["params"] = [model.get_parameter(names[id(p)]) for p in group["params"]]
            return model, optimizer

        def finish(self):
            assert all(isinstance(p, DTensor) for p in self._taught._dense.parameters())
            whole = sum(p.numel() for p in self._trained.values())
            part = sum(value.numel() for value in self.best.values())
            assert part < 0.6 * whole
            return stock[2](self)

        folder = sys.argv[1]
        for name, value in t.HOT.items():
            setattr(t.learning_rate, name, value)
        stock = Accelerator.prepare, Accelerator.is_fsdp2, Training.finish_
        for name in sys.argv[2:]:
            config = t.CONFIGS[name.split("-")[-1]]
            Accelerator.prepare, Accelerator.is_fsdp2, Training.finish_ = stock
            if "shards" in name:
                Accelerator.prepare, Accelerator.is_fsdp2 = prepare, property(lambda self: True)
                Training.finish_ = finish
            dense = t.build("bert").double()
            data = t.batches(dense, samples=5)
            small = t.solpath.load(folder + "/small")
            found = [t.everything(model) for model in (small, dense)]
            options = {{"checkpoint": f"{{folder}}/state-{{name}}", "checkpoint_every": 2}}
            try:
                t.run(small, dense, config, t.Stops(data, 4, ValueError), **options)
            except ValueError:
                tuned = t.run(small, dense, config, data, **options)
            for model, before in zip((small, dense), found):
                t.assert_equal(t.everything(model), before)
            state = PartialState()
            rank, world = state.process_index, state.num_processes
            print("process %d %d\\n" % (rank, world), end="")  # in one write
            if state.is_main_process:
                t.solpath.save(tuned, f"{{folder}}/{{name}}")

        # Caches of torch keep the meshes, whose group could then not end before Python does.
        for mesh in meshes:
            vars(mesh).pop("_pg_registry", None)
        """)
    )
    dense = build("bert").double()
    small = cut(dense, 0.9)
    solpath.save(small, tmp_path / "small")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, f"--nproc-per-node={processes}", script, tmp_path, *cases],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"process 1 {processes}" in done.stdout
    for name in cases:
        config = CONFIGS[name.split("-")[-1]]
        one = run(small, dense, config, batches(dense, samples=5))
        two = solpath.load(tmp_path / name)
        moved = max((a - b).abs().max() for a, b in zip(*map(_filled, (one, small)), strict=True))
        for a, b in zip(*map(_filled, (one, two)), strict=True):
            assert (a - b).abs().max() < 1e-4 * moved


def _filled(model):
    return [p.detach() for p in model.parameters() if p.numel()]


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["full", "lora"])
def test_empty_and_tied_layers(config, tmp_path):
    dense = build("roberta", tie_word_embeddings=True)
    small = cut(dense, 0.97)
    assert 0 in {p.numel() for p in small.parameters()}
    tuned = run(small, dense, config, checkpoint=tmp_path)
    assert error(tuned, dense) < error(small, dense)
    assert tuned.lm_head.decoder.weight is tuned.roberta.embeddings.word_embeddings.weight
    changed = not torch.equal(tuned.lm_head.decoder.weight, small.lm_head.decoder.weight)
    assert changed == (config is QUICK)
    assert same(tuned, run(small, dense, config, checkpoint=tmp_path))


def test_a_start_that_rounds_to_less_than_nothing(bert, monkeypatch):
    """The divergence of a model that is nearly the dense one may be -1e-8; the rate is then 0."""
    monkeypatch.setattr(Distillation, "divergence", lambda self, model: -1e-8)
    small = cut(bert)
    assert same(run(small, bert, TuneConfig(steps=2, warmup=0.0)), small)


def test_the_width_of_transposed_layers():
    """GPT-2 has [inputs, outputs] where others have [outputs, inputs]."""
    layer = Conv1D(30, 4)  # from 4 inputs to 30 outputs
    assert typical_width(layer) == typical_width(nn.Linear(4, 30)) == 4


def test_any_two_modules_with_equal_outputs():
    torch.manual_seed(0)
    dense, small = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    data = [torch.randn(8, 4) for _ in range(20)]
    tuned = solpath.tune(
        small, dense, data, TuneConfig(steps=100, learning_rate=0.1), progress=False
    )
    before, after = (solpath.evaluate(m, dense, data[-2:]).metrics for m in (small, tuned))
    assert after["relative_error"] < 0.5 * before["relative_error"]


def test_what_has_no_influence(bert, tmp_path):
    small, data = cut(bert), batches(bert)
    whole = run(small, bert)
    torch.manual_seed(99)
    small.train()
    assert same(whole, run(small, bert, progress=True))
    for every in (1, 4):
        state = tmp_path / str(every)
        assert same(whole, run(small, bert, checkpoint=state, checkpoint_every=every))
    assert same(whole, run(small, bert, data=iter(data), heldout=iter(heldout(bert))))
    tokens = torch.cat([batch["input_ids"] for batch in data])
    loader = DataLoader(TensorDataset(tokens), 4, shuffle=True, collate_fn=_stack)
    first = run(small, bert, data=loader, heldout=loader)
    torch.manual_seed(7)
    assert same(first, run(small, bert, data=loader, heldout=loader))
    assert not same(first, whole)


def _stack(rows):
    return torch.stack([row[0] for row in rows])


def test_the_target_cache_has_no_influence(bert, monkeypatch):
    small = cut(bert)
    whole = run(small, bert)
    monkeypatch.setattr("solpath.objective.TARGET_CACHE_BYTES", 0)
    assert same(whole, run(small, bert))


def test_held_out_by_default(bert):
    data = batches(bert, 20)
    default = run(cut(bert), bert, data=data, heldout=None)
    assert same(default, run(cut(bert), bert, data=data[:-2], heldout=data[-2:]))
    with pytest.raises(ConfigError, match="checkpoint_every must be"):
        run(cut(bert), bert, data=data, checkpoint_every=0)
    with pytest.raises(BatchError, match="a tenth of 9 batches; pass heldout="):
        run(cut(bert), bert, data=data[:9], heldout=None)
    with pytest.raises(BatchError, match="of a DataLoader; pass heldout="):
        run(cut(bert), bert, data=DataLoader(data), heldout=None)


def test_mixed_precision(bert):
    small = cut(bert)
    low = run(small, bert, TuneConfig(**QUICK.to_dict() | {"mixed_precision": "bf16"}))
    full = run(small, bert)
    assert {p.dtype for p in low.parameters()} == {torch.float32}
    assert not same(low, full)
    assert error(low, bert) == pytest.approx(error(full, bert), rel=0.2)


def test_mixed_precision_in_an_autocast_of_the_caller(bert):
    small, config = cut(bert), TuneConfig(**QUICK.to_dict() | {"mixed_precision": "bf16"})
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(small, bert, config)
    assert same(inside, run(small, bert, config))


def test_half_precision_weights(bert):
    small = cut(bert).bfloat16()
    with pytest.raises(UnsupportedModelError, match=r"torch\.bfloat16.*lora_rank"):
        run(small, bert)
    tuned = run(small, bert, LORA)
    assert {p.dtype for p in tuned.parameters()} == {torch.bfloat16}
    assert error(tuned, bert) < error(small, bert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_trained_in_float32_and_merged_with_one_rounding(bert, dtype):
    small = cut(bert).to(dtype)
    tuner = add_adapters_(copy.deepcopy(small), 3, 6.0)
    wide = torch.promote_types(dtype, torch.float32)
    factors = {n: p for n, p in tuner.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in factors.values()} == {wide}
    values = {name: torch.randn_like(p) for name, p in factors.items()}
    path = "encoder.layer.0.intermediate.dense"
    a, b = (values[f"{path}.lora_{side}.default.weight"].to(wide) for side in "AB")
    merged = merge_adapters_(tuner, values)[f"{path}.weight"]
    weight = small.get_submodule(path).weight.to(wide) + (b @ a) * 2.0
    assert torch.equal(merged, weight.to(dtype))


def test_a_checkpoint_of_another_tuning_is_refused(bert, tmp_path):
    small = cut(bert)
    run(small, bert, checkpoint=tmp_path)
    longer = TuneConfig(**QUICK.to_dict() | {"steps": 7})
    with pytest.raises(FingerprintError, match="differs in steps: 6, not 7"):
        run(small, bert, longer, checkpoint=tmp_path)
    with pytest.raises(FingerprintError, match="differs in small"):
        run(cut(bert, 0.4), bert, checkpoint=tmp_path)
    with pytest.raises(FingerprintError, match="differs in dense"):
        run(small, build("bert", seed=1), checkpoint=tmp_path)
    file = tmp_path / "tune.safetensors"
    search = tmp_path / "search"
    solpath.search(bert, batches(bert), SearchConfig(steps=2), checkpoint=search, progress=False)
    (search / "search.safetensors").rename(search / "tune.safetensors")
    with pytest.raises(FingerprintError, match="differs in kind"):
        run(small, bert, checkpoint=search)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FileError, match=r"tune\.safetensors"):
        run(small, bert, checkpoint=tmp_path)


def test_a_loss_that_is_not_finite_stops_tuning(bert, tmp_path):
    small = cut(bert)
    tokens = [batch["input_ids"] for batch in batches(bert)]
    data = [{"inputs_embeds": bert.embeddings.word_embeddings(t).detach()} for t in tokens]
    data[2] = {"inputs_embeds": data[2]["inputs_embeds"] * torch.nan}
    options = {"checkpoint": tmp_path, "checkpoint_every": 1, "heldout": data[:1]}
    with pytest.raises(
        NonFiniteLossError, match="row 0 of batch 2 is nan at step 2; the checkpoint of step 2"
    ):
        run(small, bert, data=data, **options)
    with pytest.raises(NonFiniteLossError, match="row 0 of held-out batch 0 is nan at step 0"):
        run(small, bert, data=data, heldout=data[2:])
    options = {"checkpoint": tmp_path / "none", "heldout": data[2:]}
    with pytest.raises(NonFiniteLossError, match=r"nan at step 0\.$"):  # and no checkpoint to go on
        run(small, bert, data=data, **options)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        ({"input_ids": torch.ones(1, 3)}, "wrap it in a list"),
        ([{"input_ids": torch.ones(0, 3, dtype=torch.long)}], "no samples"),
        ([{"input_ids": torch.ones(2, 3, dtype=torch.long, device="meta")}], "is on meta"),
    ],
)
def test_bad_batches(bert, data, words):
    small = cut(bert)
    with pytest.raises(BatchError, match=words):
        run(small, bert, data=data)
    with pytest.raises(BatchError, match=words):
        run(small, bert, heldout=data if isinstance(data, dict) else list(data))


def test_models_that_cannot_be_tuned(bert, monkeypatch):
    small = cut(bert)
    other = build("bert", hidden_size=16)
    with pytest.raises(BatchError, match=r"gives \[4, 9, 32\] and the dense one \[4, 9, 16\]"):
        run(small, other, data=batches(bert), heldout=batches(bert))
    with pytest.raises(BatchError, match="is on cpu, the model on meta"):
        run(small, other.to("meta"), data=batches(bert), heldout=batches(bert))
    with pytest.raises(UnsupportedModelError, match="no linear layer for an adapter"):
        solpath.tune(nn.Embedding(5, 3), nn.Embedding(5, 3), [torch.ones(2, 2).long()] * 10, LORA)
    with pytest.raises(UnsupportedModelError, match="no parameter of this BertModel"):
        run(small.requires_grad_(False), bert)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'solpath\[tune\]'"):
        run(small.requires_grad_(True), bert, LORA)


class Ends(nn.Module):
    """The name of a layer is the end of another's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential()
        self.inner.fc, self.fc = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x + self.inner(x).relu())


def test_adapters_are_put_on_the_layers_that_are_meant_alone():
    dense, small = Ends(), Ends()
    small.inner.requires_grad_(False)
    data = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    tuned = solpath.tune(small, dense, data, LORA, heldout=data[:2], progress=False)
    assert torch.equal(tuned.inner.fc.weight, small.inner.fc.weight)
    assert not torch.equal(tuned.fc.weight, small.fc.weight)


class Drawn(list):
    """A sequence that adds noise to its items anew whenever they are read."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item if isinstance(index, slice) else item + torch.randn(item.shape)


def test_targets_of_samples_that_change_are_not_those_of_the_first_time(monkeypatch):
    model, losses = nn.Sequential(nn.Linear(8, 4)), []
    step_ = training.Training.step_

    def noted(self):
        step_(self)
        losses.append(self.losses[-1])

    monkeypatch.setattr(training.Training, "step_", noted)
    data = Drawn([torch.randn(4, 8) for _ in range(2)])
    config = TuneConfig(steps=6, evaluate_every=6, learning_rate=1e-12)
    solpath.tune(copy.deepcopy(model), model, data, config, heldout=[data[0]], progress=False)
    assert losses == [0.0] * 6


def test_gradients_that_the_user_accumulates_are_no_business_of_tuning(bert, monkeypatch):
    small = cut(bert)
    alone = run(small, bert)
    try:
        accelerator = Accelerator(gradient_accumulation_steps=4)
        with accelerator.accumulate(nn.Linear(2, 2)):
            assert not accelerator.sync_gradients
        assert same(run(small, bert), alone)
        assert (accelerator.gradient_accumulation_steps, accelerator.sync_gradients) == (4, False)
    finally:
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._reset_state()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert same(run(small, bert), alone)


def test_what_accelerate_was_set_up_for(bert, monkeypatch):
    small = cut(bert)
    try:
        Accelerator()
        whole = run(small, bert)
        assert is_initialized()
    finally:
        AcceleratorState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="mixed_precision='bf16', the config says 'no'"):
        run(small, bert)
    assert not is_initialized()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert same(whole, run(small, bert))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(ConfigError, match=r"accelerate counts 2 processes, torch\.distributed 1"):
        run(small, bert)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match="fsdp_version 2"):
        run(small, bert)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 2.5), ("seed", -1), ("evaluate_every", 0), ("patience", 0),
     ("lora_rank", 0), ("lora_alpha", 0.0), ("learning_rate", 0.0), ("warmup", 1.5),
     ("weight_decay", -1.0), ("max_grad_norm", 0.0), ("schedule", "step"),
     ("mixed_precision", "fp16")],
)  # fmt: skip
def test_bad_settings(field, value):
    with pytest.raises(ConfigError, match=field):
        TuneConfig(**{field: value})
