"""What `hf_longctx.adapt` leaves on a model, so that what cuts a batch and what attends to it can ask.

The mark is an attribute of the model and of each of its modules: attention sees one module, `shard_batch` the wrapped
model, and neither can see the other. It is copied and pickled with the instance, and is in no state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


MARK = "_hf_longctx_adapted"


@dataclass(frozen=True)
class Adapted:
    """How a model that was checked trains.

    Args:
        sequence_parallel_size (`int`): ranks that share each of its rows.
        inner_attention (`str`): the kernel that it was checked with.
        shifts_labels (`bool`, *optional*): it predicts the next token, so labels are shifted before rows are cut.
            `None`: it has no loss of its own.
        position_axes (`int`): of its rotary embedding, see [`position_axes`][hf_longctx.families.position_axes].
    """

    sequence_parallel_size: int
    inner_attention: str
    shifts_labels: bool | None
    position_axes: int = 0


def is_marked(module: torch.nn.Module) -> bool:
    """Whether the model that `module` belongs to has its adapters, and was or will be checked."""
    return MARK in vars(module)


def find_adapted(model: torch.nn.Module) -> Adapted | None:
    """What [`adapt`][hf_longctx.adapt] found out about a model, wrapped or not; `None` if it was never called."""
    marks = (vars(module).get(MARK) for module in model.modules())
    return next((mark for mark in marks if isinstance(mark, Adapted)), None)


def adapted_for(model: torch.nn.Module, sequence_parallel_size: int) -> Adapted:
    """The same for a model that is about to get rows of that many ranks.

    Raises:
        RuntimeError: it was never adapted, or for another number of ranks.
    """
    adapted = find_adapted(model)
    if adapted is None:
        raise RuntimeError(
            f"`model` ({type(model).__name__}) was not adapted: call `hf_longctx.adapt(model, mesh)` once after "
            "loading, on every rank, before the first batch is cut."
        )
    if adapted.sequence_parallel_size != sequence_parallel_size:
        raise RuntimeError(
            f"`model` ({type(model).__name__}) was adapted for {adapted.sequence_parallel_size} rank(s) a row, but "
            f"`mesh` has {sequence_parallel_size}: call `hf_longctx.adapt(model, mesh)` with this mesh."
        )
    return adapted


def mark(model: torch.nn.Module, adapted: Adapted | None = None) -> None:
    """Mark every module of `model`, and write on the model itself how it trains, if that is known."""
    for module in model.modules():
        vars(module)[MARK] = True
    if adapted is not None:
        vars(model)[MARK] = adapted


def unmark(model: torch.nn.Module) -> None:
    """Take the marks off."""
    for module in model.modules():
        vars(module).pop(MARK, None)
