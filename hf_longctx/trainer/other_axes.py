"""Tensor, pipeline and expert parallelism next to shared rows: refused by name.

They come with the arguments (`ParallelismConfig`), with the launcher, or with the model: `tp_plan`, a
`distributed_config`, a `device_map` over several devices, or parameters that are pieces already. All of them take the
processes, or the layers, that a group of ranks needs whole.
Price: one pass over the parameters when a trainer is built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..adapters.wrapped import unwrap


# What replicates or stores whole layers and cuts rows between groups; everything else cuts layers or tokens.
_DATA_PARALLEL = ("dp", "dp_replicate", "dp_shard", "dp_shard_cp", "fsdp", "efsdp", "data_parallel", "batch")
_SIZES = {"tp_size": "tensor", "pp_size": "pipeline", "ep_size": "expert"}


def refuse_axes_of_arguments(parallelism: Any, size: int) -> None:
    """Refuse a `ParallelismConfig` that has an axis of its own beside the data-parallel ones.

    Raises:
        ValueError: the axis is named.
    """
    sizes = [name for name in dir(parallelism) if name.endswith("_size") and not name.startswith(("dp_", "_"))]
    for name in sizes:
        value = getattr(parallelism, name)
        is_axis = isinstance(value, int) and name not in ("total_size", "data_parallel_size", "non_data_parallel_size")
        if is_axis and value > 1:
            raise ValueError(
                f"`ParallelismConfig({name}={value})` is set next to `sequence_parallel_size` ({size}): both would "
                f"cut the batch; leave `{name}` at 1."
            )


def refuse_axes_of_model(model: torch.nn.Module, size: int) -> None:
    """Refuse a model that is split over processes or devices, where `size` ranks share rows.

    Raises:
        NotImplementedError: what splits it is named.
    """
    base = unwrap(model)
    found = _axis_of_config(base) or _axis_of_devices(base) or _axis_of_parameters(model)
    if found is not None:
        raise NotImplementedError(
            f"`{type(base).__name__}` is split by {found}, next to `sequence_parallel_size` ({size}): the ranks of a "
            "group need whole layers; load the model without it, on one device a process, or set "
            "`sequence_parallel_size` to 1."
        )


def _axis_of_config(model: Any) -> str | None:
    settings = getattr(getattr(model, "config", None), "distributed_config", None)
    get = settings.get if isinstance(settings, dict) else lambda name: getattr(settings, name, None)
    for name, kind in _SIZES.items():
        sizes = [get(name), getattr(model, f"_{name}", None)]
        largest = max((value for value in sizes if isinstance(value, int)), default=1)
        if largest > 1:
            return f"{kind} parallelism (`{name}` {largest})"
    if get("enable_expert_parallel"):
        return "expert parallelism (`enable_expert_parallel` True)"
    return None


def _axis_of_devices(model: Any) -> str | None:
    devices = sorted({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()})
    if len(devices) > 1:
        return f"its `device_map` over {', '.join(devices)}"
    return None


def _axis_of_parameters(model: torch.nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        mesh = parameter.device_mesh
        names = mesh.mesh_dim_names or ("an axis without a name",) * mesh.ndim
        # A mesh of one dimension without a name is what `fully_shard` makes by default.
        if mesh.mesh_dim_names is None and _is_fully_sharded(model):
            continue
        other = [axis for axis, length in zip(names, mesh.shape) if length > 1 and axis not in _DATA_PARALLEL]
        if other:
            return f"a `DeviceMesh` with {other[0]!r} (`{name}` is a piece of a parameter)"
    return None


def _is_fully_sharded(model: torch.nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
