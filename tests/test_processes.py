"""Which device a process of several works on, and through which it talks to the others."""

from types import SimpleNamespace

import pytest
import torch

from solpath.errors import ConfigError
from solpath.running import processes
from solpath.running.processes import communication_device, process, sum_over_processes


@pytest.fixture
def second_of_two(monkeypatch):
    """Let this process think that it is the second of two on a machine with two GPUs."""

    def set_up(backends, *, current=0, gpus=2):
        devices = SimpleNamespace(current_device=lambda: current, device_count=lambda: gpus)
        monkeypatch.setattr(torch, "get_device_module", lambda kind: devices)
        monkeypatch.setattr(processes, "_started", lambda: True)
        for name, value in (("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        for name, value in (("get_rank", 1), ("get_world_size", 2)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda group: backends)

    return set_up


@pytest.mark.parametrize(
    ("backends", "current", "device"),
    [
        ("cuda:nccl", 0, "cuda:1"),  # nobody has chosen one: that of the launcher
        ("cuda:nccl", 1, "cuda:1"),
        ("cpu:gloo,cuda:nccl", 0, "cpu"),
        ("cpu:gloo,cuda:gloo,xpu:gloo", 0, "cpu"),
    ],
)
def test_tensors_go_where_the_backend_takes_them(second_of_two, backends, current, device):
    """And not where the model is: NCCL would refuse those of a model on the CPU."""
    second_of_two(backends, current=current)
    assert communication_device() == torch.device(device)


def test_the_gpu_of_another_process_is_refused(second_of_two):
    second_of_two("cuda:nccl")
    for device in (None, torch.device("cpu"), torch.device("cuda:1")):
        assert process(device) == (1, 2)
    message = r"process 1 of 2 has its model on cuda:0, and its own device is cuda:1; write acc"
    with pytest.raises(ConfigError, match=message):
        process(torch.device("cuda:0"))
    second_of_two("cpu:gloo,cuda:gloo", gpus=1)  # too few for all, so they share it
    assert process(torch.device("cuda:0")) == (1, 2)


def test_sums_are_made_where_the_backend_takes_them(second_of_two, monkeypatch):
    second_of_two("meta:nccl", gpus=1)
    seen = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: seen.append(values.device))
    with pytest.raises(NotImplementedError, match="meta"):
        sum_over_processes(torch.ones(2))
    assert [device.type for device in seen] == ["meta"]
    second_of_two("cpu:gloo")
    assert sum_over_processes(torch.ones(2)).tolist() == [1, 1]
    assert [device.type for device in seen] == ["meta", "cpu"]
