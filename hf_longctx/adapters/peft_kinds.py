"""PEFT adapters that read more of a row than one token: what they do on a share or across documents is not theirs.

Most adapters change one token at a time and are exact. Those named in `families` look for token ids, put virtual
tokens in front of rows, average over the tokens of a batch or run another model on them.
"""

from __future__ import annotations

from torch.nn.parallel import DistributedDataParallel

from ..families import ROW_ADAPTER_FIELDS, ROW_ADAPTERS
from .few_bits import check_outlier_columns


# How rows are held, and the way out, for [`check_peft`].
PACKED_ROWS = "in a row of several documents", "pad documents instead of packing them"


def check_peft(model, way: str, remedy: str) -> None:
    """Refuse adapters, and 8-bit layers, whose effect on a token depends on other tokens that this process holds.

    Args:
        model (`torch.nn.Module`): with or without adapters.
        way (`str`): how rows are held, for the message: `"on a share of a row"`.
        remedy (`str`): what to do with such an adapter: `"set `sequence_parallel_size` to 1"`.

    Raises:
        NotImplementedError: it has one.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    check_outlier_columns(model, way, remedy)
    for adapter in getattr(model, "peft_config", {}).values():
        reason = _reason(adapter)
        if reason is not None:
            raise NotImplementedError(
                f"`{type(adapter).__name__}` {reason}, which would be others {way}: use LoRA or another adapter that "
                f"changes one token at a time, or {remedy}."
            )


def _reason(adapter) -> str | None:
    """What the adapter reads, in words."""
    for field, reason in ROW_ADAPTER_FIELDS.items():
        value = getattr(adapter, field, None)
        if value and _init_type(value) != "random":
            return reason if field.startswith("is_") else f"(`{field}`) {reason}"
    kind = getattr(adapter, "peft_type", None)
    return ROW_ADAPTERS.get(str(getattr(kind, "value", kind)))


def _init_type(value: object) -> str | None:
    """Of the settings of VeLoRA, whose random projections read no token."""
    return value.get("init_type") if isinstance(value, dict) else getattr(value, "init_type", None)
