"""A cut model in ExecuTorch, by the exporter of torch alone, where it is installed."""

import pytest
import torch
from torch import nn

import solpath
from conftest import build
from plans import random_plan

pytest.importorskip("executorch")


class Hidden(nn.Module):
    """An encoder that takes and gives tensors only, as programs of ExecuTorch do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def test_a_cut_encoder_runs_in_executorch(tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    dense = build("bert")
    small = Hidden(solpath.extract(dense, random_plan(dense, (0.5, 0.25, 0.75)))).eval()
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    traced = torch.export.export(small, (ids, mask))
    lowered = to_edge_transform_and_lower(traced, partitioner=[XnnpackPartitioner()])
    (tmp_path / "model.pte").write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    [found] = method.execute([ids, mask])
    with torch.no_grad():
        torch.testing.assert_close(found, small(ids, mask), rtol=1e-5, atol=1e-5)
