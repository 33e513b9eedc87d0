"""Tensor, pipeline and expert parallelism next to shared rows are refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from transformers.distributed.configuration_utils import DistributedConfig

from hf_longctx.trainer.other_axes import refuse_axes_of_arguments, refuse_axes_of_model

from ..models import build
from .test_refusals import start


def split_by(**attributes):
    model = build("llama", "ulysses")
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_distributed_config(**sizes):
    model = build("llama", "ulysses")
    model.config.distributed_config = sizes
    return model


MODELS = [
    (lambda: split_by(_tp_size=2), r"tensor parallelism \(`tp_size` 2\), next to `sequence_parallel_size` \(2\)"),
    (lambda: with_distributed_config(tp_size=2, tp_plan="auto"), r"tensor parallelism \(`tp_size` 2\)"),
    (lambda: with_distributed_config(pp_size=2), r"pipeline parallelism \(`pp_size` 2\)"),
    (lambda: with_distributed_config(ep_size=4), r"expert parallelism \(`ep_size` 4\)"),
    (lambda: with_distributed_config(enable_expert_parallel=True), "expert parallelism"),
    (lambda: split_by(hf_device_map={"model": 0, "lm_head": 1}), "its `device_map` over 0, 1"),
    (lambda: split_by(hf_device_map={"model": "cpu", "lm_head": "disk"}), "its `device_map` over cpu, disk"),
]


@pytest.mark.parametrize(("make", "message"), MODELS)
def test_models_that_are_split_are_refused(make, message):
    with pytest.raises(NotImplementedError, match=message):
        refuse_axes_of_model(make(), 2)


def test_the_trainer_refuses_a_model_that_transformers_split(tmp_path):
    model = build("llama", "ulysses")
    model.config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(NotImplementedError, match=r"tensor parallelism \(`tp_size` 2\)"):
        start(tmp_path, model=model)


def test_one_device_a_process_is_no_split():
    refuse_axes_of_model(split_by(hf_device_map={"": "cpu"}, _tp_size=1), 2)
    refuse_axes_of_model(with_distributed_config(tp_size=1, fsdp_size=2), 2)


@pytest.mark.parametrize("axis", ["tp_size", "cp_size", "sp_size", "pp_size", "ep_size", "new_size"])
def test_axes_of_a_launcher_are_refused_by_name(axis):
    with pytest.raises(ValueError, match=rf"`ParallelismConfig\({axis}=2\)` is set next to `sequence_parallel_size`"):
        refuse_axes_of_arguments(SimpleNamespace(**{axis: 2, "dp_shard_size": 4, "total_size": 8}), 2)
    refuse_axes_of_arguments(SimpleNamespace(**{axis: 1, "dp_shard_size": 4, "total_size": 8}), 2)


@pytest.fixture
def alone(tmp_path):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("names", "is_refused"), [(("dp", "tp"), True), (("dp_replicate", "dp_shard"), False)])
def test_parameters_that_are_pieces_are_refused_unless_data_parallel(alone, names, is_refused):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    model = torch.nn.Linear(4, 4)
    piece = distribute_tensor(model.weight.detach(), mesh, [Replicate(), Replicate()])
    model.weight = torch.nn.Parameter(piece)
    assert isinstance(model.weight, DTensor)
    if not is_refused:
        return refuse_axes_of_model(model, 2)
    with pytest.raises(NotImplementedError, match="a `DeviceMesh` with 'tp' .`weight` is a piece of a parameter"):
        refuse_axes_of_model(model, 2)
